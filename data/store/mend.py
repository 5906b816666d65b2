"""Looks at every byte of a teacher store, and sets aside what is damaged so that a run makes it anew.

The caller holds the run's lock. What is set aside lies in the folder `damaged/` of the store afterwards; nothing is
deleted.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kdpipe.data.files import fsync_path, make_folder
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import head_text, is_as_written, read_rejects, write_head
from kdpipe.data.ledger_rows import Row, Rows
from kdpipe.data.store.metadata import rows_from_parts
from kdpipe.data.store.verify import Damage, PartCheck

DAMAGED = "damaged"
"""Folder of a store that holds what was set aside."""

THREADS = min(8, os.cpu_count() or 1)

_HEAD = re.compile(rb"([0-9a-f]{32}) [0-9a-f]{32}\n")
_DIGEST_CHARS = 32
_PARTS_AT_ONCE = 4 * THREADS  # whose metadata are in memory together
_RESPONSE = ("content", "student.tokenizer")  # fields of a key that say which response a row is about


@dataclass(frozen=True)
class Findings:
    """What was found in a store.

    Attributes:
        damages: in the order of files.
        parts: parts looked at.
        bytes: of all files looked at.
        is_lost: whether `HEAD` leads to no sound manifest.
        manifest: a manifest that is sound and that `HEAD` should point to; None: there is none.
    """

    damages: tuple[Damage, ...]
    parts: int
    bytes: int
    is_lost: bool = False
    manifest: Path | None = None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what vanishes meanwhile counts nothing."""

    def size(file: Path) -> int:
        try:
            return file.lstat().st_size
        except FileNotFoundError:
            return 0

    if not path.is_dir() or path.is_symlink():
        return size(path)
    return sum(size(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def examine(folder: Path, told: Callable[[int], object] = lambda count: None) -> Findings:
    """Verifies `HEAD`, manifest, rejections and every byte of every part, and holds them against one another.

    Args:
        folder: the store, `cache-teachers/`.
        told: is told of bytes as they are done; called from several threads.

    Raises:
        StoreError: a file may not be read.
    """
    rows, manifest, damages = _check_ledger(folder)
    size = sum(size_of(path) for path in (folder / "HEAD", folder / "rejects.parquet") if path.exists())
    size += sum(size_of(path) for path in (folder / "manifests").glob("*.parquet"))
    damages += _check_rejects(folder)
    by_part: dict[str, list[Row]] = defaultdict(list)
    for row in rows or []:
        by_part[row.part].append(row)
    parts = sorted(path for path in (folder / "parts").glob("*.zarr") if path.is_dir())
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(parts), _PARTS_AT_ONCE):
            some = parts[start : start + _PARTS_AT_ONCE]
            checks = list(pool.map(lambda part: PartCheck(part, _by_row(by_part[part.name])), some))
            jobs = [(check, pool.submit(job, told)) for check in checks for job in check.jobs()]
            for check in checks:
                size += check.bytes
                damages += check.damages
                damages += [found for owner, job in jobs if owner is check for found in job.result()]
                damages += _check_rows(check, by_part[check.part.name])
    for path in sorted((folder / "parts").glob("*.zarr")) if (folder / "parts").is_dir() else []:
        if not path.is_dir():
            damages.append(Damage(path, "not a folder", path.name, tuple(row.id for row in by_part[path.name]), path))
    damages += _lost(folder, by_part.keys() - {part.name for part in parts}, by_part)
    damages += _check_lengths(folder, rows or [])
    return Findings(tuple(damages), len(parts), size, rows is None, manifest)


def mend(folder: Path, tmp: Path, findings: Findings) -> list[tuple[Path, Path]]:
    """Sets aside what is damaged, and makes the ledger anew from the parts where it is lost.

    Args:
        folder: the store.
        tmp: folder for unfinished files, on the same file system.
        findings: what `examine` found.

    Returns:
        What was moved, from where and to where.
    """
    asides = [damage.aside for damage in findings.damages if damage.aside is not None]
    if findings.is_lost:
        asides.append(folder / "HEAD")
    moved = [(path, _set_aside(path, folder)) for path in dict.fromkeys(asides) if os.path.lexists(path)]
    if findings.is_lost:
        if findings.manifest is not None:
            write_head(folder, findings.manifest, tmp)
        else:
            ledger = Ledger(folder, tmp)
            rejected = {(reject.id, reject.source) for reject in ledger.rejects()}
            # What was rejected was rejected after its rows were made.
            ledger.commit(row for row in rows_from_parts(folder / "parts") if (row.id, row.source) not in rejected)
    return moved


def _check_ledger(folder: Path) -> tuple[list[Row] | None, Path | None, list[Damage]]:
    """Rows of the current manifest, or None and the manifest that should be it; and what is wrong."""
    head, manifests = folder / "HEAD", sorted((folder / "manifests").glob("*.parquet"))
    try:
        raw = head.read_bytes()
    except FileNotFoundError:
        if not manifests and not any((folder / "parts").glob("*.zarr")):
            return [], None, []
        raw = None
    except IsADirectoryError:
        raw = b""
    match = _HEAD.fullmatch(raw or b"")
    named = folder / "manifests" / f"{match[1].decode()}.parquet" if match is not None else None
    if named in manifests and named.is_file() and head_text(named).encode() == raw:
        try:
            return list(Rows.read(named)), None, []
        except ValueError as error:
            return None, None, [Damage(named, f"cannot be read ({error})", aside=named)]
    sound = [path for path in manifests if _is_proven(path)]
    if named in sound and not _is_alike(raw or b"", head_text(named).encode()):
        sound.remove(named)
    if named in manifests and named not in sound:
        return None, None, [Damage(named, "damaged (its content is not what HEAD says)", aside=named)]
    found = named if named in sound else sound[0] if len(sound) == 1 else None
    if raw is None:
        return None, found, [Damage(head, "missing")]
    what = "not two digests and a line end" if named is None else "does not lead to a manifest"
    damages = [Damage(head, f"damaged ({what})", aside=head)]
    damages += [Damage(path, "damaged", aside=path) for path in manifests if path not in sound]
    return None, found, damages


def _is_proven(manifest: Path) -> bool:
    try:
        return Rows.read(manifest).digest() == manifest.stem and is_as_written(manifest)
    except (ValueError, TypeError):
        return False


def _is_alike(head: bytes, other: bytes) -> bool:
    """Whether a `HEAD` is another one with some damage: digests of different files differ nearly everywhere."""
    return sum(a != b for a, b in zip(head, other, strict=True)) < _DIGEST_CHARS // 2


def _check_rejects(folder: Path) -> list[Damage]:
    path = folder / "rejects.parquet"
    if not path.exists():
        return []
    try:
        read_rejects(path)
        what = None if is_as_written(path) else "not the bytes that its rows are written as"
    except ValueError as error:
        what = str(error)
    return [] if what is None else [Damage(path, f"damaged ({what})", aside=path)]


def _by_row(rows: Iterable[Row]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for row in rows:
        found[row.row].append(row.id)
    return dict(found)


def _check_rows(check: PartCheck, rows: Sequence[Row]) -> Iterator[Damage]:
    """Holds the rows of the manifest against the units of the part they point to."""
    if check.attributes is None:
        return
    units, source = check.attributes["units"], check.attributes["source"]
    for row in rows:
        unit = units[row.row] if 0 <= row.row < len(units) else {}
        same = (row.source, row.part_key, row.tokens) == (source, unit.get("key"), unit.get("tokens"))
        # A sample that came later may share a clip's unit without being listed there.
        if not same or ("samples" not in unit and unit["id"] != row.id):
            what = f"its row {row.row} is not {row.source} of sample {row.id!r} as the manifest says"
            yield Damage(check.part, what, check.part.name, (row.id,), check.part)


def _lost(folder: Path, names: Iterable[str], by_part: Mapping[str, Sequence[Row]]) -> Iterator[Damage]:
    for name in sorted(names):
        before = " (set aside before, and not made anew yet)" if (folder / DAMAGED / name).exists() else ""
        samples = dict.fromkeys(row.id for row in by_part[name])
        yield Damage(folder / "parts" / name, f"missing{before}", name, tuple(samples))


def _check_lengths(folder: Path, rows: Sequence[Row]) -> Iterator[Damage]:
    """Holds what teachers said of a response against its tokens, where both are of the same response."""
    targets = {row.id: row for row in rows if row.source == "targets"}
    for row in rows:
        target = targets.get(row.id)
        if target is None or row.source in ("targets", "acoustic") or row.tokens == target.tokens:
            continue
        if all(row.fields.get(name) == target.fields.get(name) for name in _RESPONSE):
            part = folder / "parts" / row.part
            what = f"has {row.tokens} rows for the {target.tokens} tokens of sample {row.id!r}"
            yield Damage(part, what, row.part, (row.id,), part)


def _set_aside(path: Path, folder: Path) -> Path:
    """Renames a damaged file or folder into `damaged/`."""
    place = path.relative_to(folder)
    name = path.name if len(place.parts) <= 2 else "-".join(place.parts[1:])
    target, number = folder / DAMAGED / name, 1
    while os.path.lexists(target):
        number += 1
        target = folder / DAMAGED / f"{name}.{number}"
    make_folder(target.parent)
    os.rename(path, target)
    fsync_path(target.parent)
    fsync_path(path.parent)
    return target
