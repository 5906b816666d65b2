"""What the teacher store holds: by source how much, in which layout, and how faithful."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.mend import size_of
from kdpipe.data.store.metadata import load_attributes
from kdpipe.pipeline.cache import garbage, store_folder
from kdpipe.pipeline.cost import human_bytes
from kdpipe.pipeline.terminal import names
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.stage import STAGE

_SOURCES = ("targets", "textual", "acoustic", "acoustic_top")


@dataclass
class _Source:
    """What is stored of one source, summed over its parts."""

    samples: set[str] = field(default_factory=set)
    units: int = 0
    tokens: int = 0
    parts: int = 0
    bytes: int = 0
    unused: float = 0.0
    layouts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    fidelity: list[tuple[int, float, float, float, str]] = field(default_factory=list)


def overview(ctx: Context) -> list[str]:
    """What is in the store, in lines: by source how much, in which layout, and how faithful.

    Raises:
        KdpipeError: nothing is cached yet, or a part that is asked for is damaged.
    """
    folder = store_folder(ctx)
    ledger = ctx.ledger(STAGE.name)
    by_part: dict[str, list[Row]] = defaultdict(list)
    for row in ledger.rows():
        by_part[row.part].append(row)
    lost = ledger.lost_parts()
    sources: dict[str, _Source] = defaultdict(_Source)
    for name, rows in by_part.items():
        if name not in lost:
            _add_part(sources, ledger.parts / name, rows)
    left = sum(size for _, _, size in garbage(ctx, ledger))
    unused = sum(source.unused for source in sources.values())
    total = sum(source.bytes for source in sources.values())
    samples = {row.id for row in ledger.rows()}
    lines = [
        f"{folder}",
        f"{len(samples):,} samples in {len(by_part) - len(lost):,} parts, {human_bytes(total)}; "
        f"{human_bytes(round(unused))} of it for units",
        f"that no sample needs any more; {human_bytes(left)} beside it that the manifest does not name",
        "",
        f"{'source':<14}{'samples':>9}{'units':>9}{'tokens':>13}{'parts':>8}{'bytes':>12}{'a token':>12}",
    ]
    ordered = sorted(sources, key=lambda s: _SOURCES.index(s) if s in _SOURCES else len(_SOURCES))
    for name in ordered:
        one = sources[name]
        each = f"{one.bytes / one.tokens:,.1f} B" if one.tokens else ""
        lines.append(
            f"{name:<14}{len(one.samples):>9,}{one.units:>9,}{one.tokens:>13,}{one.parts:>8,}"
            f"{human_bytes(one.bytes):>12}{each:>12}"
        )
    for name in ordered:
        lines += ["", name, *_details(sources[name])]
    if lost:
        gone = {row.id for part in lost for row in by_part[part]}
        lines += ["", f"{len(lost)} parts are gone, with {len(gone)} samples: {names(sorted(gone))}"]
    return lines


def _add_part(sources: dict[str, _Source], part: Path, rows: Sequence[Row]) -> None:
    attributes = load_attributes(part)
    units, size = attributes["units"], size_of(part)
    tokens = sum(unit["tokens"] for unit in units)
    used = sum(units[place]["tokens"] for place in {row.row for row in rows})
    one = sources[attributes["source"]]
    one.samples |= {row.id for row in rows}
    one.units += len(units)
    one.tokens += tokens
    one.parts += 1
    one.bytes += size
    one.unused += size * (tokens - used) / tokens if tokens else 0
    one.layouts[_layout_lines(attributes)] += 1
    for name, seen in attributes.get("fidelity", {}).items():
        numbers = seen["cosine_mean"], seen["cosine_worst"], seen["relative_error"]
        one.fidelity.append((seen["tokens"], *numbers, name.removeprefix("hidden/").lstrip("0")))


def _layout_lines(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    lines = []
    arrays = attributes["arrays"]
    if "target_ids" in arrays:
        lines.append("the response in token ids of the student, uint32")
    if "distributions" in attributes:
        layout = Layout.of(attributes)
        lens = [int(name.split("/")[1]) for name in arrays if name.startswith("lens/") and name.endswith("/log_z")]
        which = "the last layer" if "top/log_z" in arrays else ""
        which += (" and " if which else "") + f"the lens of {_layers(lens)}" if lens else ""
        kept = f"{layout.kept} ids" if layout.mass is None else f"ids that reach {layout.mass:g} of the mass"
        bounds = "" if layout.mass is None else f" ({layout.min_k} to {layout.kept})"
        tails = "one tail" if layout.blocks == 1 else f"tails of {layout.blocks} vocabulary blocks"
        lines.append(f"distributions of {which}")
        lines.append(f"of each token {kept}{bounds} of {layout.bits} bits, log-probabilities {layout.logprob},")
        lines.append(f"{tails}, temperatures {', '.join(f'{t:g}' for t in layout.temperatures)}")
        if layout.draws is not None:
            lines.append(f"{layout.draws['count']} ids drawn from the tail beside {layout.draws['k']}")
    if "states" in attributes:
        about = attributes["states"]
        rank = f", rank {about['rank']}" if "rank" in about else ""
        lines.append(f"states of {_layers(about['layers'])}, width {about['width']}, codec {about['codec']}{rank}")
    return tuple(lines)


def _details(one: _Source) -> list[str]:
    lines = []
    for texts, count in one.layouts.most_common():
        if len(one.layouts) > 1:
            lines.append(f"  in {count} of {one.parts} parts:")
        lines += [f"  {text}" for text in texts]
    if one.fidelity:
        tokens = sum(entry[0] for entry in one.fidelity) or 1
        mean = sum(n * cosine for n, cosine, *_ in one.fidelity) / tokens
        error = math.sqrt(sum(n * relative**2 for n, _, _, relative, _ in one.fidelity) / tokens)
        worst = min(one.fidelity, key=lambda entry: entry[2])
        lines.append(
            f"  measured on {tokens:,} states while writing: cosine {mean:.6f} in the mean, {worst[2]:.6f} at worst "
        )
        lines.append(f"  (layer {worst[4]}), relative error {error:.2e} over all layers")
    return lines


def _layers(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 1-4, 9`."""
    runs = []
    for _, group in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"layer{'' if len(runs) == 1 and '-' not in runs[0] else 's'} {', '.join(runs)}"
