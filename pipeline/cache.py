"""What `kdpipe cache` does: says what the teacher store holds, proves and mends it, and removes what nothing needs."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from kdpipe.data.errors import KdpipeError
from kdpipe.data.files import remove
from kdpipe.data.ledger import Ledger, Row, old_manifests
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.mend import DAMAGED, Findings, examine, mend, size_of
from kdpipe.data.store.metadata import load_attributes
from kdpipe.pipeline.cost import human_bytes
from kdpipe.pipeline.lock import hold
from kdpipe.pipeline.terminal import names, printable
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.progress import progress

_SOURCES = ("targets", "textual", "acoustic", "acoustic_top")
_NAMED_DAMAGES = 8


def store_folder(ctx: Context) -> Path:
    """Folder of the teacher store.

    Raises:
        KdpipeError: there is none yet.
    """
    folder = ctx.folder(STAGE.name)
    if not folder.is_dir():
        raise KdpipeError(f"{folder}: nothing is cached yet. Run `kdpipe {STAGE.name}`.")
    return folder


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
    garbage = sum(size for _, _, size in _garbage(ctx, ledger, ()))
    unused = sum(source.unused for source in sources.values())
    total = sum(source.bytes for source in sources.values())
    samples = {row.id for row in ledger.rows()}
    lines = [
        f"{folder}",
        f"{len(samples):,} samples in {len(by_part) - len(lost):,} parts, {human_bytes(total)}; "
        f"{human_bytes(round(unused))} of it for units that no sample needs any more; {human_bytes(garbage)} of garbage "
        "beside it (`kdpipe cache gc`)",
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
        lines.append(
            f"of each token {kept}{bounds} of {layout.bits} bits, log-probabilities {layout.logprob}, {tails}, "
            f"temperatures {', '.join(f'{t:g}' for t in layout.temperatures)}"
        )
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
            f"  as stored against as computed: cosine {mean:.6f} in the mean, {worst[2]:.6f} at worst (layer {worst[4]}), "
            f"relative error {error:.2e}"
        )
    return lines


def _layers(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 1-4, 9`."""
    runs = []
    for _, group in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"layer{'' if len(runs) == 1 and '-' not in runs[0] else 's'} {', '.join(runs)}"


def verify(ctx: Context, *, report_only: bool = False) -> tuple[bool, list[str]]:
    """Proves every byte of the store, under the run's lock, and sets aside what is damaged.

    Args:
        ctx: the run.
        report_only: change nothing.

    Returns:
        Whether all is sound, and what to say.

    Raises:
        KdpipeError: nothing is cached yet, another process works in the run folder, or a file may not be read.
    """
    folder = store_folder(ctx)
    with _lock(ctx):
        started = time.perf_counter()
        findings = _examine(folder)
        seconds = time.perf_counter() - started
        looked = f"{folder}: {findings.parts} parts, {human_bytes(findings.bytes)}, looked at in {seconds:.1f} s"
        if not findings.damages:
            return True, [f"{looked} ({human_bytes(round(findings.bytes / seconds))}/s): every byte is sound"]
        lines = [f"{looked}: {len(findings.damages)} damages", *_damage_lines(folder, findings)]
        if report_only:
            return False, [*lines, "", "Nothing was changed (--report-only)."]
        moved = mend(folder, ctx.tmp(STAGE.name), findings)
        return False, [*lines, *_mended_lines(ctx, folder, findings, moved)]


def _lock(ctx: Context) -> AbstractContextManager[list[int]]:
    return hold([ctx.run_folder, ctx.cache_folder])


def _examine(folder: Path) -> Findings:
    lock, done = threading.Lock(), 0
    total = size_of(folder / "parts") // 1_000_000 if (folder / "parts").is_dir() else 0
    with progress(total, "verify", "MB") as bar:

        def told(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                if done // 1_000_000 > bar.n:
                    bar.update(min(done // 1_000_000, total) - bar.n)

        findings = examine(folder, told)
        bar.update(total - bar.n)
    return findings


def _damage_lines(folder: Path, findings: Findings) -> list[str]:
    lines = []
    for part, group in groupby(findings.damages, key=lambda damage: damage.part):
        damages = list(group)
        for damage in damages[:_NAMED_DAMAGES]:
            lines.append(f"  {printable(damage.file.relative_to(folder).as_posix())}: {damage.what}")
            if damage.samples:
                lines.append(f"      {len(damage.samples)} samples: {names(damage.samples)}")
        if len(damages) > _NAMED_DAMAGES:
            lines.append(f"  and {len(damages) - _NAMED_DAMAGES} more in {part or folder}")
    return lines


def _mended_lines(ctx: Context, folder: Path, findings: Findings, moved: Sequence[tuple[Path, Path]]) -> list[str]:
    lines = [""]
    for source, target in moved:
        where = printable(source.relative_to(folder).as_posix())
        lines.append(f"Set aside: {where} -> {target.relative_to(folder).as_posix()}")
    if findings.is_lost:
        of = "the manifest" if findings.manifest is not None else "what the parts say of themselves"
        lines.append(f"Made anew: HEAD, from {of}")
    ledger = ctx.ledger(STAGE.name)
    lost = ledger.lost_parts()
    stale = {row.id for row in ledger.rows() if row.part in lost}
    if stale or findings.is_lost or any("rejects" in path.name for path, _ in moved):
        lines.append(
            f"{len(stale)} samples lack something now. Run `kdpipe {STAGE.name}`: it makes what is missing and nothing "
            "else. What was set aside goes with `kdpipe cache gc`."
        )
    return lines


def collect_garbage(ctx: Context, *, dry_run: bool = False, unasked: bool = False) -> list[str]:
    """Removes what nothing points to, under the run's lock.

    Args:
        ctx: the run.
        dry_run: say what would go, and remove nothing.
        unasked: also forget samples that the manifest does not name any more.

    Returns:
        What went, in lines.

    Raises:
        KdpipeError: nothing is cached yet, another process works in the run folder, or `HEAD` is gone.
    """
    folder = store_folder(ctx)
    with _lock(ctx):
        ledger = ctx.ledger(STAGE.name)
        if ledger.digest is None and any(ledger.parts.glob("*.zarr")):
            raise KdpipeError(
                f"{folder / 'HEAD'}: missing, so that nothing says which parts are needed. Run `kdpipe cache verify` "
                "first: it makes the file anew from the parts."
            )
        drop = _unasked(ctx, ledger) if unasked else []
        lines = []
        if drop:
            ids = sorted({sample for sample, _ in drop})
            lines.append(f"{len(ids):>6} samples that the manifest does not name: {names(ids)}")
            if not dry_run:
                ledger.commit(drop=drop)
        garbage = _garbage(ctx, ledger, drop)
        for what, group in groupby(garbage, key=lambda entry: entry[0]):
            entries = list(group)
            size = sum(size for _, _, size in entries)
            lines.append(f"{len(entries):>6} {what}, {human_bytes(size)}: {names((p.name for _, p, _ in entries), 4)}")
            if not dry_run:
                for _, path, _ in entries:
                    remove(path)
        total = human_bytes(sum(size for _, _, size in garbage))
        if not lines:
            return [f"{folder}: nothing to remove."]
        return [*lines, f"{total} would be freed; nothing was removed." if dry_run else f"{total} freed."]


def _unasked(ctx: Context, ledger: Ledger) -> list[tuple[str, str]]:
    """Rows and rejections of samples that are not in the manifest's training split."""
    asked = {sample.id for sample in ctx.samples(ctx.config.data.train_split)}
    entries: list[Any] = [*ledger.rows(), *ledger.rejects()]
    return sorted({(entry.id, entry.source) for entry in entries if entry.id not in asked})


def _garbage(ctx: Context, ledger: Ledger, drop: Iterable[tuple[str, str]]) -> list[tuple[str, Path, int]]:
    """What nothing needs: kind, place and bytes; kinds stand together."""
    from kdpipe.pipeline.runner import _UNFINISHED

    dropped = set(drop)
    used = {row.part for row in ledger.rows() if (row.id, row.source) not in dropped}
    found: list[tuple[str, Callable[[], Iterable[Path]]]] = [
        ("parts that no sample needs", lambda: (p for p in sorted(ledger.parts.glob("*")) if p.name not in used)),
        ("old manifests", lambda: old_manifests(ledger.folder, ledger.digest)),
        ("damaged things that were set aside", lambda: sorted((ledger.folder / DAMAGED).glob("*"))),
        (
            "unfinished files",
            lambda: sorted(
                path
                for folder in {ctx.run_folder / "tmp", ctx.cache_folder / "tmp"}
                for path in folder.glob("*")
                if _UNFINISHED.match(path.name)
            ),
        ),
    ]
    return [(what, path, size_of(path)) for what, paths in found for path in paths()]
