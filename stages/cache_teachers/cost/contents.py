"""What the parts that are to be made will look like, found without a teacher."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdpipe.data.errors import KdpipeError
from kdpipe.data.ledger import Ledger
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import TARGET_IDS, ArraySpec, hidden_prefix, is_low_rank
from kdpipe.data.store.metadata import load_attributes
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.cost.lengths import evenly
from kdpipe.stages.cache_teachers.cost.sizes import PartShape
from kdpipe.stages.cache_teachers.requirements import Requirements
from kdpipe.stages.cache_teachers.shape import Shape
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.environment import environment
from kdpipe.stages.models.folder import ModelFolder

Basis = Literal["exact", "estimated", "at most"]
"""How well a number is known."""

_SEEN_PARTS = 16
"""Parts whose entries are counted, for the mean in the layout `mass`."""


def least(bases: Iterable[Basis]) -> Basis:
    """The worst of them: a sum is known no better."""
    bases = set(bases)
    if "at most" in bases:
        return "at most"
    return "estimated" if "estimated" in bases else "exact"


def teacher_of(needs: Requirements, source: str) -> ModelFolder:
    """The teacher that makes a source."""
    folder = needs.textual if source == "textual" else needs.acoustic
    assert folder is not None
    return folder


def part_shape(
    ctx: Context, needs: Requirements, ledger: Ledger, source: str, cover: Mapping[str, Any], unit: Mapping[str, Any]
) -> tuple[PartShape, Basis, str | None]:
    """Shape of the parts of one source that cover what is asked.

    Args:
        ctx: the run.
        needs: what is asked of the teachers.
        ledger: of cache-teachers; its parts say how many entries reach a mass.
        source: `targets`, `textual`, `acoustic` or `acoustic_top`.
        cover: what is stored, as in `Wanted.cover`.
        unit: of the attributes of a typical unit.

    Returns:
        The shape, how well the number of entries of a distribution is known, and from what, if that is a question.
    """
    made_with = {"made_with": environment(ctx, STAGE.name).text}
    if source == "targets":
        return PartShape(source, [ArraySpec(TARGET_IDS, (), "uint32")], made_with, unit), "exact", None
    config, folder = ctx.config.teachers, teacher_of(needs, source)
    shape = Shape(config, cover, folder.width, folder.layers, needs.alignment if cover.get("k") else None, {})
    entries: dict[str, float] = {}
    basis: Basis = "exact"
    note, layout, attributes = None, shape.layout, {**shape.attributes, **made_with}
    if layout is not None and layout.mass is not None:
        entries, basis, note = _entries(ctx, ledger, source, folder, layout, shape.prefixes)
    if shape.hidden:
        seen = {"tokens": 10_000, "cosine_mean": 1 / 3, "cosine_worst": 1 / 3, "relative_error": 1 / 30}
        attributes["fidelity"] = {hidden_prefix(layer): seen for layer in shape.hidden}
    bits, rank = 0 if layout is None else layout.bits, config.rank if is_low_rank(config.states) else 0
    return PartShape(source, shape.arrays, attributes, unit, entries, bits, rank), basis, note


def _entries(
    ctx: Context, ledger: Ledger, source: str, folder: ModelFolder, layout: Layout, prefixes: Sequence[str]
) -> tuple[dict[str, float], Basis, str]:
    """Mean entries of a token by prefix: of parts of the same teacher and layout, or k."""
    field, model = "teacher.model" if source == "textual" else "acoustic.model", folder.digest(ctx.prints)
    rows = (row for row in ledger.rows() if row.source == source and row.fields.get(field) == model)
    names = evenly(sorted({row.part for row in rows}), _SEEN_PARTS)
    found, seen = mean_entries([ledger.parts / name for name in names], layout, prefixes)
    entries = {prefix: found.get(prefix, float(layout.kept)) for prefix in prefixes}
    known = f"{sum(found.values()) / len(found):.1f} on average, as in {seen} parts" if found else ""
    bound = f"{'others ' if found else ''}at most k = {layout.kept}" if len(found) < len(prefixes) else ""
    note = f"{source}: entries for the mass {layout.mass:g}: {'; '.join(filter(None, (known, bound)))}"
    return entries, "at most" if bound else "estimated", note


def mean_entries(parts: Sequence[Path], layout: Layout, prefixes: Sequence[str]) -> tuple[dict[str, float], int]:
    """Mean entries of a token by prefix, and how many parts of the same layout they are from.

    Only metadata are read; a part that is damaged or gone is passed over.
    """
    entries, tokens, seen = dict.fromkeys(prefixes, 0), dict.fromkeys(prefixes, 0), 0
    for part in parts:
        try:
            about = load_attributes(part).get("distributions", {})
            if any(about.get(name) != getattr(layout, name) for name in ("mass", "min_k", "k")):
                continue
            for prefix in prefixes:
                if (part / prefix / "logprob").exists():
                    entries[prefix] += _rows(part / prefix / "logprob")
                    tokens[prefix] += _rows(part / prefix / "log_z")
            seen += 1
        except (KdpipeError, OSError, ValueError, KeyError, IndexError):
            continue
    return {prefix: entries[prefix] / tokens[prefix] for prefix in prefixes if tokens[prefix]}, seen


def _rows(array: Path) -> int:
    return int(json.loads((array / "zarr.json").read_bytes())["shape"][0])
