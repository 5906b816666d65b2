"""The whole stage on real models, against naive forward passes over whole sequences."""

import dataclasses
import functools
import json
import shutil
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from kdpipe.data.audio import decode
from kdpipe.data.errors import KdpipeError, RejectBudgetError
from kdpipe.data.files import build_aside
from kdpipe.data.hashing import digest
from kdpipe.data.ledger import Row
from kdpipe.data.store.reader import Store
from kdpipe.stages.base import Context, compare
from kdpipe.stages.cache_teachers import run as module
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import (
    AcousticTeacherConfig,
    Config,
    DataConfig,
    LayersConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualTeacherConfig,
    TrainConfig,
    WeightsConfig,
)
from kdpipe.stages.miniature.models import make_family
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.inputs import Encoder, Example
from kdpipe.stages.models.loaded import load_model
from kdpipe.stages.models.prompt import fill
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.textualize.table import read_traces, to_table

SECTIONS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
TRACE = (
    "<THINK><PLANNING>count</PLANNING><CAPTION>tones: {n}</CAPTION><REASONING>{n}</REASONING>"
    "<SUMMARY>{n}</SUMMARY></THINK><RESPONSE>{n}</RESPONSE>"
)
CLIPS = {"a.wav": (16000, 0.7, 1), "b.flac": (44100, 1.9, 2), "c.ogg": (8000, 0.25, 1)}
ROWS = [
    {"id": "s1", "audio": "a.wav", "question": "How many tones?", "choices": ["2", "3"], "n": 3},
    {"id": "s2", "audio": "b.flac", "question": "Which is higher?", "choices": [], "n": 2},
    {"id": "s3", "audio": "a.wav", "question": "Is the sum of the tones even?", "choices": ["yes", "no"], "n": 11},
    {"id": "s4", "audio": "c.ogg", "question": "How many?", "choices": [], "n": 5},
]


@pytest.fixture(scope="module", autouse=True)
def threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def make_world(base, rows=ROWS):
    base.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, (rate, seconds, channels) in CLIPS.items():
        time = np.arange(int(rate * seconds)) / rate
        tone = 0.3 * np.sin(2 * np.pi * 440 * time) + rng.normal(0, 0.02, len(time))
        soundfile.write(base / name, np.stack([tone] * channels, 1), rate)
    write_manifest(base, rows)
    return base


def write_manifest(base, rows):
    lines = []
    for row in rows:
        known = {name: value for name, value in row.items() if name != "n"}
        n = row.get("n")
        lines.append(
            json.dumps({"description": f"tones: {n}", "trace": row.get("trace") or TRACE.format(n=n), **known})
        )
    (base / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def context(family, base, student="qwen2_5_omni", *, weights=None, layers=None, said=None, **teachers):
    settings = {"k": 1000, "logprob_dtype": "float32", "states": "float32", "device": "cpu", "temperatures": (2.0,)}
    textual = TextualTeacherConfig(ModelConfig(str(family.teacher), dtype="float32"))
    config = Config(
        DataConfig("manifest.jsonl", max_reject_fraction=0.5),
        StudentConfig(ModelConfig(str(getattr(family, student)), dtype="float32")),
        TeachersConfig(textual, **(settings | teachers)),
        layers=layers or LayersConfig("all"),
        train=TrainConfig(weights=weights or WeightsConfig(acoustic_top=0.1)),
    )
    return Context(config, base, (said if said is not None else []).append)


def textualize(ctx):
    """Does what textualize does with traces and descriptions that the manifest brings."""
    ledger = ctx.ledger("textualize")
    samples = {sample.id: sample for sample in ctx.samples("train")}
    plan = compare("textualize", TEXTUALIZE.wanted(ctx, {}), ledger)
    if plan.todo:
        records = [
            {
                "id": want.id, "key": want.key, "description": samples[want.id].description,
                "trace": samples[want.id].trace, "response": "", "audio_samples": [1], "audio_rate": 16000,
            }
            for want in plan.todo
        ]  # fmt: skip
        name = digest(sorted(want.key for want in plan.todo))[:16] + ".parquet"
        with build_aside(ledger.tmp) as path:
            pq.write_table(to_table(records, SECTIONS), path)
            rows = [
                Row(w.id, "trace", w.key, w.fields, name, place, content=digest([r["description"], r["trace"]]))
                for place, (w, r) in enumerate(zip(plan.todo, records, strict=True))
            ]
            ledger.commit(rows, built={name: path})
    return compare("textualize", TEXTUALIZE.wanted(ctx, {}), ctx.ledger("textualize"))


def plan_of(ctx):
    plans = {"textualize": textualize(ctx)}
    return compare(STAGE.name, STAGE.wanted(ctx, plans), ctx.ledger(STAGE.name))


def bring_up(ctx):
    plan = plan_of(ctx)
    assert not any(want.pending for want in plan.todo)
    if plan.todo:
        STAGE.run(ctx, plan.todo)
    after = plan_of(ctx)
    assert not after.todo
    return after


def fresh_context(ctx, **changes):
    """The same run as a new process sees it, with sections of the configuration replaced."""
    return Context(dataclasses.replace(ctx.config, **changes), ctx.base, ctx.say)


def store_of(ctx):
    ledger = ctx.ledger(STAGE.name)
    return Store(ledger.parts, ledger), ledger


@functools.lru_cache(maxsize=4)
def live(folder_path, dtype):
    folder = resolve(ModelConfig(folder_path, dtype=dtype), Path())
    return Encoder(folder), load_model(folder, device="cpu")


def naive(ctx, folder, prompt_for, sample_id):
    """Whole-sequence logits and layer states [L, ...] of one sample, by transformers alone."""
    sample = {s.id: s for s in ctx.samples("train")}[sample_id]
    trace = read_traces(ctx)[sample_id]
    encoder, loaded = live(str(folder.path), folder.settings.dtype)
    clips = []
    if folder.hears:
        clips = [decode(ref, rate=16000, max_seconds=30) for ref in sample.audio]
    prompt_ids = encoder.prompt_ids(prompt_for(encoder, sample, trace, len(clips)), [len(clip) for clip in clips])
    target_ids = Encoder(resolve(ctx.config.student.model, ctx.base)).target_ids(trace.trace)
    batch = encoder.collate([Example("x", prompt_ids, target_ids, encoder.features(clips))])
    with torch.no_grad():
        out = loaded.model(**batch.forward, use_cache=False)
        with loaded.capture(range(1, len(loaded.layers) + 1)) as states:
            loaded.model(**batch.forward, use_cache=False)
    return loaded, batch, out.logits[0], {layer: state[0] for layer, state in states.items()}


def student_prompt(ctx):
    student = ctx.config.student
    return lambda encoder, sample, trace, clips: encoder.prompt_text(
        fill(student.prompt, sample), system=student.system, clips=clips
    )


def textual_prompt(ctx):
    asks = ctx.config.teachers.textual
    return lambda encoder, sample, trace, clips: encoder.prompt_text(
        fill(asks.prompt, sample, trace.description), system=asks.system
    )


def full_logprobs(stored, valid):
    """[T, valid] of a stored distribution that keeps everything; -inf where nothing is kept."""
    full = np.full((len(stored.ids), valid), -np.inf, np.float32)
    np.put_along_axis(full, stored.ids, stored.logprob, 1)
    return torch.from_numpy(full)


def masked_log_softmax(logits, alignment, temperature=1.0):
    logits = logits[:, : alignment.valid].clone()
    logits[:, list(alignment.masked)] = -torch.inf
    return torch.log_softmax(logits / temperature, 1)


@pytest.mark.parametrize("student", ["qwen2_audio", "qwen2_5_omni"])
def test_the_store_holds_what_naive_forward_passes_give(family, tmp_path, monkeypatch, student):
    said = []
    ctx = context(family, make_world(tmp_path), student, said=said, head_chunk=7, batch_tokens=400, part_samples=3)
    real, alive = module.load_model, []

    def load_and_watch(*args, **kwargs):
        assert not [ref for ref in alive if ref() is not None], "the teacher before is still in memory"
        loaded = real(*args, **kwargs)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(module, "load_model", load_and_watch)
    bring_up(ctx)
    assert len(alive) == 2
    needs = requirements(ctx)
    alignment = needs.alignment
    assert alignment is not None and alignment.masked and needs.k == alignment.valid - len(alignment.masked)
    store, ledger = store_of(ctx)
    assert said == ["cache-teachers: 4 samples are cached, 0 rejected"]
    assert all(len(part.stem) == 16 for part in ledger.parts.iterdir())

    for sample_id in ("s1", "s2"):
        loaded, batch, logits, states = naive(ctx, needs.textual, textual_prompt(ctx), sample_id)
        part, row = store.get(sample_id, "targets")
        ids = part.read(row)["target_ids"]
        assert ids.tolist() == batch.targets.tolist()
        prompt = batch.input_ids.shape[1] - len(ids)
        rows = slice(prompt - 1, batch.input_ids.shape[1] - 1)
        part, row = store.get(sample_id, "textual")
        with torch.no_grad():
            by_layer = {"top": logits[rows]}
            for layer in (2, 3, 5):
                by_layer[f"lens/{layer:02d}"] = loaded.final_norm(states[layer][rows]) @ loaded.head_weight.T
        for prefix, expected in by_layer.items():
            stored = part.distribution(row, prefix)
            assert stored.temperatures == (1.0, 2.0)
            torch.testing.assert_close(
                full_logprobs(stored, alignment.valid), masked_log_softmax(expected, alignment), rtol=1e-5, atol=1e-5
            )
            log_z = torch.logsumexp(masked_log_softmax(expected, alignment) / 2, 1)
            found = torch.from_numpy(stored.log_z[:, 1] - stored.log_z[:, 0] / 2)
            torch.testing.assert_close(found, log_z, rtol=1e-5, atol=1e-5)
            assert np.all(stored.log_tail == -np.inf)
        # Row t is what predicts target t: its log-probability of that target is the sequence's own.
        own = full_logprobs(part.distribution(row, "top"), alignment.valid)[range(len(ids)), batch.targets]
        expected = masked_log_softmax(logits[:-1], alignment)[range(prompt - 1, len(logits) - 1), batch.targets]
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)

        loaded, batch, logits, states = naive(ctx, needs.acoustic, student_prompt(ctx), sample_id)
        assert ledger.get(sample_id, "targets").length == batch.input_ids.shape[1]
        part, row = store.get(sample_id, "acoustic_top")
        torch.testing.assert_close(
            full_logprobs(part.distribution(row, "top"), alignment.valid),
            masked_log_softmax(logits[batch.response_rows], alignment),
            rtol=1e-5,
            atol=1e-5,
        )
        part, row = store.get(sample_id, "acoustic")
        assert ledger.get(sample_id, "acoustic").tokens == len(batch.audio_rows) > 0
        for layer in range(1, 5):
            torch.testing.assert_close(part.hidden(row, layer), states[layer][batch.audio_rows], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """A finished Qwen2-Audio run with few kept entries."""
    ctx = context(family, make_world(tmp_path_factory.mktemp("made") / "run"), k=8, tail_blocks=3)
    bring_up(ctx)
    return ctx


def test_kept_entries_and_tail_are_the_whole(made):
    store, _ = store_of(made)
    alignment = requirements(made).alignment
    part, row = store.get("s2", "textual")
    stored = part.distribution(row, "top")
    assert stored.ids.shape[1] == 8 and stored.log_tail.shape[1:] == (2, 3)
    _, batch, logits, _ = naive(made, requirements(made).textual, textual_prompt(made), "s2")
    for column, temperature in enumerate((1.0, 2.0)):
        expected = masked_log_softmax(logits[batch.response_rows], alignment, temperature)
        left = expected.scatter(1, torch.from_numpy(stored.ids), -torch.inf)
        for block, (low, high) in enumerate(pairwise(stored.block_bounds)):
            torch.testing.assert_close(
                torch.from_numpy(stored.log_tail[:, column, block]).exp(),
                left[:, low:high].exp().sum(1),
                rtol=1e-4,
                atol=1e-9,
            )


def test_samples_with_the_same_clip_share_one_acoustic_unit(made):
    store, ledger = store_of(made)
    one, three = ledger.get("s1", "acoustic"), ledger.get("s3", "acoustic")
    assert (one.part, one.row, one.key) == (three.part, three.row, three.key)
    part, row = store.get("s3", "acoustic")
    assert [sample["id"] for sample in part.units[row]["samples"]] == ["s1", "s3"]
    assert len([unit for unit in part.units if unit["key"] == one.key]) == 1
    assert ledger.get("s1", "textual").row != ledger.get("s3", "textual").row


def stale_in(ctx):
    return sorted((want.id, want.source) for want in plan_of(ctx).todo)


def copy_run(made, family, tmp_path):
    shutil.copytree(made.base, tmp_path / "copy")
    return Context(made.config, tmp_path / "copy", made.say)


def test_a_moved_run_is_fresh(made, family, tmp_path):
    assert stale_in(copy_run(made, family, tmp_path)) == []


def test_what_a_question_changes(made, family, tmp_path):
    ctx = copy_run(made, family, tmp_path)
    rows = [row | ({"question": "How many tones are there?"} if row["id"] == "s1" else {}) for row in ROWS]
    write_manifest(ctx.base, rows)
    assert stale_in(ctx) == [("s1", "acoustic_top"), ("s1", "targets"), ("s1", "textual")]


def test_what_a_clip_changes(made, family, tmp_path):
    ctx = copy_run(made, family, tmp_path)
    soundfile.write(ctx.base / "c.ogg", 0.2 * np.random.default_rng(1).normal(size=8000), 8000)
    assert stale_in(ctx) == [("s4", "acoustic"), ("s4", "acoustic_top"), ("s4", "targets")]


def test_a_new_sample_with_a_known_clip_costs_no_acoustic_pass(made, family, tmp_path, monkeypatch):
    ctx = copy_run(made, family, tmp_path)
    weights = WeightsConfig(top=0, layer=0)
    ctx = fresh_context(ctx, train=TrainConfig(weights=weights))
    bring_up(ctx)  # without a textual teacher the targets have another key: nothing to align to
    new = {"id": "s5", "audio": "b.flac", "question": "How many tones?", "choices": [], "n": 7}
    write_manifest(ctx.base, [*ROWS, new])
    ctx = fresh_context(ctx)
    assert stale_in(ctx) == [("s5", "acoustic"), ("s5", "targets")]
    monkeypatch.setattr(module, "load_model", lambda *a, **k: pytest.fail("no model is needed"))
    bring_up(fresh_context(ctx))
    store, ledger = store_of(ctx)
    assert ledger.get("s5", "acoustic").part == ledger.get("s2", "acoustic").part
    part, row = store.get("s5", "acoustic")
    assert len(part.hidden(row, 1)) == ledger.get("s5", "acoustic").tokens


def test_less_is_served_and_more_is_made_without_losing_anything(made, family, tmp_path):
    ctx = copy_run(made, family, tmp_path)
    fewer = dataclasses.replace(ctx.config.teachers, k=4, temperatures=())
    only_last = LayersConfig("top")
    assert stale_in(fresh_context(ctx, teachers=fewer, layers=only_last)) == []
    execution = dataclasses.replace(ctx.config.teachers, batch_tokens=9, head_chunk=3, part_samples=1)
    assert stale_in(fresh_context(ctx, teachers=execution)) == []

    other = dataclasses.replace(ctx.config.teachers, temperatures=(3.0,))
    more = fresh_context(ctx, teachers=other, layers=LayersConfig("map", map={1: 1}))
    assert {source for _, source in stale_in(more)} == {"textual", "acoustic_top"}
    bring_up(more)
    assert stale_in(fresh_context(ctx)) == []
    _, ledger = store_of(ctx)
    assert ledger.get("s1", "textual").cover == {"k": 8, "temperatures": [1.0, 2.0, 3.0], "lens": [1, 2, 3, 5]}


@pytest.mark.parametrize(
    ("changes", "sources"),
    [
        ({"prompt": "{question} {description}"}, {"textual"}),
        ({"system": "Think."}, {"textual"}),
        ({"model": "bfloat16"}, {"textual"}),
    ],
)
def test_what_the_textual_teacher_changes(made, changes, sources):
    textual = made.config.teachers.textual
    if "model" in changes:
        changes = {"model": dataclasses.replace(textual.model, dtype="bfloat16")}
    teachers = dataclasses.replace(made.config.teachers, textual=dataclasses.replace(textual, **changes))
    assert {source for _, source in stale_in(fresh_context(made, teachers=teachers))} == sources


def test_what_the_students_prompt_changes(made):
    student = dataclasses.replace(made.config.student, prompt="{question}")
    assert {s for _, s in stale_in(fresh_context(made, student=student))} == {"targets", "acoustic_top"}
    student = dataclasses.replace(made.config.student, system="Listen.")
    assert {s for _, s in stale_in(fresh_context(made, student=student))} == {"targets", "acoustic", "acoustic_top"}


def test_sources_follow_the_weights(family, tmp_path):
    base = make_world(tmp_path)

    def sources(**weights):
        off = {"top": 0.0, "layer": 0.0, "acoustic": 0.0, "acoustic_top": 0.0}
        return requirements(context(family, base, weights=WeightsConfig(**(off | weights)))).sources

    assert sources() == ("targets",)
    assert sources(layer=1.0) == sources(top=1.0) == ("targets", "textual")
    assert sources(acoustic=1.0) == ("targets", "acoustic")
    assert sources(acoustic_top=1.0) == ("targets", "acoustic_top")
    hidden = context(family, base, layers=LayersConfig("skip", 2, match="hidden"))
    assert requirements(hidden).hidden == (3, 6) and requirements(hidden).lens == ()


def test_hidden_states_and_their_fidelity(family, tmp_path):
    layers = LayersConfig("skip", 2, match="hidden")
    ctx = context(family, make_world(tmp_path), states="int8", layers=layers, weights=WeightsConfig(), k=4)
    ctx = fresh_context(
        ctx, teachers=dataclasses.replace(ctx.config.teachers, acoustic=AcousticTeacherConfig(layers="skip"))
    )
    bring_up(ctx)
    store, _ = store_of(ctx)
    for source, folder, prompt, kept in (
        ("textual", requirements(ctx).textual, textual_prompt(ctx), (3, 6)),
        ("acoustic", requirements(ctx).acoustic, student_prompt(ctx), (2, 4)),
    ):
        _, batch, _, states = naive(ctx, folder, prompt, "s2")
        rows = batch.response_rows if source == "textual" else batch.audio_rows
        part, row = store.get("s2", source)
        assert part.attributes["states"]["layers"] == list(kept)
        for layer in kept:
            torch.testing.assert_close(part.hidden(row, layer).float(), states[layer][rows], rtol=0.02, atol=0.02)
            fidelity = part.attributes["fidelity"][f"hidden/{layer:02d}"]
            assert fidelity["cosine_worst"] > 0.999 and 0 < fidelity["relative_error"] < 0.01


def test_bad_samples_are_rejected_with_reasons_and_the_rest_is_made(family, tmp_path):
    rows = [
        *ROWS,
        {"id": "gone", "audio": "gone.wav", "question": "How many?", "choices": [], "n": 1},
        {"id": "long", "audio": "a.wav", "question": "How many?", "choices": [], "n": 1, "trace": "3 tones. " * 400},
        {"id": "special", "audio": "a.wav", "question": "What is <|im_end|>?", "choices": [], "n": 1},
        {"id": "teachers", "audio": "a.wav", "question": "What is <|box_start|>?", "choices": [], "n": 1},
    ]
    ctx = context(family, make_world(tmp_path, rows), max_length=700, k=4)
    plan = bring_up(ctx)
    found = {(r.id, r.source): (r.reason, r.detail) for r in ctx.ledger(STAGE.name).rejects()}
    assert {pair: reason for pair, (reason, _) in found.items()} == {
        ("gone", "targets"): "audio_missing",
        ("long", "targets"): "too_long",
        ("special", "targets"): "special_token_in_text",
        ("teachers", "textual"): "special_token_in_text",
    }
    assert "and teachers.max_length is 700" in found["long", "targets"][1]
    assert {want.source for want in plan.wanted if want.id in ("gone", "long", "special")} == {"targets"}
    assert {pair[0] for pair in plan.fresh} == {"s1", "s2", "s3", "s4", "teachers"}

    (tmp_path / "gone.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    assert stale_in(fresh_context(ctx)) == [(("gone"), "textual")] or ("gone", "targets") in stale_in(
        fresh_context(ctx)
    )
    bring_up(fresh_context(ctx))
    assert ctx.ledger(STAGE.name).get("gone", "textual") is not None


def test_too_many_rejects_fail_after_the_good_are_kept(family, tmp_path):
    rows = [*ROWS, {"id": "gone", "audio": "gone.wav", "question": "How many?", "choices": [], "n": 1}]
    ctx = context(family, make_world(tmp_path, rows), weights=WeightsConfig(top=0, layer=0, acoustic=0))
    ctx = fresh_context(ctx, data=dataclasses.replace(ctx.config.data, max_reject_fraction=0.1))
    with pytest.raises(RejectBudgetError, match="1 of 5 samples were rejected"):
        bring_up(ctx)
    assert len(plan_of(ctx).fresh) == 4


def test_a_clip_that_changes_meanwhile_is_not_recorded(family, tmp_path, monkeypatch):
    ctx = context(family, make_world(tmp_path), weights=WeightsConfig(top=0, layer=0, acoustic=0))
    plan = plan_of(ctx)
    real = module.make_targets

    def meddle(*args):
        soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(8000), 16000)
        real(*args)

    monkeypatch.setattr(module, "make_targets", meddle)
    with pytest.raises(KdpipeError, match=r"a\.wav: changed while the stage was running"):
        STAGE.run(ctx, plan.todo)
    assert not list(ctx.ledger(STAGE.name).rows())


def test_the_same_work_gives_the_same_bytes_even_after_an_interruption(family, tmp_path, monkeypatch):
    def contents(ctx):
        parts = ctx.ledger(STAGE.name).parts
        return {str(path.relative_to(parts)): path.read_bytes() for path in sorted(parts.rglob("*")) if path.is_file()}

    make_world(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, second = (
        context(family, tmp_path / name, k=4, part_samples=2, logprob_dtype="float16", states="bfloat16")
        for name in ("one", "two")
    )
    bring_up(first)
    plan = plan_of(second)
    real, calls = module.Scribe.__call__, []

    def fail_late(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(module.Scribe, "__call__", fail_late)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(second, plan.todo)
    assert 0 < len(plan_of(second).fresh) < len(plan.wanted)
    assert not list((tmp_path / "two" / "tmp").glob("*.zarr"))
    bring_up(second)
    assert contents(first) == contents(second)


def test_padding_and_the_window_of_the_tower_count_in_a_batch():
    from kdpipe.stages.cache_teachers.capture import Job, batches

    def job(length, tower=0):
        return Job((), (), Example("x", [0] * length), {}, tower)

    cut = list(batches([job(2), job(3), job(3), job(9), job(50)], 12))
    assert [[j.example.length for j in group] for group in cut] == [[2, 3, 3], [9], [50]]
    assert [len(group) for group in batches([job(2, 1500)] * 5, 3000)] == [2, 2, 1]
    assert list(batches([], 10)) == []
