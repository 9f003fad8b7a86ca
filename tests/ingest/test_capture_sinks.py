"""The staged path of a device, run on the CPU with a stream that copies as late as it may."""

import numpy as np
import pytest
import torch

from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.batches import plan_batches
from actstore.ingest.capture import Capturer, make_batch
from actstore.ingest.models import load_model
from actstore.ingest.sinks import OverflowCount, StagedSink, StagingBuffers, SynchronousStream, as_tensor
from tests.ingest.tiny_models import cached


class LateStream(SynchronousStream):
    """Copies only when waited for: a buffer that is read or written again too early shows as wrong rows."""

    def __init__(self):
        self.under_way = 0
        self.most_under_way = 0

    def copy(self, host, device):
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)

        def wait():
            host.copy_(device)
            self.under_way -= 1

        return wait


def arrays(capturer, n_rows, stored):
    dtype = np.uint16 if stored == "bfloat16" else np.dtype(stored)
    return {name: np.zeros((n_rows, w), dtype) for name, w in capturer.widths.items()}


def staged(capturer, ids, starts, stored, buffers, batch_tokens):
    """Do what `capture_unit` does on another device."""
    out = arrays(capturer, len(ids), stored)
    batches = plan_batches(np.diff(starts), batch_tokens)
    largest = max(int(np.diff(starts)[b].sum()) for b in batches)
    sink = StagedSink(out, stored, OverflowCount(stored, len(ids)), buffers, largest)
    with capturer.hooked(sink.put) as forward:
        for windows in batches:
            batch, ids_bt, mask_bt = make_batch(ids, starts, windows)
            sink.begin(batch)
            forward(ids_bt, mask_bt)
            sink.end()
        sink.finish()
    return out


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stream", [SynchronousStream, LateStream])
def test_staged_rows_are_the_same_bits(stored, stream):
    capturer = Capturer(load_model(cached("gpt_neox")), ["*"])
    buffers = StagingBuffers(torch.device("cpu"), stream())
    # Units of growing and shrinking size, one window and many, on the same buffers.
    for seed, lengths in enumerate([(5, 1, 9, 9, 2), (30,), (40, 20, 40, 3, 3, 3, 3, 60), (7, 7)]):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 512, sum(lengths)).astype(np.int32)
        starts = np.cumsum([0, *lengths])
        for batch_tokens in (1, 18, 4096):
            direct = arrays(capturer, len(ids), stored)
            capturer.capture_unit(ids, starts, direct, batch_tokens=batch_tokens, stored_dtype=stored)
            got = staged(capturer, ids, starts, stored, buffers, batch_tokens)
            for name in direct:
                assert np.array_equal(got[name].view(np.uint8), direct[name].view(np.uint8)), (
                    name,
                    lengths,
                    batch_tokens,
                )
    if stream is LateStream:
        assert buffers.stream.under_way == 0
        # Two buffers take turns: one copy is under way while the next batch is computed.
        assert buffers.stream.most_under_way == 2


def test_a_unit_that_was_given_up_leaves_nothing_in_the_buffers():
    capturer = Capturer(load_model(cached("gpt2")), ["embed"])
    buffers = StagingBuffers(torch.device("cpu"), LateStream())
    ids, starts = np.arange(20, dtype=np.int32), np.array([0, 10, 20])
    given_up = arrays(capturer, 20, "float32")
    sink = StagedSink(given_up, "float32", OverflowCount("float32", 20), buffers, 10)
    with capturer.hooked(sink.put) as forward:
        batch, ids_bt, mask_bt = make_batch(ids, starts, np.array([0]))
        sink.begin(batch)
        forward(ids_bt, mask_bt)
        sink.end()
    expected = arrays(capturer, 20, "float32")
    capturer.capture_unit(ids, starts, expected, batch_tokens=10, stored_dtype="float32")
    got = staged(capturer, ids, starts, "float32", buffers, 10)
    assert np.array_equal(got["embed"], expected["embed"])
    assert not given_up["embed"].any()


def test_staged_overflow_is_counted():
    loaded = load_model(cached("gpt2"))
    loaded.model.wte.weight[7, 3] = 1e5
    loaded.model.wte.weight[8, 2] = -7e4
    loaded.model.wte.weight[9, 2] = torch.inf
    capturer = Capturer(loaded, ["embed"])
    ids, starts = np.array([7, 8, 7, 1, 9], np.int32), np.array([0, 1, 5])
    with pytest.raises(InvalidInputError, match="embed: 3 values, the largest 100000") as caught:
        staged(capturer, ids, starts, "float16", StagingBuffers(torch.device("cpu"), LateStream()), 1)
    assert caught.value.kind is ErrorKind.OVERFLOW


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_tensors_share_the_arrays_memory(stored):
    array = np.zeros((2, 3), np.uint16 if stored == "bfloat16" else stored)
    as_tensor(array, stored)[1, 2] = -2.0
    # Sign and top exponent bit: -2 in all three formats.
    assert array.view(np.uint8).reshape(6, -1)[5, -1] == 0xC0
    assert np.count_nonzero(array) == 1


@pytest.mark.parametrize("stream", [SynchronousStream, LateStream])
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_hook_points_of_different_types_in_one_buffer(stream, compute, stored):
    """This router computes in float32 whatever the model does: its logits are not rounded to the model's type first."""
    loaded = load_model(cached("deepseek_v3"), dtype=compute)
    capturer = Capturer(
        loaded, ["layers.1.router", "layers.1.resid_mid", "layers.{1,2}.resid_post", "final_norm"]
    )
    types = {}
    ids, starts = np.arange(40, 72, dtype=np.int32), np.array([0, 5, 14, 32])
    with capturer.hooked(lambda name, x: types.update({name: x.dtype})) as forward:
        forward(ids[None].astype(np.int64), None)
    assert types["layers.1.router"] == torch.float32 != types["layers.1.resid_post"]
    direct = arrays(capturer, len(ids), stored)
    capturer.capture_unit(ids, starts, direct, batch_tokens=64, stored_dtype=stored)
    buffers = StagingBuffers(torch.device("cpu"), stream())
    got = staged(capturer, ids, starts, stored, buffers, 64)
    for name in direct:
        assert np.array_equal(got[name].view(np.uint8), direct[name].view(np.uint8)), name
    if stored == "float32":
        # The weights' type has fewer digits than these logits.
        narrow = torch.from_numpy(direct["layers.1.router"]).to(getattr(torch, compute)).float().numpy()
        assert (narrow != direct["layers.1.router"]).mean() > 0.9
        wide = torch.from_numpy(direct["layers.1.resid_post"])
        assert torch.equal(wide.to(getattr(torch, compute)).float(), wide)


def directly(capturer, ids, starts):
    out = arrays(capturer, len(ids), "float16")
    capturer.capture_unit(ids, starts, out, batch_tokens=64, stored_dtype="float16")


def through_a_buffer(capturer, ids, starts):
    staged(capturer, ids, starts, "float16", StagingBuffers(torch.device("cpu"), LateStream()), 64)


@pytest.mark.parametrize("store", [directly, through_a_buffer])
def test_float32_logits_of_a_float16_model_can_overflow(store):
    loaded = load_model(cached("deepseek_v3"), dtype="float16")
    loaded.model.layers[1].mlp.gate.weight.mul_(2.0**17)
    capturer = Capturer(loaded, ["layers.1.router", "layers.1.resid_mid"])
    ids, starts = np.arange(9, dtype=np.int32), np.array([0, 4, 9])
    wide = arrays(capturer, 9, "float32")
    capturer.capture_unit(ids, starts, wide, batch_tokens=64, stored_dtype="float32")
    count = int((np.abs(wide["layers.1.router"]) >= 65520).sum())
    assert count > 0
    with pytest.raises(InvalidInputError, match=rf"\(layers.1.router: {count} values, the largest") as caught:
        store(capturer, ids, starts)
    assert caught.value.kind is ErrorKind.OVERFLOW
