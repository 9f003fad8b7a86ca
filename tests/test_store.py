"""Opening, pinning and pickling a store; checked local copies of its objects; documents by number."""

import os
import pickle
import random
import uuid

import numpy as np
import pytest

import actstore
from actstore import ErrorKind, FormatError, NotFoundError
from actstore.ingest import import_corpus
from actstore.ingest import run as run_ingest
from actstore.objects import ObjectReader
from actstore.storage import MemoryStorage, write_new
from tests.ingest import synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    url = str(folder / "s")
    tokenizer = synthetic.make_corpus(url, folder / "tokenizer", n_documents=20)
    run_ingest(url, synthetic.config(tokenizer), backend=synthetic.SyntheticBackend())
    return url


def test_there_must_be_a_store(tmp_path):
    with pytest.raises(NotFoundError) as caught:
        actstore.open(tmp_path / "nothing")
    assert caught.value.kind is ErrorKind.STORE_NOT_FOUND
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError):
        actstore.open(tmp_path / "empty")


def test_a_pinned_store_does_not_move(tmp_path):
    url = str(tmp_path / "s")
    first = actstore.open(url, create=True)
    import_corpus(url, "a", ["one", "two"])
    assert first.version == 0
    assert first.corpora() == []
    second = first.latest()
    assert [c.id for c in second.corpora()] == ["a"]
    import_corpus(url, "b", ["three"])
    assert [c.id for c in second.corpora()] == ["a"]
    assert [c.id for c in actstore.open(url, version=second.version).corpora()] == ["a"]
    assert [c.id for c in second.refresh().corpora()] == ["a", "b"]
    assert second.at(0).corpora() == []


def test_names_that_are_not_there_are_answered_with_those_that_are(made):
    store = actstore.open(made)
    with pytest.raises(NotFoundError, match="syn"):
        store.run("sny")
    with pytest.raises(NotFoundError, match="words"):
        store.corpus("wrods")
    with pytest.raises(NotFoundError, match=r"layers\.1\.mlp_act"):
        store.run("syn").activations("layers.7.mlp_act")


def test_a_store_and_its_runs_pickle(made):
    store = actstore.open(made)
    again = pickle.loads(pickle.dumps(store))
    assert (again.url, again.version) == (store.url, store.version)
    acts = pickle.loads(pickle.dumps(store.run("syn").activations("layers.1.mlp_act")))
    np.testing.assert_array_equal(acts[:], store.run("syn").activations("layers.1.mlp_act")[:])


def test_documents_by_number(tmp_path):
    url = str(tmp_path / "s")
    texts = [f"document {i} " * (i % 50) for i in range(3000)]
    import_corpus(url, "c", [{"text": t, "n": i} for i, t in enumerate(texts)], part_bytes=100_000)
    corpus = actstore.open(url).corpus("c")
    assert len(corpus.parts) > 3
    rng = random.Random(0)
    wanted = [rng.randrange(3000) for _ in range(200)]
    table = corpus.documents(wanted, ["n", "text"])
    assert table["doc_id"].to_pylist() == table["n"].to_pylist() == wanted
    assert table["text"].to_pylist() == [texts[i] for i in wanted]
    assert corpus.documents([], ["text"]).num_rows == 0
    assert corpus.documents([]).schema == corpus.documents([0]).schema
    with pytest.raises(NotFoundError, match=r"3000"):
        corpus.documents([5, 3000])


def test_a_store_never_moves_back_when_threads_refresh_it(tmp_path):
    url = str(tmp_path / "s")
    store = actstore.open(url, create=True)

    class Overtaken:
        """A log whose first answer comes late: another thread has refreshed the store to a newer version meanwhile."""

        def __init__(self, log):
            self.log, self.asked = log, False

        def refresh(self, state):
            found = self.log.refresh(state)
            if not self.asked:
                self.asked = True
                import_corpus(url, "b", ["three"])
                store.refresh()
            return found

    import_corpus(url, "a", ["one", "two"])
    store.log = Overtaken(store.log)
    assert [c.id for c in store.refresh().corpora()] == ["a", "b"]
    assert store.version == 2


class TestLocalCopies:
    """Objects of a storage without files."""

    @pytest.fixture
    def reader(self, tmp_path):
        self.storage = MemoryStorage(f"copies-{uuid.uuid4().hex}")
        return ObjectReader(self.storage, cache_dir=tmp_path / "cache", cache_bytes=3000)

    def make(self, n, size=1000):
        rng = np.random.default_rng(n)
        return write_new(self.storage, f"corpora/c/documents/{n}", [rng.bytes(size)])

    def test_a_copy_is_checked_and_reused(self, reader):
        obj = self.make(1)
        path = reader.file(obj)
        with open(path, "rb") as file:
            assert file.read() == reader.read(obj)
        stat = os.stat(path)
        assert reader.file(obj) == path
        assert os.stat(path).st_ino == stat.st_ino

    def test_a_damaged_copy_is_fetched_again(self, reader):
        obj = self.make(1)
        path = reader.file(obj)
        with open(path, "r+b") as file:
            file.write(b"damage")
        with open(reader.file(obj), "rb") as file:
            assert file.read() == reader.read(obj)

    def test_copies_are_bounded(self, reader, tmp_path):
        for n in range(8):
            reader.file(self.make(n))
            sizes = [e.stat().st_size for e in os.scandir(tmp_path / "cache")]
            assert sum(sizes) <= 3000
        large = self.make(99, size=5000)
        assert os.path.getsize(reader.file(large)) == 5000

    def test_copies_of_one_call_stay_together(self, reader):
        objects = [self.make(n) for n in range(8)]
        first = reader.file(objects[0])
        paths = reader.files(objects)
        assert paths[0] == first
        for path, obj in zip(paths, objects, strict=True):
            with open(path, "rb") as file:
                assert file.read() == reader.read(obj)

    def test_only_copies_are_ever_deleted(self, reader, tmp_path):
        cache = tmp_path / "cache"
        (cache / "folder").mkdir(parents=True)
        for name in ("thesis.tex", "0123abcd"):
            (cache / name).write_bytes(b"x" * 5000)
            os.utime(cache / name, (0, 0))  # older than any copy
        (cache / ".fetch-left-by-a-crash").write_bytes(b"x" * 5000)
        os.utime(cache / ".fetch-left-by-a-crash", (0, 0))
        for n in range(5):
            reader.file(self.make(n))
        names = {path.name for path in cache.iterdir()}
        assert {"thesis.tex", "0123abcd", "folder"} <= names
        assert ".fetch-left-by-a-crash" not in names
        assert sum(path.stat().st_size for path in cache.iterdir() if len(path.name) == 64) <= 3000

    def test_what_is_gone_or_changed_is_named(self, reader):
        obj = self.make(1)
        self.storage.delete(obj.key)
        with pytest.raises(FormatError) as caught:
            reader.file(obj)
        assert caught.value.kind is ErrorKind.OBJECT_MISSING
        assert obj.key in str(caught.value)
        self.storage.put_new(obj.key, [b"x" * 1000])
        with pytest.raises(FormatError) as caught:
            reader.file(obj)
        assert caught.value.kind is ErrorKind.OBJECT_DAMAGED
