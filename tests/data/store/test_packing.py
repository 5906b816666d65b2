"""Token ids in few bits: what is packed is what any other packer of bits would write, and it comes back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.store.packing import id_bits, pack_ids, packed_bytes, unpack_ids

WIDTHS = range(1, 26)


def packed_by_numpy(ids: np.ndarray, bits: int) -> np.ndarray:
    """The definition: the bits of each id, lowest first, one id after the other, filled up to whole bytes."""
    ones = (ids[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(ones.reshape(len(ids), ids.shape[1] * bits).astype(np.uint8), axis=1, bitorder="little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_and_count_is_packed_as_defined(bits: int):
    rng = np.random.default_rng(bits)
    for count in (*range(18), 50, 64):
        ids = rng.integers(0, 1 << bits, (5, count))
        packed = pack_ids(ids, bits)
        assert packed.dtype == np.uint8 and packed.shape == (5, packed_bytes(count, bits))
        assert packed.flags.c_contiguous
        np.testing.assert_array_equal(packed, packed_by_numpy(ids, bits))
        found = unpack_ids(packed, count, bits)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, ids)


@pytest.mark.parametrize("bits", WIDTHS)
def test_ids_of_all_ones_and_all_zeros_do_not_touch_their_neighbours(bits: int):
    largest = (1 << bits) - 1
    for first in (0, largest):
        ids = np.where(np.arange(35) % 2, first, largest - first).reshape(5, 7)
        np.testing.assert_array_equal(unpack_ids(pack_ids(ids, bits), 7, bits), ids)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(1, 25),
    rows=st.integers(0, 5),
    count=st.integers(0, 70),
    dtype=st.sampled_from(["int64", "int32", "uint32"]),
    seed=st.integers(0, 2**16),
)
def test_any_ids_come_back(bits: int, rows: int, count: int, dtype: str, seed: int):
    ids = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(dtype)
    packed = pack_ids(ids, bits)
    np.testing.assert_array_equal(packed, packed_by_numpy(ids.astype(np.int64), bits))
    np.testing.assert_array_equal(unpack_ids(packed, count, bits), ids)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 0)])
def test_nothing_takes_no_bytes(shape: tuple[int, int]):
    packed = pack_ids(np.zeros(shape, np.int64), 18)
    assert packed.shape == (shape[0], packed_bytes(shape[1], 18)) and packed_bytes(0, 18) == 0
    assert unpack_ids(packed, shape[1], 18).shape == shape


def test_ids_may_lie_apart_in_memory_and_packed_bytes_may_be_read_only():
    ids = np.arange(60).reshape(6, 10)[::2, ::3]
    packed = pack_ids(ids, 6)
    packed.flags.writeable = False
    np.testing.assert_array_equal(unpack_ids(packed, 4, 6), ids)
    every_second = np.repeat(packed, 2, axis=0)[::2]
    np.testing.assert_array_equal(unpack_ids(every_second, 4, 6), ids)


@pytest.mark.parametrize("bits", WIDTHS)
def test_ids_that_do_not_fit_are_refused(bits: int):
    for wrong in (-1, 1 << bits):
        with pytest.raises(ValueError, match=f"do not fit into {bits} bits"):
            pack_ids(np.array([[0, wrong]]), bits)


def test_a_vocabulary_takes_the_bits_of_its_last_id():
    sizes = (1, 2, 3, 4, 5, 256, 257, 151_936, 152_064, 156_032, 1 << 25)
    assert [id_bits(size) for size in sizes] == [1, 1, 2, 2, 3, 8, 9, 18, 18, 18, 25]
    assert packed_bytes(64, 18) == 144 and packed_bytes(1, 18) == 3
