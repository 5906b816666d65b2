"""Windows, parts and batches; adaptive entries, low-rank bases, vLLM as the teacher; what a failure leaves behind."""

import dataclasses
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.data.ledger import Ledger
from kdpipe.data.store.distributions import Layout
from kdpipe.stages.base import Wanted
from kdpipe.stages.cache_teachers import record, teach
from kdpipe.stages.cache_teachers.capture import Job
from kdpipe.stages.cache_teachers.served import Keep, distil
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import LayersConfig, WeightsConfig
from kdpipe.stages.models.inputs import Example

TOP_ONLY = WeightsConfig(layer=0, acoustic=0)


def want(sample: str) -> Wanted:
    return Wanted(sample, "textual", {"x": sample})


def job(sample: str, length: int, **cover) -> Job:
    return Job((want(sample),), (), Example(sample, [0] * length), cover)


def many(rows, count: int):
    return [{**rows[i % len(rows)], "id": f"m{i:03d}", "n": 1 + 7 * i % 40} for i in range(count)]


def test_windows_follow_the_manifest_and_not_what_is_left_of_it():
    places = {f"s{i}": i for i in range(200)}
    wants = [want(sample) for sample in places]
    whole = list(teach.windows(wants, places, 4))
    assert [len(window) for window in whole] == [64, 64, 64, 8]
    left = wants[5:60:3] + wants[130:]
    cut = list(teach.windows(left[::-1], places, 4))
    assert [[w.id for w in window] for window in cut] == [
        [w.id for w in window if w in left] for window in whole if set(map(id, window)) & set(map(id, left))
    ]
    assert list(teach.windows([], places, 4)) == []


def test_a_part_holds_what_is_stored_alike_from_short_to_long():
    jobs = [job("d", 9, k=8), job("a", 3, k=8), job("c", 3, k=8), job("b", 1, k=8), job("e", 1, k=16)]
    cut = [[j.example.id for j in part] for part in teach.parts(jobs, 3)]
    assert cut == [["e"], ["b", "a", "c"], ["d"]]


def test_batches_have_next_to_no_padding(begin, rows, tmp_path, monkeypatch):
    run = begin(tmp_path, rows=many(rows, 60), weights=TOP_ONLY, k=4, batch_tokens=900, part_samples=16)
    seen = []
    real = teach.Scribe.__call__

    def watch(self, batch):
        seen.append(batch.attention_mask)
        return real(self, batch)

    monkeypatch.setattr(teach.Scribe, "__call__", watch)
    run.bring_up()
    tokens, room = sum(int(mask.sum()) for mask in seen), sum(mask.numel() for mask in seen)
    assert len(seen) > 4 and tokens / room > 0.93


def test_adaptive_entries_reach_their_mass_and_lose_nothing(begin, full, rows, tmp_path):
    _, masked_log_softmax = full
    settings = {"weights": TOP_ONLY, "k": 40, "tail_blocks": 3, "logprob_dtype": "float16"}
    # A teacher without training is close to uniform: a twentieth of its mass takes a dozen entries or two.
    run = begin(tmp_path / "mass", mass=0.05, min_k=2, **settings)
    run.bring_up()
    part, row = run.store.get("s2", "textual")
    assert isinstance(part.layout, Layout) and part.layout.mass == 0.05
    stored = part.distribution(row, "top")
    seen = run.naive(run.needs.textual, "s2")
    true = masked_log_softmax(seen.logits[seen.batch.response_rows], run.needs.alignment).double()
    kept = stored.ids >= 0
    count = kept.sum(1)
    assert len(set(count.tolist())) > 1 and count.min() >= 2 and count.max() < 40
    ordered = true.exp().sort(1, descending=True).values.numpy()
    for t, n in enumerate(count):
        assert ordered[t, : n - 1].sum() - 1e-5 < 0.05 <= ordered[t, :n].sum() + 1e-5
    gone = torch.from_numpy(np.where(kept, stored.ids, stored.ids[:, :1]))
    left = true.scatter(1, gone, -torch.inf)
    for block, (low, high) in enumerate(zip(stored.block_bounds, stored.block_bounds[1:], strict=False)):
        found = torch.from_numpy(stored.log_tail[:, 0, block]).double().exp()
        torch.testing.assert_close(found, left[:, low:high].exp().sum(1), rtol=6e-3, atol=1e-7)
    fixed = begin(tmp_path / "fixed", **settings)
    fixed.bring_up()
    wider, place = fixed.store.get("s2", "textual")
    cut = wider.distribution(place, "top", mass=0.05, min_k=2)
    assert np.abs((cut.ids >= 0).sum(1) - count).max() <= 1, "float16 may move a border by an entry"


def test_what_a_mass_asks_for_is_served_by_more_and_not_by_less(begin, tmp_path):
    run = begin(tmp_path, weights=TOP_ONLY, k=8)
    run.bring_up()
    assert run.again(teachers=run.teachers(mass=0.9, min_k=3)).stale() == []
    small = begin(tmp_path / "small", weights=TOP_ONLY, k=8, mass=0.9)
    small.bring_up()
    assert small.again(teachers=small.teachers(mass=0.5)).stale() == []
    for more in ({"mass": 0.95}, {"mass": None}, {"min_k": 2}, {"k": 9}):
        stale = small.again(teachers=small.teachers(**more)).stale()
        assert {source for _, source in stale} == {"textual"}, more


@pytest.mark.parametrize("codec", ["fp8", "low_rank", "low_rank_int8"])
def test_states_through_each_codec(begin, tmp_path, codec):
    run = begin(tmp_path, weights=WeightsConfig(top=0, layer=0), states=codec, rank=24)
    run.bring_up()
    seen = run.naive(run.needs.acoustic, "s2")
    part, row = run.store.get("s2", "acoustic")
    for layer in range(1, 5):
        true, found = seen.states[layer][seen.batch.audio_rows], part.hidden(row, layer)
        cosine = torch.nn.functional.cosine_similarity(true, found, dim=1)
        about = part.attributes["fidelity"][f"hidden/{layer:02d}"]
        assert float(cosine.mean()) > 0.97 and about["cosine_mean"] > 0.97
        assert about["tokens"] > 0 and about["cosine_worst"] <= about["cosine_mean"]
    if codec != "fp8":
        assert part.attributes["states"]["rank"] == 24
        assert part.states(row, 1)["states"].shape == (len(true), 24)
        assert any("bases of rank 24 for layers 1, 2, 3, 4 are fitted" in line for line in run.said)


def test_later_parts_take_the_bases_that_are_there(begin, rows, tmp_path):
    ask = {"weights": WeightsConfig(top=0, layer=0), "states": "low_rank_int8", "rank": 8}
    run = begin(tmp_path, **ask)
    run.bring_up()
    first = run.store.get("s2", "acoustic")[0].constant("hidden/02/basis")
    run.write_manifest([*rows, {"id": "s9", "audio": ["b.flac", "c.ogg"], "question": "?", "choices": [], "n": 4}])
    run.said.clear()
    run = run.again()
    run.bring_up()
    late = run.store.get("s9", "acoustic")[0]
    assert late.path != run.store.get("s2", "acoustic")[0].path
    np.testing.assert_array_equal(late.constant("hidden/02/basis"), first)
    assert not any("are fitted" in line for line in run.said)
    other = run.again(teachers=run.teachers(rank=9))
    assert {source for _, source in other.stale()} == {"acoustic"}


def test_a_rank_beyond_the_width_is_an_error_of_the_plan(begin, tmp_path):
    run = begin(tmp_path, states="low_rank", rank=10_000)
    with pytest.raises(KdpipeError, match=r"teachers\.rank: 10000 is more than the width of"):
        run.plan()


def test_the_next_batch_is_computed_while_one_is_written(begin, rows, tmp_path, monkeypatch):
    run = begin(tmp_path, rows=many(rows, 12), weights=TOP_ONLY, k=4, batch_tokens=1, part_samples=12)
    written, computed = threading.Event(), []
    real_add, real_call = record.Recorder._add, teach.Scribe.__call__

    def slow_add(self, *args):
        if not computed[1:]:
            assert written.wait(30), "the second batch came only after the first was written"
        return real_add(self, *args)

    def watch(self, batch):
        computed.append(batch)
        if len(computed) == 2:
            written.set()
        return real_call(self, batch)

    monkeypatch.setattr(record.Recorder, "_add", slow_add)
    monkeypatch.setattr(teach.Scribe, "__call__", watch)
    run.bring_up()
    assert len(computed) == 12


def test_an_error_of_the_writing_thread_ends_the_run_and_keeps_what_was_committed(begin, rows, tmp_path, monkeypatch):
    run = begin(tmp_path, rows=many(rows, 12), weights=TOP_ONLY, k=4, part_samples=3)
    plan, real, calls = run.plan(), record.Recorder._add, []

    def fail(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(record.Recorder, "_add", fail)
        with pytest.raises(OSError, match="No space left"):
            STAGE.run(run.ctx, plan.todo)
    done = [row for row in run.ledger.rows() if row.source == "textual"]
    assert len(done) == 6 and not list((tmp_path / "tmp").glob("*.zarr"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kdpipe-write")]
    run.bring_up()


def test_parts_that_a_crash_left_without_rows_are_taken_in(begin, rows, tmp_path, monkeypatch):
    """The manifest is written seldom while parts are made; what `kill -9` leaves between is not made again."""
    run = begin(tmp_path, rows=many(rows, 12), weights=TOP_ONLY, k=4, part_samples=3)
    plan = run.plan()
    with monkeypatch.context() as patch:
        patch.setattr("kdpipe.data.ledger._REST", 1e9)
        patch.setattr(Ledger, "flush", lambda self: None)
        STAGE.run(run.ctx, plan.todo)
    left = run.ledger
    assert len(left.unreferenced_parts()) == 7 and len(list(left.rows())) == 3, "only the first commit was written"
    (left.unreferenced_parts()[0] / "zarr.json").write_text("torn")
    made = []
    monkeypatch.setattr(
        teach.Recorder, "begin", lambda self, shape, real=teach.Recorder.begin: made.append(1) or real(self, shape)
    )
    run.bring_up()
    assert len(made) <= 1 and len(list((tmp_path / "cache-teachers" / "parts").iterdir())) == 8
    assert len(list(run.ledger.rows())) == 24 and not run.ledger.unreferenced_parts()


@pytest.mark.vllm
def test_vllm_as_the_textual_teacher_fills_the_same_store(begin, tmp_path):
    own = begin(tmp_path / "own", weights=TOP_ONLY, k=12, temperatures=())
    own.bring_up()
    serve = dataclasses.replace(own.ctx.config.teachers.serve, enforce_eager=True, cpu_kv_cache_gib=1)
    textual = dataclasses.replace(own.ctx.config.teachers.textual, engine="vllm")
    served = own.copy(tmp_path / "served")
    served = served.again(teachers=served.teachers(textual=textual, serve=serve, max_length=2000, mass=0.95))
    assert {source for _, source in served.stale()} == {"textual", "targets"}
    served.bring_up()
    for sample in ("s1", "s4"):
        part, row = served.store.get(sample, "textual")
        assert part.layout.mass == 0.95
        found = part.distribution(row, "top")
        there, place = own.store.get(sample, "textual")
        true = there.distribution(place, "top", mass=0.95)
        both = min(found.ids.shape[1], true.ids.shape[1])
        kept = (found.ids[:, :both] >= 0) & (true.ids[:, :both] >= 0)
        assert kept.mean() > 0.5 and (found.ids[:, :both] == true.ids[:, :both])[kept].mean() > 0.99
        # What vLLM does not return of the masked ids stays in the tail: with a teacher that is close to uniform that
        # is their share of the vocabulary, the same for all entries of a token.
        lost = np.where(kept, true.logprob[:, :both] - found.logprob[:, :both], np.nan)
        assert np.nanmin(lost) > -1e-3 and np.nanmax(lost) < 0.07
        assert (np.nanmax(lost, 1) - np.nanmin(lost, 1)).max() < 6e-3, "float16 of numbers near -5"
        np.testing.assert_allclose(np.exp(found.log_tail), np.exp(true.log_tail), atol=5e-3)


@pytest.mark.parametrize("part_samples", [1, 4])
def test_a_sample_that_the_engine_dies_of_is_rejected_and_the_others_are_cached(
    begin, tmp_path, monkeypatch, part_samples
):
    committed = []

    @contextmanager
    def serve(folder, config, alignment, k, say):
        keep = Keep.of(folder.head_rows, alignment, k)
        ids = np.flatnonzero(keep.is_shared)[: keep.first]
        logq = np.log(np.linspace(2, 1, keep.first) / 2 / keep.first)

        def score(examples):
            for example in examples:
                rows = len(example.target_ids)
                made = distil(np.tile(ids, (rows, 1)), np.tile(logq, (rows, 1)), keep)
                yield example, Rejected("engine_died", "alone") if example.id == "s3" else made
                if example.id == "s3":
                    # At once, whatever becomes of the part.
                    committed.extend(run.ledger.rejects())

        yield score

    monkeypatch.setattr(teach, "serve", serve)
    run = begin(tmp_path, weights=TOP_ONLY, k=12, temperatures=(), part_samples=part_samples)
    textual = dataclasses.replace(run.ctx.config.teachers.textual, engine="vllm")
    run = run.again(teachers=run.teachers(textual=textual))
    plan = run.bring_up()
    assert plan.rejected == {("s3", "textual")}
    assert {pair[0] for pair in plan.fresh if pair[1] == "textual"} == {"s1", "s2", "s4"}
    assert [(reject.id, reject.reason, reject.detail) for reject in committed] == [("s3", "engine_died", "alone")]
    assert run.said[-1] == "cache-teachers: 3 samples are cached, 1 rejected"
    for sample in ("s1", "s2", "s4"):
        part, row = run.store.get(sample, "textual")
        assert len(part.distribution(row, "top").ids) == run.ledger.get(sample, "targets").tokens


def test_states_of_the_textual_teacher_through_a_basis(begin, tmp_path):
    """A rank near the width loses next to nothing, so what training reads is what naive passes give."""
    run = begin(
        tmp_path, layers=LayersConfig("top", match="hidden"), weights=WeightsConfig(), states="low_rank", rank=64
    )
    run.bring_up()
    seen = run.naive(run.needs.textual, "s1")
    part, row = run.store.get("s1", "textual")
    layer = part.attributes["states"]["layers"][0]
    true = seen.states[layer][seen.batch.response_rows]
    cosine = torch.nn.functional.cosine_similarity(true, part.hidden(row, layer), dim=1)
    assert float(cosine.min()) > 0.998
