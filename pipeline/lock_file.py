"""`kdpipe.lock`: what each stage was made from, a line a thing, so that `git diff` shows what changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kdpipe.data.fields import Fields
from kdpipe.data.files import write_atomically
from kdpipe.data.hashing import digest, digest_texts, encode_text
from kdpipe.pipeline.plan import STAGES, plainly, status_of
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.config import identity_of

_FORMAT = 2
_DIGEST = re.compile(r"[0-9a-f]{32}")
_SHOWN = 12  # characters of a digest: enough to tell two apart


def write_lock_file(ctx: Context, plans: Mapping[str, StagePlan]) -> None:
    """Writes `kdpipe.lock` where it is not as it would be.

    For each stage its version, state, counts and libraries; for each source the named digests that its keys are made
    of and that all samples have alike, as in the reasons of `kdpipe status`; what it must cover at least (k, layers,
    temperatures); and a digest of all keys.

    Args:
        ctx: the run.
        plans: of all stages, as things are on disk.
    """
    import yaml

    stages = {name: _entry(name, plan) for name, plan in plans.items()}
    document = {"format": _FORMAT, "configuration": digest(identity_of(ctx.config)), "stages": stages}
    text = "# Written by kdpipe; keep it in version control.\n" + yaml.safe_dump(document, sort_keys=False)
    target = ctx.run_folder / "kdpipe.lock"
    if not target.exists() or target.read_text(encoding="utf-8", errors="replace") != text:
        write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"), ctx.run_folder / "tmp")


def _entry(name: str, plan: StagePlan) -> dict[str, Any]:
    status, ledger = status_of(plan), plan.ledger
    rows = sorted(row for source in ledger.sources for row in ledger.values(source, "id", "source", "key"))
    texts = (f"[{encode_text(sample)},{encode_text(source)},{encode_text(key)}]" for sample, source, key in rows)
    made_with = Counter(text for source in ledger.sources for (text,) in ledger.values(source, "made_with"))
    return {
        "version": STAGES[name].version,
        "state": status.state,
        "samples": {"total": status.total, "fresh": status.fresh, "rejected": status.rejected},
        **({"accepted": plan.accepted} if plan.accepted else {}),
        "made_with": {text or "not recorded": count for text, count in sorted(made_with.items())},
        "made_from": _made_from(plan),
        **({"covers": covers} if (covers := _covers(plan)) else {}),
        "keys": digest_texts(texts),
    }


def _made_from(plan: StagePlan) -> dict[str, dict[str, str]]:
    """By source what all of its wants have alike."""
    alike: dict[str, dict[str, str]] = {}
    seen: set[tuple[str, int]] = set()
    for want in plan.wanted:
        if isinstance(want.fields, Fields):
            if (want.source, id(want.fields.names)) in seen:
                continue
            seen.add((want.source, id(want.fields.names)))
            fields = want.fields.names.common
        else:
            fields = want.fields
        before = alike.setdefault(want.source, dict(fields))
        for name in before.keys() - {name for name, value in fields.items() if before.get(name) == value}:
            del before[name]
    return {
        source: {name: value[:_SHOWN] if _DIGEST.fullmatch(value) else value for name, value in sorted(fields.items())}
        for source, fields in alike.items()
    }


def _covers(plan: StagePlan) -> dict[str, dict[str, str]]:
    """By source what is asked for beyond the key, which is alike for all of its wants."""
    asked = {want.source: want.cover for want in plan.wanted}
    return {source: {name: plainly(value) for name, value in cover.items()} for source, cover in asked.items() if cover}
