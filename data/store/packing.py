"""Token ids in as many bits as the vocabulary needs: 18 for one of 152,000.

Shape suffixes: R rows, n ids of a row, B bytes of a packed row.

Id j of a row occupies bits `j * bits` to `(j + 1) * bits` of its bytes, bit 0 being the lowest of the first byte. A row
starts on a byte of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_WORD = 4  # bytes that one id with its shift may touch, so ids have at most 25 bits


def id_bits(vocabulary: int) -> int:
    """Bits that ids below `vocabulary` need."""
    return max(1, (vocabulary - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed ids."""
    return -(-count * bits // 8)


def pack_ids(ids_Rn: np.ndarray, bits: int) -> np.ndarray:
    """Packs ids.

    Args:
        ids_Rn: [R, n] of any integer dtype, each from 0 and below `2 ** bits`.
        bits: of an id, at most 25.

    Returns:
        uint8 [R, packed_bytes(n, bits)].

    Raises:
        ValueError: an id does not fit.
    """
    rows, count = ids_Rn.shape
    if ids_Rn.size and not 0 <= int(ids_Rn.min()) <= int(ids_Rn.max()) < 1 << bits:
        raise ValueError(f"ids from {ids_Rn.min()} to {ids_Rn.max()} do not fit into {bits} bits")
    packed_RB = np.zeros((rows, packed_bytes(count, bits) + _WORD), np.uint8)
    for first, period, byte, step, shift in _phases(bits):
        words = np.ascontiguousarray(ids_Rn[:, first::period]).astype("<u4") << np.uint32(shift)
        parts = words.view(np.uint8).reshape(rows, words.shape[1], _WORD)
        for place in range(_WORD):
            stop = byte + place + (parts.shape[1] - 1) * step + 1
            if parts.shape[1]:
                packed_RB[:, byte + place : stop : step] |= parts[:, :, place]
    return np.ascontiguousarray(packed_RB[:, : packed_bytes(count, bits)])


def unpack_ids(packed_RB: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Ids int64 [R, count] from what `pack_ids` made, uint8 [R, packed_bytes(count, bits)]."""
    rows, width = packed_RB.shape
    phases = _phases(bits)
    _, period, _, step, _ = phases[0]
    if step >= 8 and count % period == 0 and packed_RB.size and packed_RB.flags.c_contiguous:
        return _unpack_periods(packed_RB.reshape(-1), bits, period, step).reshape(rows, count)
    flat = np.zeros(packed_RB.size + _WORD, np.uint8)
    flat[: packed_RB.size] = packed_RB.reshape(-1)
    words = np.ndarray((rows, width), "<u4", flat, strides=(width, 1))
    ids_Rn = np.empty((rows, count), np.int64)
    mask = np.uint32((1 << bits) - 1)
    for first, period, byte, step, shift in phases:
        here = ids_Rn[:, first::period]
        taken = words[:, byte::step][:, : here.shape[1]] >> np.uint32(shift)
        taken &= mask
        here[...] = taken
    return ids_Rn


def _unpack_periods(flat: np.ndarray, bits: int, period: int, step: int) -> np.ndarray:
    """Ids of bytes that hold whole periods: `period` ids in `step` bytes, through one or a few words of 8 bytes."""
    count = len(flat) // step
    ids_cp = np.empty((count, period), np.uint64)
    words, last = np.empty(0, np.uint64), -1
    for place in range(period):
        bit = place * bits
        byte = 0 if bit + bits <= 64 else min(bit // 8, step - 8)
        if byte != last:
            words, last = np.ndarray((count,), "<u8", flat, byte, (step,)).copy(), byte
        if bit == 8 * byte:
            ids_cp[:, place] = words
        else:
            np.right_shift(words, np.uint64(bit - 8 * byte), out=ids_cp[:, place])
    ids_cp &= np.uint64((1 << bits) - 1)
    return ids_cp.view(np.int64)


@lru_cache(maxsize=32)
def _phases(bits: int) -> list[tuple[int, int, int, int, int]]:
    """Ids whose bits lie alike: (first id, distance of ids, first byte, distance of bytes, shift within it)."""
    assert 1 <= bits <= 25
    common = math.gcd(bits, 8)
    period, step = 8 // common, bits // common
    return [(p, period, p * bits // 8, step, p * bits % 8) for p in range(period)]
