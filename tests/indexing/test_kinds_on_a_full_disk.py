"""Temporary files of a shard that do not fit: a named error, and nothing is left to fill the disk further."""

import os
import resource
import tempfile

import numpy as np
import pytest

from actstore.errors import ErrorKind, StorageError
from actstore.ingest.indexing.kinds import index_kind


@pytest.fixture
def small_files(tmp_path, monkeypatch):
    """No file may be over 16 KiB, and temporary ones are in a folder that the test sees; Python ignores the signal."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq"])
def test_what_cannot_be_written_leaves_nothing_behind(small_files, kind):
    rows = np.random.default_rng(0).standard_normal((4000, 32)).astype(np.float32)
    one = index_kind(kind)
    trained = one.train(rows[:500], n_rows=4000, metric="l2", seed=0, params={"n_lists": 4, "bits": 1})
    with pytest.raises(StorageError, match="name a larger folder with TMPDIR") as caught:
        one.build_shard(trained, iter([(np.arange(len(rows)), rows)]), len(rows))
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert os.listdir(small_files) == []
