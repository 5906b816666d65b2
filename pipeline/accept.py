"""Taking what there is as what is asked for, deliberately: `kdpipe accept`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from kdpipe.data.errors import KdpipeError
from kdpipe.data.ledger_rows import Row
from kdpipe.pipeline.lock import hold
from kdpipe.pipeline.lock_file import write_lock_file
from kdpipe.pipeline.plan import STAGES, Cause, causes_of, has_work
from kdpipe.pipeline.recall import look
from kdpipe.pipeline.runner import Request
from kdpipe.stages.base import StagePlan, Wanted
from kdpipe.stages.environment import environment

_OF_THE_RESPONSE = frozenset(("content", "student.tokenizer", "alignment"))
"""Fields that say to which token ids the rows of a teacher belong: under others they would be rows of other tokens."""


def accept(request: Request, stages: Iterable[str], *, dry_run: bool = False) -> Iterator[str]:
    """Gives what stages have the keys that are asked for, and says what was changed and what could not be accepted.

    The parts stay as they are. A row remembers the key that its part was made under, so that what is made from it
    stays fresh, and so does the row itself when the configuration is put back.

    Args:
        request: configuration file and overrides.
        stages: names.
        dry_run: change nothing.

    Yields:
        Lines for the user, a stage's when it is done.

    Raises:
        KdpipeError: a stage waits for an earlier one, or the run cannot be read.
    """
    ctx = request.context()
    with hold([ctx.run_folder, ctx.cache_folder]):
        for name in (name for name in STAGES if name in set(stages)):
            ctx = request.context()
            plan = look(ctx, name).plans[name]
            if not has_work(plan):
                yield f"{name}: everything is fresh"
                continue
            waits = {want.pending for want in plan.todo if want.pending is not None}
            if waits and (STAGES[name].whole or all(want.pending for want in plan.todo)):
                earlier = ", ".join(sorted(waits))
                if dry_run:
                    yield f"{name}: what is asked of it is known once {earlier} is fresh or accepted"
                    continue
                raise KdpipeError(f"{name}: waits for {earlier}. Accept or run that first; it decides what is asked.")
            by = environment(ctx, name)
            rows = []
            accepted, refused = Counter[str](), Counter[str]()
            lost = plan.ledger.lost_parts()
            for want, causes in ((want, causes_of(plan, want, lost)) for want in plan.todo):
                why_not = _obstacle(plan, want, causes, lost)
                row = plan.ledger.get(want.id, want.source) or _template(plan)
                if why_not is not None or row is None:
                    refused[f"{want.source}: {why_not or 'new'}"] += 1
                    continue
                rows.append(_as_wanted(row, want, by.accepting(row.made_with) if by.strict else row.made_with))
                accepted.update(f"{want.source}: {cause}" for cause in causes)
            drop = plan.removed if STAGES[name].whole else []
            lines = [f"  accepted    {text}: {count}" for text, count in sorted(accepted.items())]
            lines += [f"  accepted    {source}: made from {n} more samples" for source, n in _sources(drop)]
            lines += [f"  left        {text}: {count}" for text, count in sorted(refused.items())]
            if (rows or drop) and not dry_run:
                plan.ledger.commit(rows, drop=drop)
            yield f"{name}: {len(rows)} of {len(plan.todo)} {'would be ' if dry_run else ''}taken as they are"
            yield from lines
        if not dry_run:
            last = look(request.context())
            write_lock_file(last.ctx, last.plans)


def _obstacle(plan: StagePlan, want: Wanted, causes: Iterable[Cause], lost: set[str]) -> str | None:
    """Why a want cannot be met by what there is, or None."""
    for cause in causes:
        if cause.kind == "new" and STAGES[plan.stage].whole and _template(plan) is not None:
            continue
        if cause.kind != "changed":
            return str(cause)
        if cause.name in _OF_THE_RESPONSE:
            return f"{cause}: made for the tokens of another response"
    row = plan.ledger.get(want.id, want.source) or _template(plan)
    return None if row is None or row.part not in lost else f"{row.part} is gone or lacks files"


def _template(plan: StagePlan) -> Row | None:
    """What is made of all samples together is also that of a sample it was made without."""
    return next(iter(plan.ledger.rows()), None) if STAGES[plan.stage].whole else None


def _as_wanted(row: Row, want: Wanted, made_with: str) -> Row:
    key = want.key
    held_as = "" if row.part_key == key else row.part_key
    return replace(row, id=want.id, key=key, fields=want.fields, held_as=held_as, made_with=made_with)


def _sources(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
    return sorted(Counter(source for _, source in pairs).items())
