"""README.md of a student: what it was made from, how, and with which result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.train.guards import skipped
from kdpipe.stages.train.terms import Terms

_PACKAGES = ("kdpipe", "torch", "transformers")


@dataclass(frozen=True)
class Made:
    """What a student was made from.

    Attributes:
        base: the checkpoint training started from.
        textual: the textual teacher, or None where no term needs it.
        acoustic: the acoustic teacher, likewise.
        terms: of the loss.
        settings: the identity fields of the `train` section.
        samples: samples trained on.
        response_tokens: their response tokens, one epoch.
        steps: optimizer steps.
        exported: the one after which the weights are the student's.
        identity: digest of everything that decided the student.
        metrics: lines of metrics.jsonl.
        prompt: the student's prompt template.
        system: its system message, or None.
        lora: what was adapted and how, or None where the weights themselves were trained.
    """

    base: ModelFolder
    textual: ModelFolder | None
    acoustic: ModelFolder | None
    terms: Terms
    settings: Mapping[str, Any]
    samples: int
    response_tokens: int
    steps: int
    exported: int
    identity: str
    metrics: Sequence[Mapping[str, Any]]
    prompt: str
    system: str | None
    lora: str | None = None


def model_card(made: Made) -> str:
    """The text of README.md, with the metadata block that the Hugging Face hub reads."""
    metadata = ["---", "library_name: transformers", "tags: [audio, distillation, kdpipe]"]
    if made.base.commit is not None:
        metadata.append(f"base_model: {made.base.name}")
    metadata.append("---")
    teachers = []
    if made.textual is not None:
        teachers.append(f"- textual teacher: {_named(made.textual)}")
    if made.acoustic is not None:
        teachers.append(f"- acoustic teacher: {_named(made.acoustic)}")
    lines = [
        *metadata,
        "",
        f"# {plain(made.base.path.name if made.base.commit is None else made.base.name)}, distilled with kdpipe",
        "",
        f"- base model: {_named(made.base)}",
        *teachers,
        f"- data: {made.samples} samples, {made.response_tokens} response tokens",
        f"- training: {made.steps} steps{_passed_over(made.metrics)}{_chosen(made)}",
        *([f"- LoRA, merged into these weights: {plain(made.lora)}"] if made.lora is not None else []),
        f"- identity: `{made.identity}`",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in _PACKAGES)}",
        "",
        "## Prompt",
        "",
        "The clips, then this text, in the chat template; `{choices}` is written `Choices: A, B, C`, or nothing.",
        "",
        *fenced(made.prompt),
        "",
        *(["System message:", "", *fenced(made.system), ""] if made.system is not None else []),
        "## Loss",
        "",
        *(f"- {plain(text)}" for text in made.terms.describe()),
        "",
        "## Metrics of training",
        "",
        *_metrics_table(made.metrics),
        "",
        "## Settings",
        "",
        *fenced(json.dumps(made.settings, indent=2, default=dict), "json"),
        "",
    ]
    return "\n".join(lines)


def plain(text: str) -> str:
    """The text in one line of Markdown, as it stands: no markup, no HTML, no link."""
    return re.sub(r"[\\`*\[\]<&|]", r"\\\g<0>", " ".join(text.split()))


def fenced(text: str, language: str = "") -> list[str]:
    """Lines of a code block that the text cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def _named(folder: ModelFolder) -> str:
    name = folder.name if folder.commit is not None else folder.path.name
    return plain(f"{name} ({folder.commit})" if folder.commit else name)


def _passed_over(metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = [str(line["step"]) for line in skipped(metrics)]
    if not steps:
        return ""
    return f", {len(steps)} of them skipped because loss or gradient was not finite (step {', '.join(steps)})"


def _chosen(made: Made) -> str:
    if made.exported == made.steps:
        return ""
    return f"; the weights are those after step {made.exported}, where the held-out loss was lowest"


def _metrics_table(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    measured = [line for line in metrics if "validation" in line]
    metrics = [line for line in metrics if "validation" not in line and "skipped" not in line]
    if not metrics:
        return ["No step was logged."]
    first, last = metrics[0], metrics[-1]
    names = [name for name in ("loss", *last.get("terms", {})) if name]
    rows = [f"| | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    for name in names:
        values = [line["loss"] if name == "loss" else line["terms"].get(name, float("nan")) for line in (first, last)]
        rows.append(f"| {name} | {values[0]:.4f} | {values[1]:.4f} |")
    if measured:
        found = measured[-1]["validation"]
        text = f"Held-out loss on {found['samples']} samples: {found['loss']:.4f} after step {measured[-1]['step']}"
        if "best_loss" in found:
            text += f"; the lowest was {found['best_loss']:.4f} after step {found['best_step']}"
        rows += ["", f"{text}."]
    return rows
