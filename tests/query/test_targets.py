import numpy as np
import pytest

import actstore
from actstore.errors import ActstoreError, InvalidInputError, NotFoundError
from actstore.targets import Direction, Latent, Neuron, load_vectors, parse_target

H = "layers.3.resid_post"


def test_aliases_are_one_target():
    assert actstore.neuron("blocks.3.hook_resid_post", 7) == actstore.neuron(H, 7) == Neuron(H, 7)
    assert parse_target("neuron:blocks.3.hook_resid_post:7") == Neuron(H, 7)
    assert parse_target("neuron:module:model.x.y:output:7").index == 7
    assert parse_target("latent:sae:12") == actstore.latent("sae", 12) == Latent("sae", 12)


def test_directions_are_values():
    given = np.arange(3.0)
    a = actstore.direction(H, given, name="d")
    given[:] = 9
    assert a.vector.tolist() == [0, 1, 2]
    assert not a.vector.flags.writeable
    assert a == actstore.direction(H, [0, 1, 2], name="d")
    assert hash(a) == hash(actstore.direction(H, [0, 1, 2], name="d"))
    assert a != actstore.direction(H, [0, 1, 3], name="d")
    assert a != 3
    assert a.label == f"direction:{H}:d"
    assert actstore.direction(H, np.float16([1, 2])).vector.dtype == np.float64


@pytest.mark.parametrize(
    "vector",
    [[], [0, 0], [np.nan, 1], [np.inf], [[1, 2]], ["a"], [1j], None, "abc", [[1], [2, 3]], [True, False]],
)
def test_what_is_no_direction(vector):
    with pytest.raises(InvalidInputError):
        actstore.direction(H, vector)


@pytest.mark.parametrize("index", [-1, 1.5, "3", None, True, 2**40])
def test_what_is_no_index(index):
    with pytest.raises(InvalidInputError):
        actstore.neuron(H, index)
    with pytest.raises(InvalidInputError):
        actstore.latent("sae", index)


@pytest.mark.parametrize(
    "text",
    ["", "neuron", "neuron:", "neuron::3", f"neuron:{H}", f"neuron:{H}:", f"neuron:{H}:x", f"neuron:{H}:-1", f"neuron:{H}:1e3",
     f"neuron:{H}:٣", "axon:x:1", "latent:../x:1", "latent:s:", f"neuron:{H}:99999999999",
     f"direction:{H}:/no/such/file.npy"],
)  # fmt: skip
def test_what_is_no_target(text):
    with pytest.raises(ActstoreError):
        parse_target(text)


def test_vector_files(tmp_path):
    np.save(tmp_path / "v.npy", np.float32([1, 2, 3]))
    target = parse_target(f"direction:{H}:{tmp_path}/v.npy")
    assert isinstance(target, Direction)
    assert target.vector.tolist() == [1, 2, 3]
    assert target.name == "v"
    np.save(tmp_path / "m.npy", np.ones((2, 3)))
    assert load_vectors(tmp_path / "m.npy").shape == (2, 3)
    with pytest.raises(InvalidInputError):
        parse_target(f"direction:{H}:{tmp_path}/m.npy")
    with pytest.raises(NotFoundError):
        load_vectors(tmp_path / "absent.npy")


class Trap:
    def __reduce__(self):
        return (open, ("/tmp/actstore-trap", "w"))


def test_no_pickle_is_ever_loaded(tmp_path):
    np.save(tmp_path / "p.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "z.npz", a=np.ones(3))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "p.npy").read_bytes()[:40])
    np.save(tmp_path / "s.npy", np.array(["a"]))
    for name in ("p.npy", "z.npz", "empty.npy", "text.npy", "cut.npy", "s.npy"):
        with pytest.raises(InvalidInputError):
            load_vectors(tmp_path / name)
    with pytest.raises(ActstoreError):
        load_vectors(tmp_path)
