"""Vocabulary blocks, whose tails are kept apart."""

from __future__ import annotations

from itertools import pairwise

from kdpipe.data.errors import KdpipeError

_FIRST_BLOCK = 256


def block_bounds(valid: int, blocks: int) -> tuple[int, ...]:
    """Cuts ids 0 to `valid` into ranges that grow geometrically.

    BPE ids run roughly from frequent to rare, so the blocks are classes of frequency: the first holds at most 256 ids
    (the bytes), the bounds of the others have a constant ratio.

    Args:
        valid: ids there are.
        blocks: number of ranges B.

    Returns:
        B + 1 rising bounds, from 0 to `valid`.

    Raises:
        KdpipeError: there are more blocks than the ids can be cut into.
    """
    if blocks == 1:
        return (0, valid)
    first = min(_FIRST_BLOCK, max(1, valid // blocks))
    ratio = valid / first
    steps = range(blocks) if blocks <= valid else ()
    bounds = (0, *(round(first * ratio ** (step / (blocks - 1))) for step in steps))
    if blocks > valid or any(low >= high for low, high in pairwise(bounds)):
        raise KdpipeError(f"teachers.tail_blocks: {blocks} is too many for {valid} shared ids. Choose fewer.")
    return bounds
