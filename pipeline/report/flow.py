"""The flow of a run with its counts, and what was rejected on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from kdpipe.data.errors import KdpipeError
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.manifest import DEFAULT_SPLIT
from kdpipe.pipeline.report.reading import STAGE_NAMES, NotThere, read_ledger, read_metrics_lines, samples_by_id
from kdpipe.stages.base import Context

_EXAMPLES = 5
_SOURCE_NAMES = {
    ("textualize", "trace"): "traces",
    ("evaluate", "base"): "answers, base",
    ("evaluate", "student"): "answers, student",
}


@dataclass(frozen=True)
class Box:
    """One step of the flow.

    Attributes:
        name: of the stage, or `manifest`.
        state: as `kdpipe status` said last (fresh, partial, stale, missing), `damaged`, or empty where it is not known.
        counts: what is there: words and number.
        note: a sentence, or empty.
    """

    name: str
    state: str = ""
    counts: Sequence[tuple[str, int]] = ()
    note: str = ""


@dataclass
class RejectGroup:
    """Rejections of one stage for one reason.

    Attributes:
        stage: where.
        reason: the code.
        count: of all.
        first: the first few of them.
    """

    stage: str
    reason: str
    count: int = 0
    first: list[Reject] = field(default_factory=list)


def flow(ctx: Context) -> list[Box]:
    """Manifest and stages, in the order in which things run through them."""
    from kdpipe.pipeline.recall import recall

    recalled = recall(ctx)
    states = {} if recalled is None else {status.name: status.state for status in recalled.statuses}
    data = ctx.config.data
    samples, problem = samples_by_id(ctx)
    if problem:
        boxes = [Box("manifest", "damaged", note=problem)]
    else:
        splits = Counter(sample.split or DEFAULT_SPLIT for sample in samples.values())
        named = dict.fromkeys((data.train_split, data.eval_split))
        counts = [(f"{_role(split, ctx)} ({split})", splits[split]) for split in named]
        others = len(samples) - sum(number for _, number in counts)
        boxes = [
            Box("manifest", counts=[("samples", len(samples)), *counts, *([("others", others)] if others else [])])
        ]
    for name in STAGE_NAMES:
        split = data.eval_split if name == "evaluate" else data.train_split
        asked = {sample.id for sample in samples.values() if (sample.split or DEFAULT_SPLIT) == split}
        boxes.append(_box(ctx, name, asked if samples else None, states.get(name, "")))
    return boxes


def _role(split: str, ctx: Context) -> str:
    data = ctx.config.data
    if data.train_split == data.eval_split:
        return "training and evaluation"
    return "training" if split == data.train_split else "evaluation"


def _box(ctx: Context, name: str, asked: Set[str] | None, state: str) -> Box:
    try:
        counts, note = (_train_counts if name == "train" else _counts)(ctx, name, asked)
    except NotThere:
        return Box(name, "missing", note="has not run")
    except (KdpipeError, OSError) as error:
        return Box(name, "damaged", note=str(error))
    return Box(name, state, counts, note)


def _counts(ctx: Context, name: str, asked: Set[str] | None) -> tuple[list[tuple[str, int]], str]:
    ledger = read_ledger(ctx, name)
    counts, unasked = [], set()
    for source in ledger.sources:
        ids = {sample for (sample,) in ledger.values(source, "id")}
        counts.append((_source_name(name, source), len(_asked(ids, asked))))
        unasked |= ids - _asked(ids, asked)
    counts.append(("rejected", len({reject.id for reject in _rejects(ledger, asked)})))
    note = f"and {len(unasked)} more samples that this manifest and split do not ask for" if unasked else ""
    return counts, note


def _asked(ids: set[str], asked: Set[str] | None) -> set[str]:
    return ids if asked is None else ids & asked


def _source_name(stage: str, source: str) -> str:
    return _SOURCE_NAMES.get((stage, source), source)


def _train_counts(ctx: Context, name: str, asked: Set[str] | None) -> tuple[list[tuple[str, int]], str]:
    counts: list[tuple[str, int]] = []
    notes = []
    try:
        lines = read_metrics_lines(ctx)
        counts.append(("steps", max(line["step"] for line in lines)))
        epochs = [line["epoch"] for line in lines if isinstance(line.get("epoch"), int)]
        counts += [("epochs", max(epochs))] if epochs else []
        skipped = sum("skipped" in line for line in lines)
        counts += [("steps skipped", skipped)] if skipped else []
        held = [line["validation"].get("samples") for line in lines if isinstance(line.get("validation"), dict)]
        counts += [("held-out samples", held[-1])] if held and isinstance(held[-1], int) else []
    except NotThere as error:
        notes.append(str(error))
    try:
        ledger = read_ledger(ctx, name)
    except NotThere:
        if not counts:
            raise
        notes.append("not finished: no student is recorded")
    else:
        ids = {sample for source in ledger.sources for (sample,) in ledger.values(source, "id")}
        counts.insert(0, ("samples trained on", len(_asked(ids, asked))))
    return counts, "; ".join(notes)


def _rejects(ledger: Ledger, asked: Set[str] | None) -> list[Reject]:
    return [reject for reject in ledger.rejects() if asked is None or reject.id in asked]


def rejects(ctx: Context) -> tuple[list[RejectGroup], list[str]]:
    """Rejections by stage and reason, the most frequent first, and what could not be read.

    Only what this manifest has counts, where it can be read.
    """
    samples, _ = samples_by_id(ctx)
    groups: dict[tuple[str, str], RejectGroup] = {}
    problems = []
    for stage in STAGE_NAMES:
        try:
            found = _rejects(read_ledger(ctx, stage), samples.keys() if samples else None)
        except NotThere:
            continue
        except (KdpipeError, OSError) as error:
            problems.append(str(error))
            continue
        for reject in sorted(found, key=lambda reject: (reject.id, reject.source)):
            group = groups.setdefault((stage, reject.reason), RejectGroup(stage, reject.reason))
            group.count += 1
            if len(group.first) < _EXAMPLES:
                group.first.append(reject)
    order = {name: place for place, name in enumerate(STAGE_NAMES)}
    return sorted(groups.values(), key=lambda group: (order[group.stage], -group.count, group.reason)), problems
