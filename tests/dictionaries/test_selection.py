"""Which latents are chosen, against sorting, with as many ties as can be."""

import numpy as np
import pytest
import torch

from actstore.ingest.dictionaries.selection import select_above, select_group_max, select_top_k
from tests.dictionaries.make import top_k


def dense(selected, shape: tuple[int, int]) -> np.ndarray:
    rows, latents = selected.rows.numpy(), selected.latents.numpy()
    flat = rows * shape[1] + latents
    assert (np.diff(flat) > 0).all()  # by row, then by latent, none twice
    found = np.zeros(shape, np.float32)
    found[rows, latents] = selected.values.numpy()
    return found


@pytest.mark.parametrize("levels", [2, 3, 10, 1000])
@pytest.mark.parametrize(
    ("n_latents", "k"), [(1, 1), (7, 3), (7, 7), (64, 1), (100, 5), (1000, 32), (1023, 30), (4096, 32)]
)
def test_top_k_with_ties(n_latents: int, k: int, levels: int) -> None:
    rng = np.random.default_rng([n_latents, k, levels])
    pre = rng.integers(-levels // 4, levels, size=(40, n_latents)).astype(np.float32)
    pre[0], pre[1], pre[2] = 0, -1, 5
    pre[3] = np.sort(pre[3])
    found = dense(select_top_k(torch.from_numpy(pre), k), pre.shape)
    np.testing.assert_array_equal(found, top_k(pre, k))


def test_top_k_without_ties() -> None:
    rng = np.random.default_rng(0)
    for n_latents, k in ((300, 8), (2048, 64), (5000, 20)):
        pre = rng.normal(size=(50, n_latents)).astype(np.float32)
        np.testing.assert_array_equal(dense(select_top_k(torch.from_numpy(pre), k), pre.shape), top_k(pre, k))


def test_top_k_of_few_positive_values() -> None:
    pre = np.full((3, 4096), -1.0, np.float32)
    pre[1, [5, 4000]] = 2, 3
    pre[2, ::1000] = 1
    found = dense(select_top_k(torch.from_numpy(pre), 32), pre.shape)
    np.testing.assert_array_equal(found, np.maximum(pre, 0))


def test_equal_values_in_one_group_and_across_groups() -> None:
    """Latents i and i + n_groups share a group: all of the largest in one, and one of the largest in each."""
    pre = np.zeros((2, 4096), np.float32)
    pre[0, 17::256] = 1  # 16 in one group
    pre[1, :300] = 1
    for k in (1, 8, 15, 16, 32):
        np.testing.assert_array_equal(dense(select_top_k(torch.from_numpy(pre), k), pre.shape), top_k(pre, k))


def test_above_a_threshold() -> None:
    rng = np.random.default_rng(1)
    pre = rng.integers(-3, 5, size=(33, 77)).astype(np.float32)
    threshold = rng.integers(0, 4, size=77).astype(np.float32)
    flags = torch.ones(33, 77, dtype=torch.bool)
    found = select_above(torch.from_numpy(pre), torch.from_numpy(threshold), flags)
    np.testing.assert_array_equal(dense(found, pre.shape), np.where(pre > threshold, pre, 0))
    nothing = select_above(torch.from_numpy(pre[:0]), torch.from_numpy(threshold), flags[:0])
    assert len(nothing.values) == 0


def test_group_max_takes_the_first_of_equal_values() -> None:
    pre = torch.tensor([[1.0, 1, 0, -1, -2, -3, 2, 5, 5]])
    found = dense(select_group_max(pre, 3), (1, 9))
    np.testing.assert_array_equal(found, [[1, 0, 0, 0, 0, 0, 0, 5, 0]])
