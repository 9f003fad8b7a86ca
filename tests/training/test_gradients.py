"""The trainer's hand-written gradients are those that autograd finds for the papers' losses."""

import math

import pytest
import torch

from actstore.ingest.training.config import SaeTrainConfig
from actstore.ingest.training.methods import MethodSetup, get_method
from tests.training import naive

D, N, B = 12, 40, 30


def make(method, *, n_latents=N, d=D, dead_after=10**9, dtype=torch.float32, **options):
    config = SaeTrainConfig(name="a", method=method, n_latents=n_latents, **{"k": 4, **options}).check()
    return get_method(method)(MethodSetup(config, d, 100, dead_after, torch.device("cpu"), dtype))


def shaken(trained, rows, seed):
    """Set the method up, and away from its start, where encoder and decoder are tied and biases zero."""
    generator = torch.Generator().manual_seed(seed)
    trained.initialise(rows)
    for name, weight in trained.weights.items():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
        if name == "W_dec":
            weight /= weight.norm(dim=1, keepdim=True)
    return trained


def leaves(trained):
    return {name: w.double().clone().requires_grad_() for name, w in trained.weights.items()}


def rows_of(seed, n=B, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.5


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(
            found[name].double(), weight.grad, rtol=2e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["topk", "batchtopk"])
def test_without_dead_latents(method, seed):
    x = rows_of(seed)
    trained = shaken(make(method), x, seed)
    wanted = leaves(trained)
    loss, z = naive.top_k_loss(wanted, x.double(), k=4, batch=method == "batchtopk")
    loss.backward()
    record, found = trained.gradients(x)
    assert_close(found, wanted)
    assert float(record.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(record.fvu) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(record.l0) == pytest.approx(float((z > 0).sum(1).double().mean()))
    assert trained.since_fired.tolist() == torch.where((z > 0).any(0), 0, B).tolist()


@pytest.mark.parametrize("aux_k", [3, 8, 200])
@pytest.mark.parametrize("method", ["topk", "batchtopk"])
def test_with_dead_latents(method, aux_k):
    x = rows_of(7, n=12)
    trained = shaken(make(method, k=1, aux_k=aux_k, aux_coefficient=0.25, dead_after=100), x, 7)
    long_ago = torch.arange(N) % 3 == 0
    trained.since_fired[long_ago] = 1000
    wanted = leaves(trained)
    _, z = naive.top_k_loss(wanted, x.double(), k=1, batch=method == "batchtopk")
    dead = (long_ago & ~(z > 0).any(0)).nonzero()[:, 0]
    assert 3 < len(dead) < 14
    loss, _ = naive.top_k_loss(
        wanted,
        x.double(),
        k=1,
        dead=dead,
        aux_k=min(aux_k, N),
        aux_coefficient=0.25,
        batch=method == "batchtopk",
    )
    loss.backward()
    record, found = trained.gradients(x)
    assert_close(found, wanted)
    assert float(record.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert int(record.n_dead) == len(dead) == trained.n_dead


def test_the_auxiliary_loss_by_hand():
    """One row of residual, one dead latent: everything can be worked out on paper."""
    trained = make("topk", n_latents=2, d=2, k=1, aux_k=1, aux_coefficient=0.5, dead_after=5)
    trained.weights["W_enc"].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    trained.weights["W_dec"].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    trained.since_fired[1] = 5
    x = torch.tensor([[3.0, 1.0], [3.0, -1.0]])
    record, found = trained.gradients(x)
    # x_hat = (3, 0): residuals (0, 1) and (0, -1), variance 2, fvu (1 + 1) / 2. On the first row the dead latent's
    # pre-activation is 1 and e_hat = e; on the second it is -1 and e_hat = 0: the auxiliary loss is 0.5 * (0 + 1) / 2.
    assert float(record.fvu) == 1.0
    assert float(record.loss) == 1.25
    # The first row has no error left and the second no code: the dead latent gets no gradient.
    assert found["W_dec"][1].tolist() == [0.0, 0.0]
    assert found["W_enc"][1].tolist() == [0.0, 0.0]
    # With a shorter decoder it does: e_hat = (0, 0.5), d = 2 * 0.5 * (0.5 - 1) / 2 = -0.25 along the second axis.
    trained.weights["W_dec"][1] = torch.tensor([0.0, 0.5])
    trained.since_fired[1] = 5
    _, found = trained.gradients(x)
    assert found["W_dec"][1].tolist() == [0.0, -0.25]
    assert found["W_enc"][1].tolist() == [-0.125 * 3, -0.125]
    assert float(found["b_enc"][1]) == -0.125


@pytest.mark.parametrize("seed", range(4))
def test_jumprelu(seed):
    x = rows_of(seed, n=200)
    trained = make("jumprelu", bandwidth=0.2, sparsity_coefficient=0.7)
    trained = shaken(trained, x, seed)
    # The paper's code clamps pre-activations at 0 and then finds all negative ones "near" a threshold of less than half a
    # bandwidth; here they never are.
    trained.weights["log_threshold"].clamp_(min=math.log(0.11 * D**0.5))
    trained._progress = 1.0
    wanted = leaves(trained)
    loss, z = naive.jumprelu_loss(wanted, x.double(), k=4, bandwidth=0.2 * D**0.5, coefficient=0.7)
    loss.backward()
    record, found = trained.gradients(x)
    assert found["log_threshold"].abs().min() > 0
    assert_close(found, wanted)
    assert float(record.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(record.l0) == pytest.approx(float((z > 0).sum(1).double().mean()))


def test_batchtopk_when_one_row_takes_all():
    """More of a row fire than its first candidates: they are looked for again, and the choice stays exact."""
    trained = make("batchtopk", k=2)
    generator = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(B, D, generator=generator)
    trained.initialise(x)
    x[3] += 100 * trained.weights["W_dec"].mean(0) + 50
    x[4] -= 50
    u = x - trained.weights["b_dec"]
    codes = trained.encode(u)
    pre = (u @ trained.weights["W_enc"].T + trained.weights["b_enc"]).clamp(min=0)
    largest = pre.flatten().sort(descending=True).values[: 2 * B]
    assert (codes.rows == 3).sum() > 8
    assert codes.values.sort(descending=True).values.tolist() == largest[largest > 0].tolist()
    dense = torch.zeros(B, N)
    dense[codes.rows, codes.latents] = codes.values
    assert torch.equal(dense, torch.where(pre >= largest[-1], pre, 0))
    key = codes.rows * N + codes.latents
    assert torch.equal(key, key.sort().values)


def test_batchtopk_keeps_no_more_than_asked_where_values_are_equal():
    trained = make("batchtopk", n_latents=4, d=4, k=2)
    trained.weights["W_enc"].copy_(torch.eye(4))
    codes = trained.encode(torch.ones(3, 4))
    assert codes.rows.tolist() == [0, 0, 0, 0, 1, 1]
    assert len(set(zip(codes.rows.tolist(), codes.latents.tolist(), strict=True))) == 6


def test_batchtopk_threshold_is_the_running_mean_of_the_smallest():
    trained = make("batchtopk", n_latents=3, d=3, k=1, threshold_decay=0.9)
    trained.weights["W_enc"].copy_(torch.eye(3))
    trained.encode(torch.tensor([[5.0, 0, 0], [0, 3.0, 0]]))
    trained.encode(torch.tensor([[7.0, 0, 0], [0, 9.0, 0]]))
    assert trained.threshold() == pytest.approx((0.09 * 3 + 0.1 * 7) / 0.19)


@pytest.mark.parametrize("method", ["topk", "batchtopk", "jumprelu"])
def test_decoder_rows_keep_norm_one_and_steps_lower_the_error(method):
    x = rows_of(3, n=400)
    trained = make(method, learning_rate=0.01)
    trained.initialise(x)
    errors = [float(trained.step(x, rate=1.0, progress=0.5).fvu) for _ in range(60)]
    norms = trained.weights["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(N), rtol=0, atol=1e-6)
    assert errors[-1] < 0.7 * errors[0]


def test_the_gradient_along_decoder_rows_is_taken_out():
    trained = shaken(make("topk"), rows_of(0), 0)
    gradient = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    before = gradient.clone()
    trained._remove_parallel(gradient)
    decoder = trained.weights["W_dec"]
    assert float((gradient * decoder).sum(1).abs().max()) < 1e-6
    torch.testing.assert_close(gradient, before - (before * decoder).sum(1, keepdim=True) * decoder)


def test_bfloat16_products_are_near():
    x = rows_of(0, n=64)
    exact, near = (make("topk", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for trained in (exact, near):
        trained.initialise(x)
    a, b = (trained.gradients(x)[0] for trained in (exact, near))
    assert float(a.fvu) == pytest.approx(float(b.fvu), rel=0.02)
    assert float(a.fvu) != float(b.fvu)


def test_another_order_of_magnitude_of_blocks_changes_nothing(monkeypatch):
    x = rows_of(0, n=700)
    one, many = (shaken(make("topk", aux_k=5, dead_after=1), x, 0) for _ in range(2))
    for trained in (one, many):
        trained.since_fired += 5
    monkeypatch.setattr(many, "block_rows", lambda: 64)
    (a, one_by), (b, many_by) = one.gradients(x), many.gradients(x)
    assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-5)
    for name, gradient in one_by.items():
        torch.testing.assert_close(gradient, many_by[name], rtol=1e-4, atol=1e-7)
