"""What is fresh, what is stale, and why: by sample, from keys alone, without loading a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdpipe.stages.base import Context, Stage, StagePlan, Wanted, compare, covers
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.evaluate.stage import STAGE as EVALUATE
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.train.stage import STAGE as TRAIN

STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (TEXTUALIZE, CACHE_TEACHERS, TRAIN, EVALUATE)}
"""The stages in the order they run."""

State = Literal["fresh", "partial", "stale", "missing"]


@dataclass(frozen=True)
class StageStatus:
    """A stage's state in a few words and numbers.

    Attributes:
        name: the stage.
        state: fresh: nothing to do; partial: some done, the rest new; stale: something was made from other
            inputs; missing: nothing done.
        total, fresh, stale, rejected: samples; total = fresh + stale + rejected.
        reasons: one line each.
    """

    name: str
    state: State
    total: int
    fresh: int
    stale: int
    rejected: int
    reasons: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The form of `kdpipe status --json`."""
        samples = {"total": self.total, "fresh": self.fresh, "stale": self.stale, "rejected": self.rejected}
        return {"name": self.name, "state": self.state, "samples": samples, "reasons": list(self.reasons)}


def upstream(name: str) -> list[str]:
    """The stages that `name` needs, directly or not, and itself, in the order they run."""
    needed = {name}
    for stage in reversed(tuple(STAGES)):
        if stage in needed:
            needed |= set(STAGES[stage].needs)
    return [stage for stage in STAGES if stage in needed]


def make_plans(ctx: Context, target: str | None = None) -> dict[str, StagePlan]:
    """Plans of all stages, or of those that `target` needs.

    Raises:
        KdpipeError: the manifest, a model folder or a ledger cannot be read.
    """
    plans: dict[str, StagePlan] = {}
    for name in STAGES if target is None else upstream(target):
        plans[name] = compare(name, STAGES[name].wanted(ctx, plans), ctx.ledger(name))
    ctx.prints.save()
    return plans


def has_work(plan: StagePlan) -> bool:
    """Whether the stage would run."""
    return bool(plan.todo) or (STAGES[plan.stage].whole and bool(plan.removed))


def status_of(plan: StagePlan) -> StageStatus:
    """Counts a plan by sample and says why it is not fresh."""
    stale_ids = {want.id for want in plan.todo}
    rejected_ids = {sample for sample, _ in plan.rejected} - stale_ids
    ids = {want.id for want in plan.wanted}
    return StageStatus(
        name=plan.stage,
        state=_state(plan),
        total=len(ids),
        fresh=len(ids) - len(stale_ids) - len(rejected_ids),
        stale=len(stale_ids),
        rejected=len(rejected_ids),
        reasons=tuple(_reasons(plan)),
    )


def _had(plan: StagePlan, want: Wanted) -> bool:
    pair = (want.id, want.source)
    return plan.ledger.get(*pair) is not None or plan.ledger.rejected(*pair) is not None


def _state(plan: StagePlan) -> State:
    if not has_work(plan):
        return "fresh"
    if not any(True for _ in plan.ledger.rows()) and not plan.rejected:
        return "missing"
    if plan.removed and STAGES[plan.stage].whole:
        return "stale"
    if any(_had(plan, want) for want in plan.todo):
        return "stale"
    return "partial" if plan.fresh or plan.rejected else "missing"


def _reasons(plan: StagePlan) -> list[str]:
    totals = Counter(want.source for want in plan.wanted)
    lost = plan.ledger.lost_parts()
    new: Counter[str] = Counter()
    waiting: Counter[tuple[str, str]] = Counter()
    gone: Counter[tuple[str, str]] = Counter()
    other: Counter[str] = Counter()
    small: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    changes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for want in plan.todo:
        row = plan.ledger.get(want.id, want.source)
        if want.pending is not None:
            waiting[want.source, want.pending] += 1
        elif row is None:
            (other if _had(plan, want) else new)[want.source] += 1
        elif row.part in lost:
            gone[want.source, row.part] += 1
        elif row.key == want.key:
            for name, value in want.cover.items():
                if not covers(row.cover, {name: value}):
                    small[want.source, name][f"{row.cover.get(name)} -> {value}"] += 1
        else:
            for name in sorted({*row.fields, *want.fields}):
                old, now = row.fields.get(name, "none"), want.fields.get(name, "none")
                if old != now:
                    changes[want.source, name][f"{old[:8]} -> {now[:8]}"] += 1
    lines = [f"{source}: waits for {stage}: {n} of {totals[source]}" for (source, stage), n in waiting.items()]
    for kind in (changes, small):
        for (source, name), counts in sorted(kind.items()):
            n = counts.total()
            how = next(iter(counts)) + ": " if len(counts) == 1 else "changed: "
            lines.append(f"{source}: {name} {how}{n} of {totals[source]}")
    lines += [f"{source}: was rejected, and its inputs changed: {n}" for source, n in other.items()]
    lines += [f"{source}: part {part} is gone: {n} of {totals[source]}" for (source, part), n in gone.items()]
    lines += [f"{source}: {n} new" for source, n in new.items()]
    removed = Counter(source for _, source in plan.removed)
    unasked = "no longer wanted" if STAGES[plan.stage].whole else "kept that this configuration does not ask for"
    lines += [f"{source}: {n} {unasked}" for source, n in removed.items()]
    reasons = Counter(reject.reason for reject in plan.ledger.rejects() if (reject.id, reject.source) in plan.rejected)
    lines += [f"rejected: {reason}: {n}" for reason, n in reasons.most_common()]
    return lines
