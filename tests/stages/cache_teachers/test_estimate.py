"""The estimate against what the stage then writes, and how well it says it knows."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from kdpipe.data.audio import decode
from kdpipe.data.store.format import ArraySpec, hidden_specs
from kdpipe.data.store.shard_writer import ArrayWriter
from kdpipe.stages.cache_teachers.cost import lengths
from kdpipe.stages.cache_teachers.cost.estimate import Estimate, Line, estimate
from kdpipe.stages.cache_teachers.cost.sizes import array_bytes, cut
from kdpipe.stages.config import LayersConfig, WeightsConfig
from kdpipe.stages.models.inputs import Encoder

SAMPLES = 32
ONE_PERCENT, ONE_TWENTIETH = 0.01, 0.05


def many(rows: Any, count: int = SAMPLES, start: int = 0) -> list[dict[str, Any]]:
    """Rows over the fixture's three clips, with responses of different lengths."""
    made = range(start, start + count)
    return [{**rows[n % len(rows)], "id": f"sample-{n:03d}", "n": 7**n % 10 ** (n % 9 + 1)} for n in made]


def ask(run: Any, *, time: bool = False) -> Estimate:
    return estimate(run.ctx, run.plan(), run.needs, time=time)


def by_name(cost: Estimate) -> dict[str, Line]:
    return {line.name: line for line in cost.lines}


def on_disk(run: Any) -> int:
    """Bytes of all files of the stage."""
    return sum(path.stat().st_size for path in run.ctx.folder("cache-teachers").rglob("*") if path.is_file())


CASES: Mapping[str, dict[str, Any]] = {
    "lens of all layers, several parts": {"k": 8, "part_samples": 12, "states": "bfloat16", "logprob_dtype": "float16"},
    "several chunks, low rank": {"k": 400, "states": "low_rank", "rank": 12, "logprob_dtype": "float32"},
    "uint8, states of the reader, draws": {
        "k": 8,
        "tail_blocks": 3,
        "logprob_dtype": "uint8",
        "states": "fp8",
        "draws": 3,
        "layers": LayersConfig("all", match="hidden"),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_it_comes_within_a_hundredth_of_what_is_written(
    begin: Callable[..., Any], tmp_path: Any, rows: Any, case: str
) -> None:
    run = begin(tmp_path / "run", rows=many(rows), **CASES[case])
    cost = ask(run)
    assert cost.basis == "estimated" and cost.firm_bytes == cost.bytes
    run.bring_up()
    assert cost.bytes == pytest.approx(on_disk(run), rel=ONE_PERCENT)
    after = ask(run)
    assert (after.lines, after.bytes, after.basis) == ((), 0, "exact"), "what is fresh costs nothing"


def test_few_samples_stand_for_all(begin: Callable[..., Any], tmp_path: Any, rows: Any, monkeypatch: Any) -> None:
    """Eight of 32 responses are measured."""
    monkeypatch.setattr(lengths, "MOST_SAMPLES", 8)
    run = begin(tmp_path / "run", rows=many(rows), k=16, states="int8", weights=WeightsConfig(layer=0))
    cost = ask(run)
    assert "responses: length of 32 estimated from 8 of them" in cost.notes
    run.bring_up()
    assert cost.bytes == pytest.approx(on_disk(run), rel=ONE_TWENTIETH)


def test_a_mass_is_bounded_by_k_until_parts_tell(begin: Callable[..., Any], tmp_path: Any, rows: Any) -> None:
    settings = {"mass": 0.5, "min_k": 2, "states": "low_rank_int8", "rank": 8}
    run = begin(tmp_path / "run", rows=many(rows), k=200, part_samples=SAMPLES // 2, **settings)
    cost = ask(run)
    assert by_name(cost)["textual: top"].basis == cost.basis == "at most"
    assert by_name(cost)["acoustic: 4 layers, low_rank_int8"].basis == "estimated"
    assert 0 < cost.firm_bytes < cost.bytes
    run.bring_up()
    before = on_disk(run)
    assert before < cost.bytes
    run.write_manifest([*many(rows), *many(rows, start=SAMPLES)])
    more = run.again()
    cost = ask(more)
    assert cost.basis == "estimated" and any("on average, as in" in note for note in cost.notes)
    assert by_name(cost).keys() == {"targets", "textual: top", "textual: lens, 3 layers", "acoustic: top", "ledger"}
    more.bring_up()
    assert cost.bytes == pytest.approx(on_disk(more) - before, rel=ONE_TWENTIETH)


def test_lengths_are_exact_where_targets_are_there(made: Any) -> None:
    run = made.again(teachers=made.teachers(k=12))
    cost = ask(run)
    rows = {(row.id, row.source): row for row in run.ledger.rows()}
    tokens = sum(row.tokens for (_, source), row in rows.items() if source == "textual")
    assert by_name(cost)["textual: top"].tokens == tokens and by_name(cost)["textual: top"].basis == "exact"
    assert "targets" not in by_name(cost), "they are fresh"


def test_what_rows_hold_beyond_is_made_again(made: Any) -> None:
    """More entries at fewer layers: the row is replaced by one with both."""
    run = made.again(teachers=made.teachers(k=12), layers=LayersConfig("skip", every=2))
    assert "textual: lens, 3 layers" in by_name(ask(run))


def test_traces_to_be_written_are_bounded(begin: Callable[..., Any], tmp_path: Any) -> None:
    run = begin(tmp_path / "run")
    lines = (run.base / "manifest.jsonl").read_text().replace('"trace"', '"kept"')
    (run.base / "manifest.jsonl").write_text(lines)
    plan = _pending_plan(run)
    cost = estimate(run.ctx, plan, run.needs, time=False)
    most = run.ctx.config.textualize.trace.max_tokens
    assert by_name(cost)["targets"].tokens == 4 * (most + 1) and by_name(cost)["targets"].basis == "at most"
    assert by_name(cost)["acoustic: 4 layers, float32"].basis == "estimated"
    assert any(f"max_tokens = {most:,}" in note for note in cost.notes)


def _pending_plan(run: Any) -> Any:
    from kdpipe.stages.base import compare
    from kdpipe.stages.cache_teachers.stage import STAGE
    from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE

    plans = {"textualize": compare("textualize", TEXTUALIZE.wanted(run.ctx, {}), run.ctx.ledger("textualize"))}
    return compare(STAGE.name, STAGE.wanted(run.ctx, plans), run.ledger)


def test_units_are_counted_by_clip(begin: Callable[..., Any], tmp_path: Any) -> None:
    run = begin(tmp_path / "run")
    line = by_name(ask(run))["acoustic: 4 layers, float32"]
    assert line.units == 3, "two of four samples share a clip"
    encoder, config = Encoder(run.needs.student), run.ctx.config.data
    clips = {sample.audio[0].name: sample.audio[0] for sample in run.ctx.samples("train")}
    heard = [len(decode(ref, rate=encoder.rate, max_seconds=config.max_seconds)) for ref in clips.values()]
    assert line.tokens == sum(map(encoder.audio_tokens, heard))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 64, 200])
def test_array_bytes_are_those_of_the_writer(tmp_path: Any, rows: int) -> None:
    specs = [ArraySpec("wide", (1 << 15,), "uint8"), *hidden_specs(3, 1 << 17, "int8")]
    for number, spec in enumerate(specs):
        writer = ArrayWriter(tmp_path / str(number), spec, 1 << 22)
        writer.append(np.zeros((rows, *spec.width), spec.dtype))
        writer.close()
        shards = (tmp_path / str(number)).glob("c/**/*")
        written = sum(path.stat().st_size for path in shards if path.is_file())
        assert array_bytes(spec, np.array([rows]), 1 << 22).tolist() == [written]


def test_parts_do_not_cross_windows() -> None:
    units, tokens = cut(np.array([3, 1, 2, 9, 8, 7]), 2, np.array([0, 0, 0, 4, 4, 4]))
    assert units.tolist() == [2, 1, 2, 1] and tokens.tolist() == [3, 3, 15, 9]
    units, tokens = cut(np.array([3, 1, 2]), 2)
    assert units.tolist() == [2, 1] and tokens.tolist() == [4, 2]


def test_a_sample_is_spread_over_all() -> None:
    assert lengths.evenly(range(10), 3) == [1, 5, 8]
    assert lengths.stretched([5, 9], 4).tolist() == [5, 5, 9, 9]
    assert lengths.stretched([], 2).tolist() == [0, 0]


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; import kdpipe.pipeline.runner, kdpipe.pipeline.cost; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_damaged_clip_counts_as_nothing(begin: Callable[..., Any], tmp_path: Any) -> None:
    run = begin(tmp_path / "run")
    (sample, *_) = run.ctx.samples("train")
    (run.base / "a.wav").write_bytes(b"RIFF")
    assert lengths.audio_tokens(run.ctx, run.needs.student, sample) == 0
    data = dataclasses.replace(sample.audio[0], path=None, data=(run.base / "b.flac").read_bytes())
    assert lengths.clip_seconds(data) == pytest.approx(1.9, abs=1e-4)
