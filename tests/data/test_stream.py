"""The order of training: complete, repeatable, the same for any number of ranks, resumable at every step."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.errors import KdpipeError
from kdpipe.data.stream import Entry, Stream, StreamState, prefetch


def entries(lengths: dict[str, list[int]]) -> list[Entry]:
    return [Entry(f"{part}-{i}", part, length) for part, sizes in lengths.items() for i, length in enumerate(sizes)]


worlds = st.dictionaries(
    st.sampled_from("abcdefgh"), st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1
).map(entries)
settings_of = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "batch_tokens": st.integers(1, 120),
        "window_parts": st.integers(1, 9),
        "epochs": st.integers(1, 3),
    }
)


def make(samples: list[Entry], *, digest: str = "d", **options) -> Stream:
    return Stream(samples, digest=digest, **{"seed": 0, "batch_tokens": 60, "window_parts": 2, "epochs": 2, **options})


@given(worlds, settings_of)
def test_every_sample_comes_once_an_epoch(world, options):
    stream = make(world, **options)
    for epoch in range(options["epochs"]):
        found = Counter(sample for batch in stream.batches(epoch) for sample in batch)
        assert found == Counter(entry.id for entry in world)


@given(worlds, settings_of)
def test_batches_keep_the_budget_and_waste_little(world, options):
    length = {entry.id: entry.length for entry in world}
    budget = options["batch_tokens"]
    batches = make(world, **options).batches(0)
    sums = [sum(length[sample] for sample in batch) for batch in batches]
    for batch, total in zip(batches, sums, strict=True):
        assert total <= budget or len(batch) == 1
        assert [length[sample] for sample in batch] == sorted((length[sample] for sample in batch), reverse=True)
    for batch, after, total in zip(batches, batches[1:], sums, strict=False):
        assert batch and total + max(length[sample] for sample in after) > budget


@given(worlds, settings_of, st.integers(1, 5))
def test_ranks_share_the_same_global_batches(world, options, ranks):
    alone = list(make(world, **options))
    shares = [list(make(world, **options, rank=rank, world=ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares} | {len(alone)}) == 1
    for step, (state, batch) in enumerate(alone):
        together: list[str | None] = [None] * len(batch)
        for rank, share in enumerate(shares):
            assert share[step][0] == state
            together[rank::ranks] = share[step][1]
        assert together == batch, "ranks put together give the exact list, not only the same set"


@settings(max_examples=30)
@given(worlds, settings_of, st.integers(1, 3))
def test_resuming_after_any_step_gives_the_rest(world, options, ranks):
    whole = list(make(world, **options, rank=ranks - 1, world=ranks))
    assert len(whole) == make(world, **options).total_steps()
    for step, (state, _) in enumerate(whole):
        saved = json.loads(json.dumps(state.as_dict()))
        stream = make(world, **options, rank=ranks - 1, world=ranks).resume(StreamState(**saved))
        assert list(stream) == whole[step + 1 :]
    start = StreamState("d", options["seed"], 0, 0)
    assert list(make(world, **options, rank=ranks - 1, world=ranks).resume(start)) == whole
    assert whole[-1][0] == StreamState("d", options["seed"], options["epochs"], 0)


@given(worlds, settings_of, st.randoms(use_true_random=False))
def test_the_order_of_the_entries_does_not_count(world, options, random):
    mixed = list(world)
    random.shuffle(mixed)
    assert list(make(mixed, **options)) == list(make(world, **options))


@given(worlds, settings_of)
def test_samples_stay_in_the_window_of_their_part(world, options):
    stream = make(world, **{**options, "batch_tokens": 1})  # one sample a batch: the bare order
    part = {entry.id: entry.part for entry in world}
    sizes = Counter(part.values())
    window: Counter[str] = Counter()
    for batch in stream.batches(0):
        window[part[batch[0]]] += 1
        assert len(window) <= options["window_parts"]
        if len(window) == options["window_parts"] and window == Counter({name: sizes[name] for name in window}):
            window.clear()


def test_the_order_is_this_one_in_every_version():
    """Golden: a checkpoint must go on after numpy or kdpipe was updated."""
    world = entries({part: [3, 5, 7] for part in ("p", "q", "r")})
    stream = make(world, seed=7, batch_tokens=16, digest="0123456789abcdef")
    assert [stream.batches(epoch) for epoch in range(2)] == [
        [["p-2", "p-0", "r-0"], ["p-1", "r-1"], ["r-2", "q-2"], ["q-1", "q-0"]],
        [["r-1", "p-1", "r-0"], ["r-2", "p-2"], ["q-2", "p-0", "q-0"], ["q-1"]],
    ]


def test_epochs_seeds_and_digests_give_other_orders():
    world = entries({part: list(range(1, 9)) for part in "abcdef"})
    orders = [
        make(world).batches(0),
        make(world).batches(1),
        make(world, seed=1).batches(0),
        make(world, digest="other").batches(0),
        make(world, window_parts=6).batches(0),
    ]
    assert len({str(order) for order in orders}) == len(orders)


def test_a_permutation_favours_no_place():
    """Chi-squared over the place of each of 8 samples in 2000 epochs; 49 degrees of freedom, p = 1e-6 at 118."""
    world = entries({"a": [1] * 8})
    stream = make(world, batch_tokens=1, epochs=2000)
    counts = Counter((place, batch[0]) for epoch in range(2000) for place, batch in enumerate(stream.batches(epoch)))
    assert sum((counts[place, f"a-{i}"] - 250) ** 2 / 250 for place in range(8) for i in range(8)) < 118


def test_steps_are_counted():
    stream = make(entries({"a": [30, 30, 30, 100], "b": [20] * 4}), epochs=3)
    assert [stream.steps_in(epoch) for epoch in range(3)] == [len(stream.batches(epoch)) for epoch in range(3)]
    assert stream.total_steps() == sum(stream.steps_in(epoch) for epoch in range(3)) == len(list(stream))
    assert stream.total_steps(5) == 5 and stream.total_steps(10**9) == stream.total_steps()


def test_iterating_again_starts_where_the_stream_was_set():
    stream = make(entries({"a": [30] * 6}))
    assert list(stream) == list(stream)
    stream.resume(next(iter(stream))[0])
    assert list(stream) == list(stream)
    assert len(list(stream)) == stream.total_steps() - 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (StreamState("other", 0, 0, 0), "samples other with seed 0, and this run has samples d with seed 0"),
        (StreamState("d", 1, 0, 0), "with seed 1"),
        (StreamState("d", 0, 0, 99), "batch 99 of epoch 0, which this run does not have"),
        (StreamState("d", 0, 3, 0), "epoch 3"),
        (StreamState("d", 0, 2, 1), "batch 1 of epoch 2"),
        (StreamState("d", 0, -1, 0), "epoch -1"),
        (StreamState("d", 0, 0, -1), "batch -1"),
    ],
)
def test_states_of_other_streams_are_refused(state: StreamState, message: str):
    with pytest.raises(KdpipeError, match=f"{message}.*remove the checkpoint to start anew|{message}.*Remove the"):
        make(entries({"a": [30] * 6})).resume(state)


def test_a_finished_stream_gives_nothing_more():
    assert list(make(entries({"a": [30] * 6})).resume(StreamState("d", 0, 2, 0))) == []


def test_wrong_streams_are_refused():
    with pytest.raises(KdpipeError, match="nothing to train on"):
        make([])
    with pytest.raises(KdpipeError, match="share an id"):
        make([Entry("s", "a", 1), Entry("s", "b", 1)])
    for wrong in ({"batch_tokens": 0}, {"window_parts": 0}, {"epochs": 0}, {"world": 0}, {"rank": 1}, {"rank": -1}):
        with pytest.raises(ValueError, match="rank"):
            make(entries({"a": [1]}), **wrong)


def test_a_hundred_thousand_samples_are_ordered_in_a_moment():
    world = [Entry(f"s{i}", f"p{i // 256}", 100 + i % 400) for i in range(100_000)]
    stream = make(world, batch_tokens=16384, window_parts=8)
    start = time.perf_counter()
    assert sum(map(len, stream.batches(0))) == 100_000
    assert time.perf_counter() - start < 5


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kdpipe-prefetch")]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("depth", [1, 3, 50])
def test_prefetch_keeps_the_order_and_closes_its_threads(workers: int, depth: int):
    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(prefetch(range(20), slow, depth=depth, threads=workers)) == [n * n for n in range(20)]
    assert list(prefetch([], slow, depth=depth, threads=workers)) == []
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_loading_comes_in_its_place(workers: int):
    def load(number: int) -> int:
        if number == 3:
            raise KdpipeError("sample 3 is damaged")
        return number

    found = []
    with pytest.raises(KdpipeError, match="sample 3"):
        for value in prefetch(range(10), load, depth=4, threads=workers):
            found.append(value)
    assert found == [0, 1, 2]
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_items_comes_after_what_was_loaded(workers: int):
    def items() -> Iterator[int]:
        yield from range(3)
        raise RuntimeError("no more batches")

    found = []
    with pytest.raises(RuntimeError, match="no more batches"):
        for value in prefetch(items(), lambda number: number, depth=8, threads=workers):
            found.append(value)
    assert found == [0, 1, 2]
    assert threads() == []


def test_prefetch_reads_no_further_than_its_depth_and_stops_when_closed():
    started: list[int] = []
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    def load(number: int) -> int:
        started.append(number)
        return number

    ahead = prefetch(items(), load, depth=3, threads=2)
    assert next(ahead) == 0
    time.sleep(0.05)
    assert taken == [0, 1, 2]
    assert next(ahead) == 1
    ahead.close()  # type: ignore[attr-defined]
    assert threads() == []
    assert len(taken) <= 4 and set(started) <= set(taken)


def test_prefetch_loads_while_the_caller_works():
    begun = threading.Event()

    def load(number: int) -> int:
        if number == 1:
            begun.set()
        return number

    ahead = prefetch(range(3), load, depth=2, threads=1)
    assert next(ahead) == 0
    assert begun.wait(5), "the next item is loaded before it is asked for"
    assert list(ahead) == [1, 2]


def test_the_stream_through_threads_is_the_stream():
    world = entries({part: list(range(1, 30)) for part in "abc"})
    expected = list(make(world))
    for workers in (0, 1, 4):
        assert list(prefetch(make(world), lambda item: item, depth=3, threads=workers)) == expected


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_exact_order_is_one_for_all_ranks_threads_and_resumptions(ranks: int, threads: int):
    """What the ranks load, put together step by step, is the list of ids that one rank without threads gives."""
    world = entries({part: [7 + (3 * i + ord(part)) % 23 for i in range(9)] for part in "abcde"})
    states, whole = zip(*make(world, seed=3), strict=True)
    assert len(whole) > 20 and sum(map(len, whole)) == 2 * len(world)

    def loaded(rank: int, start: int) -> list[list[str]]:
        stream = make(world, seed=3, rank=rank, world=ranks)
        if start:
            stream.resume(StreamState(**states[start - 1].as_dict()))
        return list(prefetch(stream, lambda item: list(item[1]), depth=4, threads=threads))

    for start in range(len(whole)):
        shares = [loaded(rank, start) for rank in range(ranks)]
        together = []
        for parts in zip(*shares, strict=True):
            merged = [""] * sum(map(len, parts))
            for rank, mine in enumerate(parts):
                merged[rank::ranks] = mine
            together.append(merged)
        assert together == list(whole[start:])
