"""The whole stage on real models, against naive forward passes over whole sequences."""

import dataclasses
import shutil
import weakref
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.stages.cache_teachers import run as module
from kdpipe.stages.cache_teachers import teach
from kdpipe.stages.cache_teachers.capture import Job, batches
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.cache_teachers.targets import make_target
from kdpipe.stages.config import AcousticTeacherConfig, LayersConfig, WeightsConfig
from kdpipe.stages.models import parallel
from kdpipe.stages.models.inputs import Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel
from kdpipe.stages.models.vocabulary import Alignment
from kdpipe.stages.textualize.table import read_traces

TARGETS_ONLY = WeightsConfig(top=0, layer=0, acoustic=0)


@pytest.mark.parametrize("student", ["qwen2_audio", "qwen2_5_omni"])
def test_the_store_holds_what_naive_forward_passes_give(begin, full, tmp_path, monkeypatch, student):
    full_logprobs, masked_log_softmax = full
    run = begin(tmp_path, student, head_chunk=7, batch_tokens=400, part_samples=3)
    real, alive = parallel.load_model, []

    def load_and_watch(*args, **kwargs):
        assert not [ref for ref in alive if ref() is not None], "the teacher before is still in memory"
        loaded = real(*args, **kwargs)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(parallel, "load_model", load_and_watch)
    run.bring_up()
    assert len(alive) == 2
    assert run.said == ["cache-teachers: 4 samples are cached, 0 rejected"]
    needs, store, ledger = run.needs, run.store, run.ledger
    alignment = needs.alignment
    assert alignment.masked and needs.k == alignment.valid - len(alignment.masked)

    for sample_id in ("s1", "s2"):
        seen = run.naive(needs.textual, sample_id)
        part, row = store.get(sample_id, "targets")
        ids = part.read(row)["target_ids"]
        assert ids.tolist() == seen.batch.targets.tolist()
        prompt = len(seen.logits) - len(ids)
        rows = slice(prompt - 1, len(seen.logits) - 1)
        part, row = store.get(sample_id, "textual")
        expected_of = {"top": seen.logits[rows]}
        with torch.no_grad():
            for layer in (2, 3, 5):
                lens = seen.loaded.final_norm(seen.states[layer][rows]) @ seen.loaded.head_weight.T
                expected_of[f"lens/{layer:02d}"] = lens
        for prefix, logits in expected_of.items():
            stored = part.distribution(row, prefix)
            assert stored.temperatures == (1.0, 2.0)
            expected = masked_log_softmax(logits, alignment)
            torch.testing.assert_close(full_logprobs(stored, alignment.valid), expected, rtol=1e-5, atol=1e-5)
            found = torch.from_numpy(stored.log_z[:, 1] - stored.log_z[:, 0] / 2)
            torch.testing.assert_close(found, torch.logsumexp(expected / 2, 1), rtol=1e-5, atol=1e-5)
            assert np.all(stored.log_tail == -np.inf)
        # Row t is what predicts target t: its log-probability of that target is the sequence's own.
        own = full_logprobs(part.distribution(row, "top"), alignment.valid)[range(len(ids)), seen.batch.targets]
        whole = masked_log_softmax(seen.logits, alignment)[:-1].gather(1, seen.batch.input_ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(own, whole[prompt - 1 :], rtol=1e-5, atol=1e-5)

        seen = run.naive(needs.acoustic, sample_id)
        assert ledger.get(sample_id, "targets").length == len(seen.logits)
        part, row = store.get(sample_id, "acoustic_top")
        torch.testing.assert_close(
            full_logprobs(part.distribution(row, "top"), alignment.valid),
            masked_log_softmax(seen.logits[seen.batch.response_rows], alignment),
            rtol=1e-5,
            atol=1e-5,
        )
        part, row = store.get(sample_id, "acoustic")
        heard = seen.batch.audio_rows
        assert ledger.get(sample_id, "acoustic").tokens == len(heard) > 0
        for layer in range(1, 5):
            torch.testing.assert_close(part.hidden(row, layer), seen.states[layer][heard], rtol=1e-4, atol=1e-5)


def test_kept_entries_and_tail_are_the_whole(made, full):
    _, masked_log_softmax = full
    part, row = made.store.get("s2", "textual")
    stored = part.distribution(row, "top")
    assert stored.ids.shape[1] == 8 and stored.log_tail.shape[1:] == (2, 3)
    seen = made.naive(made.needs.textual, "s2")
    for column, temperature in enumerate((1.0, 2.0)):
        expected = masked_log_softmax(seen.logits[seen.batch.response_rows], made.needs.alignment, temperature)
        left = expected.scatter(1, torch.from_numpy(stored.ids), -torch.inf)
        for block, (low, high) in enumerate(pairwise(stored.block_bounds)):
            found = torch.from_numpy(stored.log_tail[:, column, block]).exp()
            torch.testing.assert_close(found, left[:, low:high].exp().sum(1), rtol=1e-4, atol=1e-9)


def test_samples_with_the_same_clip_share_one_acoustic_unit(made):
    one, three = made.ledger.get("s1", "acoustic"), made.ledger.get("s3", "acoustic")
    assert (one.part, one.row, one.key) == (three.part, three.row, three.key)
    part, row = made.store.get("s3", "acoustic")
    assert [sample["id"] for sample in part.units[row]["samples"]] == ["s1", "s3"]
    assert len([unit for unit in part.units if unit["key"] == one.key]) == 1
    assert made.ledger.get("s1", "textual").row != made.ledger.get("s3", "textual").row


def test_a_new_sample_with_a_known_clip_costs_no_acoustic_pass(made, rows, tmp_path, monkeypatch):
    run = made.copy(tmp_path / "copy")
    run.write_manifest([*rows, {"id": "s5", "audio": "b.flac", "question": "Many?", "choices": [], "n": 7}])
    weights = WeightsConfig(top=0, layer=0)
    run = run.again(train=dataclasses.replace(run.ctx.config.train, weights=weights))
    # Without a textual teacher, the other targets have another key: they are aligned to nothing.
    assert ("s5", "acoustic") in run.stale() and ("s1", "acoustic") not in run.stale()
    monkeypatch.setattr(parallel, "load_model", lambda *a, **k: pytest.fail("no model is needed"))
    run.bring_up()
    known, new = run.ledger.get("s2", "acoustic"), run.ledger.get("s5", "acoustic")
    assert (new.part, new.row) == (known.part, known.row)
    part, row = run.store.get("s5", "acoustic")
    assert len(part.hidden(row, 1)) == new.tokens


def test_hidden_states_and_their_fidelity(begin, tmp_path):
    run = begin(
        tmp_path,
        states="int8",
        k=4,
        layers=LayersConfig("skip", 2, match="hidden"),
        weights=WeightsConfig(),
        acoustic=AcousticTeacherConfig(layers="skip"),
    )
    run.bring_up()
    for source, folder, kept in (("textual", run.needs.textual, (3, 6)), ("acoustic", run.needs.acoustic, (2, 4))):
        seen = run.naive(folder, "s2")
        places = seen.batch.response_rows if source == "textual" else seen.batch.audio_rows
        part, row = run.store.get("s2", source)
        assert part.attributes["states"]["layers"] == list(kept)
        for layer in kept:
            torch.testing.assert_close(part.hidden(row, layer), seen.states[layer][places], rtol=0.02, atol=0.02)
            fidelity = part.attributes["fidelity"][f"hidden/{layer:02d}"]
            assert fidelity["cosine_worst"] > 0.999 and 0 < fidelity["relative_error"] < 0.01


def test_bad_samples_are_rejected_with_reasons_and_the_rest_is_made(begin, rows, tmp_path):
    ask = {"audio": "a.wav", "question": "How many?", "choices": [], "n": 1}
    bad = [
        ask | {"id": "gone", "audio": "gone.wav"},
        ask | {"id": "long", "trace": "3 tones. " * 400},
        ask | {"id": "special", "question": "What is <|im_end|>?"},
        ask | {"id": "teachers", "question": "What is <|box_start|>?"},
    ]
    run = begin(tmp_path, rows=[*rows, *bad], max_length=700, k=4)
    plan = run.bring_up()
    found = {(r.id, r.source): (r.reason, r.detail) for r in run.ledger.rejects()}
    assert {pair: reason for pair, (reason, _) in found.items()} == {
        ("gone", "targets"): "audio_missing",
        ("long", "targets"): "too_long",
        ("special", "targets"): "special_token_in_text",
        ("teachers", "textual"): "special_token_in_text",
    }
    assert "and teachers.max_length is 700" in found["long", "targets"][1]
    assert {want.source for want in plan.wanted if want.id in ("gone", "long", "special")} == {"targets"}
    assert {pair[0] for pair in plan.fresh} == {"s1", "s2", "s3", "s4", "teachers"}

    shutil.copy(tmp_path / "a.wav", tmp_path / "gone.wav")
    assert [pair for pair in run.again().stale() if pair[1] == "targets"] == [("gone", "targets")]
    run.again().bring_up()
    assert run.ledger.get("gone", "textual") is not None


def test_a_response_with_a_token_the_teacher_lacks_is_rejected(made):
    encoder, trace = Encoder(made.needs.student), read_traces(made.ctx)["s1"]
    sample = made.ctx.samples("train")[0]
    ids = encoder.target_ids(trace.trace)
    target = make_target(made.ctx, encoder, made.needs.alignment, sample, trace)
    assert list(target.ids) == ids and target.frames == (11200,)
    for alignment in (Alignment(1000, (ids[3],)), Alignment(ids[-1], ())):
        with pytest.raises(Rejected, match=r"token \d+ \('.+'\), which teacher and student do not share") as error:
            make_target(made.ctx, encoder, alignment, sample, trace)
        assert error.value.reason == "target_not_shared"
    with pytest.raises(Rejected, match="trace_missing"):
        make_target(made.ctx, encoder, made.needs.alignment, sample, None)


def test_a_missing_clip_is_rejected_and_the_good_are_kept(begin, rows, tmp_path):
    gone = {"id": "gone", "audio": "gone.wav", "question": "How many?", "choices": [], "n": 1}
    run = begin(tmp_path, rows=[*rows, gone], weights=TARGETS_ONLY)
    run.bring_up()
    assert len(run.plan().fresh) == 4 and len(run.plan().rejected) == 1


def test_a_clip_that_changes_meanwhile_is_not_recorded(begin, tmp_path, monkeypatch):
    run = begin(tmp_path, weights=TARGETS_ONLY)
    plan, real = run.plan(), module.make_targets

    def meddle(*args):
        soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(8000), 16000)
        real(*args)

    monkeypatch.setattr(module, "make_targets", meddle)
    with pytest.raises(KdpipeError, match=r"a\.wav: changed while the stage was running"):
        STAGE.run(run.ctx, plan.todo)
    assert not list(run.ledger.rows())


def test_a_rejection_of_a_clip_that_changes_meanwhile_is_not_recorded(begin, rows, tmp_path, monkeypatch):
    bad = {"id": "bad", "audio": "bad.wav", "question": "How many?", "choices": [], "n": 1}
    (tmp_path / "bad.wav").write_bytes(b"still being copied")
    run = begin(tmp_path, rows=[*rows, bad], weights=TARGETS_ONLY)
    plan, real = run.plan(), module.make_targets

    def meddle(*args):
        (tmp_path / "bad.wav").write_bytes(b"still being copied, and longer")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_targets", meddle)
        with pytest.raises(KdpipeError, match=r"bad\.wav: changed while the stage was running"):
            STAGE.run(run.ctx, plan.todo)
    assert not list(run.ledger.rows()) and not list(run.ledger.rejects())
    shutil.copy(tmp_path / "a.wav", tmp_path / "bad.wav")
    assert not run.again().bring_up().rejected


def test_the_same_work_gives_the_same_bytes_even_after_an_interruption(begin, tmp_path, monkeypatch):
    def contents(run):
        parts = run.ledger.parts
        return {str(path.relative_to(parts)): path.read_bytes() for path in parts.rglob("*") if path.is_file()}

    first = begin(tmp_path / "one", k=4, part_samples=2, logprob_dtype="float16", states="bfloat16")
    second = first.copy(tmp_path / "two")
    first.bring_up()
    plan, real, calls = second.plan(), teach.Scribe.__call__, []

    def fail_late(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(teach.Scribe, "__call__", fail_late)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(second.ctx, plan.todo)
    assert 0 < len(second.plan().fresh) < len(plan.wanted)
    assert not list((tmp_path / "two" / "tmp").glob("*.zarr"))
    second.bring_up()
    assert contents(first) == contents(second)


def short_of_memory(monkeypatch, most):
    """Forward passes over more than `most` tokens get no memory; returns the tokens of those that did."""
    passed, real = [], LoadedModel.hidden

    def hidden(self, batch):
        if batch.input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        passed.append(batch.input_ids.numel())
        return real(self, batch)

    monkeypatch.setattr(LoadedModel, "hidden", hidden)
    return passed


def test_a_batch_that_gets_no_memory_is_halved(begin, tmp_path, monkeypatch):
    whole, short = (begin(tmp_path / name, k=4, batch_tokens=4000) for name in ("whole", "short"))
    whole.bring_up()
    longest = max(row.length for row in whole.ledger.rows())
    passed = short_of_memory(monkeypatch, 2 * longest)
    short.bring_up()
    (said,) = {line.split(",")[0] for line in short.said if "got no memory" in line}
    assert said == "cache-teachers: a batch of 4 samples"
    assert "set teachers.batch_tokens: " in "".join(short.said)
    assert passed and max(passed) <= 2 * longest
    for row in whole.ledger.rows():
        (ours, at), (theirs, there) = (run.store.get(row.id, row.source) for run in (whole, short))
        for name, array in ours.read(at).items():
            np.testing.assert_allclose(theirs.read(there, [name])[name], array, rtol=1e-4, atol=1e-4)


def test_bases_are_fitted_on_halves_where_memory_is_short(begin, tmp_path, monkeypatch):
    low_rank = {"k": 4, "batch_tokens": 4000, "states": "low_rank", "rank": 8}
    whole, short = (begin(tmp_path / name, **low_rank) for name in ("whole", "short"))
    whole.bring_up()
    passed = short_of_memory(monkeypatch, 2 * max(row.length for row in whole.ledger.rows()))
    short.bring_up()
    told = [[line for line in run.said if "bases of rank 8" in line] for run in (whole, short)]
    assert told[0] == told[1] and told[0], "on as many tokens"
    before = [line for line in short.said if "got no memory" in line or "bases" in line]
    assert "got no memory" in before[0] and passed, "the first batch is one that bases are fitted on"
    assert {row.id for row in short.ledger.rows()} == {row.id for row in whole.ledger.rows()}


def test_a_sample_that_gets_no_memory_is_named(begin, tmp_path, monkeypatch):
    run = begin(tmp_path, k=4, batch_tokens=4000)
    short_of_memory(monkeypatch, 1)
    with pytest.raises(
        KdpipeError, match=r"1 sequence of [\d,]+ tokens together \(s\d\) get no memory: CUDA .* teachers.h"
    ):
        run.bring_up()
    monkeypatch.undo()
    run.bring_up()


def test_a_teacher_that_overflows_is_an_error_that_names_the_samples(begin, tmp_path, monkeypatch):
    run = begin(tmp_path, weights=WeightsConfig(layer=0, acoustic=0), k=4)
    real = parallel.load_model

    def broken(*args, **kwargs):
        loaded = real(*args, **kwargs)
        loaded.head_weight.fill_(torch.inf)
        return loaded

    monkeypatch.setattr(parallel, "load_model", broken)
    with pytest.raises(KdpipeError, match=r"samples .*s2.*NaN or infinity"):
        run.bring_up()


def test_padding_and_the_window_of_the_tower_count_in_a_batch():
    def job(length, tower=0):
        return Job((), (), Example("x", [0] * length), {}, tower)

    cut = list(batches([job(2), job(3), job(3), job(9), job(50)], lambda: 12))
    assert [[j.example.length for j in group] for group in cut] == [[2, 3, 3], [9], [50]]
    assert [len(group) for group in batches([job(2, 1500)] * 5, lambda: 3000)] == [2, 2, 1]
    assert list(batches([], lambda: 10)) == []
