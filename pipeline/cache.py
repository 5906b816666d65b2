"""What `kdpipe cache` does to the teacher store: proves and mends it, and removes what nothing needs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from kdpipe.data.errors import KdpipeError, StoreError
from kdpipe.data.files import retire
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import old_manifests
from kdpipe.data.store.mend import DAMAGED, Findings, examine, mend, size_of
from kdpipe.data.store.metadata import part_rows
from kdpipe.pipeline.cost import human_bytes
from kdpipe.pipeline.lock import hold
from kdpipe.pipeline.terminal import names, printable
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.progress import progress

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
        speed = f" ({human_bytes(findings.bytes / seconds)}/s)" if findings.bytes > 100_000_000 else ""
        size = human_bytes(findings.bytes)
        looked = f"{folder}: {_counted(findings.parts, 'part')}, {size}, looked at in {seconds:.1f} s{speed}"
        if not findings.damages:
            return True, [f"{looked}: every byte is sound"]
        lines = [f"{looked}: {_counted(len(findings.damages), 'damage')}", *_damage_lines(folder, findings)]
        if report_only:
            return False, [*lines, "", "Nothing was changed (--report-only)."]
        moved = mend(folder, ctx.tmp(STAGE.name), findings)
        return False, [*lines, *_mended_lines(ctx, folder, findings, moved)]


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _lock(ctx: Context) -> AbstractContextManager[list[int]]:
    return hold([ctx.run_folder, ctx.cache_folder])


def _examine(folder: Path) -> Findings:
    lock, done = threading.Lock(), 0
    total = size_of(folder / "parts") // 1_000_000 if (folder / "parts").is_dir() else 0
    if not total:
        return examine(folder)
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
    for source, target in moved:
        if source.parent == ledger.parts:
            # A manifest that was made anew does not know of a part that was set aside.
            try:
                stale |= {row.id for row in part_rows(target)}
            except StoreError:
                stale |= {sample for damage in findings.damages if damage.aside == source for sample in damage.samples}
    if stale or findings.is_lost or any("rejects" in path.name for path, _ in moved):
        lines.append(
            f"{_counted(len(stale), 'sample')} without something now. Run `kdpipe {STAGE.name}`: it makes the parts "
            "that are missing, and nothing else. What was set aside goes with `kdpipe cache gc`."
        )
    return lines


def compare_live(ctx: Context, count: int) -> list[str]:
    """Asks the live teachers again about some samples and says how far the store is off, under the run's lock.

    Args:
        ctx: the run.
        count: samples of each source.

    Raises:
        KdpipeError: nothing is cached yet, another process works in the run folder, or a teacher cannot be loaded.
    """
    from kdpipe.pipeline.plan import make_plans
    from kdpipe.pipeline.worker import DEFAULTS

    store_folder(ctx)
    with _lock(ctx):
        plan = make_plans(ctx, STAGE.name)[STAGE.name]
        fresh = [want for want in plan.wanted if (want.id, want.source) in plan.fresh]
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from kdpipe.stages.cache_teachers.live import compare

        found = compare(ctx, fresh, count)
    lines = [
        "",
        f"{'against live':<14}{'samples':>9}{'tokens':>8}{'log p: mean':>14}{'worst':>10}{'variation: mean':>18}"
        f"{'worst':>10}{'cosine: mean':>15}{'worst':>10}",
    ]
    for source, one in found.items():
        numbers = one.result()
        lines.append(
            f"{source:<14}{one.samples:>9,}{one.tokens:>8,}"
            + _number(numbers, "nats", 14, ".1e")
            + _number(numbers, "variation", 18, ".1e")
            + _number(numbers, "cosine", 15, ".6f")
        )
    if not found:
        lines.append("Nothing that is stored is of this configuration; there is nothing to compare.")
    return lines


def _number(numbers: Mapping[str, float], name: str, width: int, form: str) -> str:
    texts = [f"{numbers[key]:{form}}" if (key := f"{name}_{which}") in numbers else "" for which in ("mean", "worst")]
    return f"{texts[0]:>{width}}{texts[1]:>10}"


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
        found = garbage(ctx, ledger, drop, _adoptable(ctx, ledger))
        for what, group in groupby(found, key=lambda entry: entry[0]):
            entries = list(group)
            size = sum(size for _, _, size in entries)
            lines.append(f"{len(entries):>6} {what}, {human_bytes(size)}: {names((p.name for _, p, _ in entries), 4)}")
            if not dry_run:
                for _, path, _ in entries:
                    retire(path, ctx.tmp(STAGE.name))
        total = human_bytes(sum(size for _, _, size in found))
        if not lines:
            return [f"{folder}: nothing to remove."]
        return [*lines, f"{total} would be freed; nothing was removed." if dry_run else f"{total} freed."]


def _unasked(ctx: Context, ledger: Ledger) -> list[tuple[str, str]]:
    """Rows and rejections of samples that are not in the manifest's training split."""
    asked = {sample.id for sample in ctx.samples(ctx.config.data.train_split)}
    entries: list[Any] = [*ledger.rows(), *ledger.rejects()]
    return sorted({(entry.id, entry.source) for entry in entries if entry.id not in asked})


def _adoptable(ctx: Context, ledger: Ledger) -> set[str]:
    """Parts without rows that the next run will take in: a killed run had no time to write them down."""
    from kdpipe.pipeline.plan import make_plans

    parts = ledger.unreferenced_parts()
    if not parts:
        return set()
    keys = {(want.id, want.source): want.key for want in make_plans(ctx, STAGE.name)[STAGE.name].todo}
    found = set()
    for part in parts:
        with suppress(StoreError):
            found |= {row.part for row in part_rows(part) if keys.get((row.id, row.source)) == row.key}
    return found


def garbage(
    ctx: Context, ledger: Ledger, drop: Iterable[tuple[str, str]] = (), keep: Iterable[str] = ()
) -> list[tuple[str, Path, int]]:
    """What nothing needs: kind, place and bytes; kinds stand together.

    Args:
        ctx: the run.
        ledger: of the stage.
        drop: rows that do not count.
        keep: names of parts that are needed though no row points to them.
    """
    from kdpipe.pipeline.runner import _UNFINISHED

    dropped = set(drop)
    used = {*keep, *(row.part for row in ledger.rows() if (row.id, row.source) not in dropped)}
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
