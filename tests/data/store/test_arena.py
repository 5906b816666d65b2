"""Memory that is used again: nothing new is taken once a batch has been seen, and nobody shares with another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.store.arena import Arena, Ring
from kdpipe.data.store.reader import PartReader

from .conftest import World

SHAPES = [((3, 5), "float16"), ((), "int64"), ((7,), "uint8"), ((0, 4), "float32"), ((2, 3, 4), "int64")]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def batch(arena: Arena, times: int = 1) -> list[np.ndarray]:
    return [arena.take(shape, dtype) for _ in range(times) for shape, dtype in SHAPES]


def test_arrays_are_what_was_asked_for_and_share_nothing():
    arena = Arena()
    for _ in range(3):
        arrays = batch(arena, 3)
        for number, (array, (shape, dtype)) in enumerate(zip(arrays, SHAPES * 3, strict=True)):
            assert array.shape == shape and array.dtype == dtype
            assert array.flags.writeable and array.flags.c_contiguous and array.flags.aligned
            array[...] = number
        for number, array in enumerate(arrays):
            assert (array == number).all()
        arena.reset()


def test_the_same_batch_again_takes_the_same_memory():
    arena = Arena()
    batch(arena)
    arena.reset()
    size = arena.size
    first = [address(array) for array in batch(arena)]
    for _ in range(5):
        arena.reset()
        assert [address(array) for array in batch(arena)] == first
    assert arena.size == size


def test_a_larger_batch_is_served_at_once_and_from_the_buffer_next_time():
    arena = Arena()
    batch(arena)
    arena.reset()
    size = arena.size
    arrays = batch(arena, 50)
    assert arena.size == size, "it does not grow while arrays of it are out"
    for number, array in enumerate(arrays):
        array[...] = number % 100
    assert all((array == number % 100).all() for number, array in enumerate(arrays))
    arena.reset()
    assert arena.size > size
    low = min(address(array) for array in batch(arena, 50) if array.size)
    arena.reset()
    grown = arena.size
    spans = [(address(array) - low, array.nbytes) for array in batch(arena, 50) if array.size]
    assert all(start >= 0 and start + length <= grown for start, length in spans)
    arena.reset()
    batch(arena)
    arena.reset()
    assert arena.size == grown, "a small batch does not give memory back"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(["uint8", "float16", "float32", "int64"])), max_size=12))
def test_every_array_starts_on_a_cache_line_and_the_second_time_all_fit(wanted: list[tuple[int, str]]):
    arena = Arena()
    for round_ in range(3):
        arrays = [arena.take((rows,), dtype) for rows, dtype in wanted]
        taken = sorted((address(array), array.nbytes) for array in arrays if array.size)
        assert all(start + size <= after for (start, size), (after, _) in pairwise(taken))
        if round_:
            assert all(start % 64 == 0 for start, _ in taken)
            assert not taken or taken[-1][0] + taken[-1][1] - taken[0][0] <= arena.size
        arena.reset()


def test_a_store_reads_into_it(world: World):
    part, arena = PartReader(world.path), Arena()
    for _ in range(3):
        for row, arrays in enumerate(world.arrays.values()):
            for name, array in arrays.items():
                out = arena.take(array.shape, array.dtype)
                part.read_into(row, name, out)
                np.testing.assert_array_equal(out, array)
        arena.reset()


def test_an_arena_that_was_released_is_taken_again():
    ring = Ring()
    first, second = ring.acquire(), ring.acquire()
    assert first is not second
    batch(first)
    ring.release(first)
    assert ring.acquire() is first and first.size > 0
    assert ring.acquire() not in (first, second)


def test_no_two_threads_hold_one_arena():
    ring, together = Ring(), Barrier(6)
    seen: set[int] = set()

    def work(number: int) -> bool:
        good = True
        together.wait()
        for step in range(100):
            arena = ring.acquire()
            seen.add(id(arena))
            arrays = [arena.take((1 + (number + step) % 50,), "int64") for _ in range(4)]
            for array in arrays:
                array[:] = number
            good &= all((array == number).all() for array in arrays)
            ring.release(arena)
        return good

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert len(seen) <= 6 and len(ring._free) == len(seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned_memory_is_pinned():
    arena = Ring(pinned=True).acquire()
    arena.take((100,), "float32")
    arena.reset()
    array = arena.take((100,), "float32")
    assert torch.from_numpy(array).is_pinned() and address(array) % 64 == 0
