"""A run to report on: a real teacher store of miniatures, and what training and evaluation would leave beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from kdpipe.data.ledger_files import Reject
from kdpipe.data.ledger_rows import Row
from kdpipe.pipeline.plan import STAGES, make_plans
from kdpipe.pipeline.runner import Request

if TYPE_CHECKING:
    from kdpipe.stages.base import Context
    from kdpipe.stages.miniature.models import Miniatures

CONFIG = """\
data: {{manifest: manifest.jsonl, max_reject_fraction: 0.5}}
student: {{model: {{path: {student}, dtype: float32}}}}
teachers:
  textual: {{model: {{path: {teacher}, dtype: float32}}}}
  k: 8
  states: int8
  part_samples: 8
  device: cpu
layers: {{mode: all}}
train: {{weights: {{top: 1, layer: 0.05, acoustic: 0.05, sft: 0.5}}}}
"""
TRACE = (
    "<THINK><PLANNING>Listen for the tones, then count them.</PLANNING><CAPTION>{n} tones, one after the other."
    "</CAPTION><REASONING>I hear {n} tones.\nSo the number is {n}.</REASONING><SUMMARY>{n} tones</SUMMARY></THINK>"
    "<RESPONSE>{n}</RESPONSE>"
)
NUMBERS = ("two", "three", "four", "five")
TASKS = ("counting", "order", "pitch")


def write_clips(base: Path) -> None:
    """Clips of 2 to 5 tones, a silent one, and one that is no sound."""
    rng = np.random.default_rng(0)
    for number in range(2, 6):
        tones = []
        for place in range(number):
            seconds = np.arange(int(0.35 * 16_000)) / 16_000
            tones += [0.4 * np.sin(2 * np.pi * 330 * (1 + 0.3 * place) * seconds) * np.hanning(len(seconds))]
        clip = np.concatenate(tones) + rng.normal(0, 0.003, number * len(tones[0]))
        soundfile.write(base / f"{number}.wav", clip, 16_000)
    soundfile.write(base / "silent.wav", np.zeros(16_000), 16_000)
    (base / "noise.wav").write_bytes(b"no sound at all")


def write_manifest(base: Path, train: int, test: int, others: Sequence[Mapping[str, Any]] = ()) -> None:
    """A row a sample: of the first training samples one has a silent clip; `others` come last."""
    rows: list[dict[str, Any]] = []
    for place in range(train + test):
        number = 2 + place % 4
        about = {
            "question": "How many tones do you hear?" if place % 3 == 0 else "How many tones follow each other here?",
            "choices": list(NUMBERS),
            "answer": NUMBERS[number - 2],
            "task": TASKS[place % 3],
            "difficulty": ("easy", "hard")[place % 2],
        }
        if place < train:
            name = NUMBERS[number - 2]
            given = {"description": f"tones: {number}", "trace": TRACE.format(n=name)}
            rows.append({"id": f"train-{place:03d}", "audio": f"{number}.wav", **about, **given})
        else:
            rows.append({"id": f"test-{place - train:03d}", "audio": f"{number}.wav", "split": "test", **about})
    rows[1] |= {"audio": "silent.wav"}
    lines = (json.dumps(row) for row in [*rows, *others])
    (base / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines))


def build_store(base: Path, family: Miniatures, *, train: int, test: int) -> Request:
    """A run up to the teacher store, made in this process."""
    base.mkdir(parents=True, exist_ok=True)
    write_clips(base)
    write_manifest(base, train, test)
    (base / "kdpipe.yaml").write_text(CONFIG.format(student=family.qwen2_5_omni, teacher=family.teacher))
    request = Request(base / "kdpipe.yaml")
    for name in ("textualize", "cache-teachers"):
        ctx = request.context()
        STAGES[name].run(ctx, make_plans(ctx, name)[name].todo)
    return request


def add_training(ctx: Context, steps: int) -> None:
    """metrics.jsonl of `steps` steps with held-out losses and a skipped step, and what the ledger would say."""
    rng = np.random.default_rng(1)
    lines: list[dict[str, Any]] = []

    def values(step: int) -> dict[str, Any]:
        fall = math.exp(-2.5 * step / steps)
        noise = rng.normal(1, 0.04, 16)
        sources: dict[str, Any] = {
            "top": {"divergence": 0.4 * fall * noise[0] + 0.05, "agreement": 0.8 - 0.4 * fall, "teacher_entropy": 0.9}
            | {"student_entropy": 0.8 + fall, "teacher_kept": 0.98, "student_kept": 0.9}
        }
        for layer in range(1, 4):
            sources[f"layer/{layer:02d}"] = {"divergence": 0.3 * fall * noise[layer] + 0.02 * layer}
            sources[f"acoustic/{layer:02d}"] = {"distance": 0.01 * layer * (1 - fall) * noise[layer + 4]}
        terms = {"top": sources["top"]["divergence"], "sft": 2.2 * fall * noise[9] + 0.3}
        terms |= {"layer": 0.5 * fall + 0.1, "acoustic": 0.03 * (1 - fall)}
        loss = terms["top"] + 0.5 * terms["sft"] + 0.05 * terms["layer"] + 0.05 * terms["acoustic"]
        return {"loss": loss, "terms": terms, "sources": sources}

    for step in range(1, steps + 1):
        epoch = 1 + 3 * (step - 1) // steps
        if step == 5:
            lines.append({"step": step, "epoch": epoch, "loss": None, "skipped": "the loss is nan", "samples": ["x"]})
            continue
        rate = 1e-3 * min(1.0, step / 5) * (1 - step / (steps + 1))
        clock = {"tokens": 600, "tokens_per_second": 500.0, "data_wait": 0.0, "peak_memory_gib": 1.0, "seconds": 1.0}
        norm = 1.5 * math.exp(-step / steps)
        lines.append({"step": step, "epoch": epoch, **values(step), "learning_rate": rate, "grad_norm": norm, **clock})
        if step % max(1, steps // 5) == 0:
            lines.append({"step": step, "validation": {**values(step), "samples": 2, "best_loss": 0.2}, "seconds": 1.0})
    folder = ctx.folder("train")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = [sample.id for sample in ctx.samples("train") if ctx.ledger("textualize").get(sample.id, "trace")]
    ctx.ledger("train").commit([Row(name, "student", "k", {}, "student") for name in ids])


def add_evaluation(ctx: Context, output: str = TRACE) -> dict[str, Any]:
    """Answers of both models in the ledger, the last sample rejected, and what evaluate makes of them.

    Gives the scores. A benchmark is added to the scores by hand: none of the samples is of one.
    """
    import pyarrow.parquet as pq

    from kdpipe.stages.evaluate.results import assemble, to_table

    *samples, last = ctx.samples("test")
    records = []
    for place, sample in enumerate(samples):
        for source, good in (("base", place % 2 == 0), ("student", place % 5 != 1 and place % 7 != 4)):
            answer = sample.answer or ""
            said = answer if good else next(choice for choice in sample.choices if choice != answer)
            records.append(
                {"id": sample.id, "source": source, "key": "k", "task": sample.task, "answer": answer}
                | {"prediction": said, "output": output.format(n=said) if source == "student" else said}
                | {"correct": good, "finish_reason": "stop", "tokens": 40}
            )
    ctx.tmp("evaluate").mkdir(parents=True, exist_ok=True)
    built = ctx.tmp("evaluate") / "part.parquet"
    pq.write_table(to_table(records), built)
    rows = [Row(record["id"], record["source"], "k", {}, built.name, place) for place, record in enumerate(records)]
    broken = [Reject(last.id, source, "k", "audio_missing", "gone.wav is gone") for source in ("base", "student")]
    ledger = ctx.ledger("evaluate")
    drop = [(row.id, row.source) for row in ledger.rows()]
    ledger.commit(rows, rejects=broken, built={built.name: built}, drop=drop)
    scores = assemble(ctx)
    scores["benchmarks"] = {
        "mmau": {
            source: {"measure": "accuracy", "official": {"score": scores[source]["accuracy"], "n": len(samples)}}
            | {"strict": {"score": scores[source]["correct"] / (len(samples) + 2), "n": len(samples) + 2}}
            for source in ("base", "student")
        }
    }
    (ctx.folder("evaluate") / "scores.json").write_text(json.dumps(scores))
    return scores


def write_rows(ctx: Context) -> dict[str, Any]:
    """rows/results.json, made by `kdpipe rows` from right and wrong answers of three seeds; gives what stands in it."""
    from kdpipe.pipeline.rows.definition import ROWS
    from kdpipe.pipeline.rows.results import Answered, results

    dice = np.random.default_rng(2)
    samples = ctx.samples("test")
    answered = [
        Answered(
            row, {seed: {one.id: bool(dice.random() < 0.5 + 0.05 * place) for one in samples} for seed in range(3)}
        )
        for place, row in enumerate(ROWS.values())
    ]
    found = results(answered, samples, {"reasoning": TASKS[:2], "hearing": TASKS[2:]})
    path = ctx.run_folder / "rows" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def build(base: Path, family: Miniatures, *, train: int = 10, test: int = 24, steps: int = 40) -> Request:
    """The whole run."""
    request = build_store(base, family, train=train, test=test)
    add_training(request.context(), steps)
    add_evaluation(request.context())
    write_rows(request.context())
    return request
