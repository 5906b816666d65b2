"""What is fresh, what is stale, and why: by sample, from keys alone, without loading a model."""

from __future__ import annotations

import difflib
import gc
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.base import Context, Stage, StagePlan, Wanted, compare, covers
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import Config
from kdpipe.stages.environment import difference, environment
from kdpipe.stages.evaluate.stage import STAGE as EVALUATE
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.train.stage import STAGE as TRAIN

STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (TEXTUALIZE, CACHE_TEACHERS, TRAIN, EVALUATE)}
"""The stages in the order they run."""

_NAMED = 3
"""Samples that a reason names; of more it gives the number alone."""

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


def upstream(name: str, config: Config) -> list[str]:
    """The stages that `name` needs, directly or not, and itself, in the order they run."""
    needed = {name}
    for stage in reversed(tuple(STAGES)):
        if stage in needed:
            needed |= set(STAGES[stage].needs(config))
    return [stage for stage in STAGES if stage in needed]


def make_plans(
    ctx: Context, target: str | None = None, made: Mapping[str, StagePlan] | None = None
) -> dict[str, StagePlan]:
    """Plans of all stages, or of those that `target` needs.

    Args:
        ctx: the run.
        target: a stage, or None for all.
        made: plans of this context that hold still.

    Raises:
        KdpipeError: the manifest, a model folder or a ledger cannot be read.
    """
    made, plans = made or {}, {}
    with without_collecting():
        for name in STAGES if target is None else upstream(target, ctx.config):
            if name in made:
                plans[name] = made[name]
            else:
                plans[name] = compare(name, STAGES[name].wanted(ctx, plans), ctx.ledger(name), environment(ctx, name))
    ctx.prints.save()
    return plans


@contextmanager
def without_collecting() -> Iterator[None]:
    """Plans are millions of objects without cycles, and looking for cycles in them takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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


def plainly(value: Any) -> str:
    """What is covered, for people: `none`, `1, 2`, `count 8, k 16`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _short(value: str) -> str:
    """The beginning of a digest; what says something for itself whole."""
    return value[:8] if re.fullmatch("[0-9a-f]{32}", value) else value


@dataclass(frozen=True)
class Cause:
    """One reason why something is to be made.

    Attributes:
        kind: `waits` for the stage `name`; `changed` in the field `name`; `more` is asked of what is covered, by
            `name`; `retried`: it was rejected under other inputs; `lost`: the part `name` is gone; `new`.
        name: see there.
        how: such as `64 -> 128`.
    """

    kind: Literal["waits", "changed", "more", "retried", "lost", "new"]
    name: str = ""
    how: str = ""

    def __str__(self) -> str:
        texts = {
            "waits": f"waits for {self.name}",
            "retried": "was rejected, and its inputs changed",
            "lost": f"{self.name} is gone or lacks files",
            "new": "new",
        }
        return texts.get(self.kind, f"{self.name} {self.how}")


def causes_of(plan: StagePlan, want: Wanted, lost: Set[str]) -> list[Cause]:
    """Why a want of `plan.todo` is to be made; `lost` as `Ledger.lost_parts` gives it."""
    row = plan.ledger.get(want.id, want.source)
    if want.pending is not None:
        return [Cause("waits", want.pending)]
    if row is None:
        return [Cause("retried" if _had(plan, want) else "new")]
    if row.part in lost:
        return [Cause("lost", row.part)]
    if want.key in (row.key, row.held_as):
        if covers(row.cover, want.cover):
            return [Cause("changed", "libraries", difference(row.made_with, plan.libraries))]
        return [
            Cause("more", name, f"{plainly(row.cover.get(name))} -> {plainly(value)}")
            for name, value in want.cover.items()
            # Without a mass, min_k is k.
            if not (name == "min_k" and not covers(row.cover, {"k": want.cover["k"]}))
            and not covers(row.cover, {name: value})
        ]
    pairs = {
        name: (row.fields.get(name, "none"), want.fields.get(name, "none")) for name in {*row.fields, *want.fields}
    }
    return [
        Cause("changed", name, f"{_short(old)} -> {_short(new)}")
        for name, (old, new) in sorted(pairs.items())
        if old != new
    ]


def why(plans: Mapping[str, StagePlan], sample: str) -> list[tuple[str, str, str, str]]:
    """Where one sample stands in each stage.

    Returns:
        Stage, source, state (fresh, rejected, waiting, stale, missing, unasked), and the reason or the place; in the
        order of the stages. What is there and asked for no more is `unasked`, and makes a student that was made from it
        `stale`.

    Raises:
        KdpipeError: no stage knows such a sample.
    """
    lines = []
    asks_no_more = (
        "this configuration does not ask for it"
        if any(want.id == sample for plan in plans.values() for want in plan.wanted)
        else "the sample is not in the manifest any more, or in no split that is used"
    )
    for name, plan in plans.items():
        lost = plan.ledger.lost_parts()
        todo = {want.source: want for want in plan.todo if want.id == sample}
        for want in (want for want in plan.wanted if want.id == sample):
            pair = (want.id, want.source)
            row, reject = plan.ledger.get(*pair), plan.ledger.rejected(*pair)
            if want.source in todo:
                causes = causes_of(plan, want, lost)
                state = "waiting" if want.pending else "stale" if _had(plan, want) else "missing"
                lines.append((name, want.source, state, "; ".join(map(str, causes))))
            elif pair in plan.rejected and reject is not None:
                lines.append((name, want.source, "rejected", f"{reject.reason}: {reject.detail}"))
            elif row is not None:
                lines.append((name, want.source, "fresh", f"{row.part}, row {row.row}"))
        for source in (source for id_, source in plan.removed if id_ == sample):
            row = plan.ledger.get(sample, source)
            if STAGES[name].whole:
                lines.append((name, source, "stale", "made from this sample, which is no longer wanted"))
            elif row is not None:
                lines.append((name, source, "unasked", f"{row.part}, row {row.row}, is kept; {asks_no_more}"))
    if not lines:
        known = sorted({want.id for plan in plans.values() for want in plan.wanted})
        near = difflib.get_close_matches(sample, known, 3)
        hint = f" Did you mean {', '.join(map(_printable, near))}?" if near else ""
        raise KdpipeError(f"{_printable(sample)}: no stage has a sample of that id.{hint}")
    return lines


def _reasons(plan: StagePlan) -> list[str]:
    totals = Counter(want.source for want in plan.wanted)
    lost = plan.ledger.lost_parts()
    new: dict[str, list[str]] = defaultdict(list)
    waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
    gone: dict[tuple[str, str], list[str]] = defaultdict(list)
    other: dict[str, list[str]] = defaultdict(list)
    small: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    changes: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for want in plan.todo:
        for cause in causes_of(plan, want, lost):
            place = want.source, cause.name
            if cause.kind in ("changed", "more"):
                (changes if cause.kind == "changed" else small)[place][cause.how].append(want.id)
            elif cause.kind in ("waits", "lost"):
                (waiting if cause.kind == "waits" else gone)[place].append(want.id)
            else:
                (new if cause.kind == "new" else other)[want.source].append(want.id)
    lines = [f"{source}: waits for {stage}: {_which(ids, totals[source])}" for (source, stage), ids in waiting.items()]
    for kind in (changes, small):
        for (source, name), by_change in sorted(kind.items()):
            ids = [sample for changed in by_change.values() for sample in changed]
            how = next(iter(by_change)) if len(by_change) == 1 else "changed"
            lines.append(f"{source}: {name} {how}: {_which(ids, totals[source])}")
    lines += [f"{source}: was rejected, and its inputs changed: {_which(ids)}" for source, ids in other.items()]
    lines += [
        f"{source}: {part} is gone or lacks files: {_which(ids, totals[source])}"
        for (source, part), ids in gone.items()
    ]
    lines += [f"{source}: {len(ids)} new{_names(ids)}" for source, ids in new.items()]
    removed = Counter(source for _, source in plan.removed)
    unasked = "no longer wanted" if STAGES[plan.stage].whole else "kept that this configuration does not ask for"
    lines += [f"{source}: {n} {unasked}" for source, n in removed.items()]
    if plan.accepted:
        lines.append(f"accepted as it is, not made so (kdpipe accept): {plan.accepted}")
    for made_with, count in sorted(plan.made_with.items()):
        changed = (
            f"with {difference(made_with, plan.libraries)}" if made_with else "with libraries that were not recorded"
        )
        lines.append(f"made {changed}: {count}, kept (run.strict_env is off)")
    reasons = Counter(reject.reason for reject in plan.ledger.rejects() if (reject.id, reject.source) in plan.rejected)
    lines += [f"rejected: {reason}: {n}" for reason, n in reasons.most_common()]
    return lines


def _which(ids: list[str], total: int | None = None) -> str:
    """How many samples, and which if they are few."""
    return f"{len(ids)}{'' if total is None else f' of {total}'}{_names(ids)}"


def _names(ids: list[str]) -> str:
    return f" ({', '.join(map(_printable, ids))})" if len(ids) <= _NAMED else ""


def _printable(sample: str) -> str:
    """A sample id that cannot disturb a terminal."""
    text = sample if sample.isprintable() else ascii(sample)
    return text if len(text) <= 60 else f"{text[:57]}..."
