"""The metadata of a part as plain JSON: what it says, whether it is whole, and the ledger rows in it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.data.errors import StoreError
from kdpipe.data.hashing import digest
from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.format import ATTRIBUTE, FORMAT, PART, TOKENS, starts_name

_FILE = "zarr.json"


def damaged(part: Path, what: str) -> StoreError:
    """The error for a part that cannot be trusted, with its remedy."""
    return StoreError(
        f"{what}. Remove the part folder {part} and run `kdpipe cache-teachers`, "
        "or let `kdpipe cache verify` set it aside first: only its samples are computed again."
    )


def raise_if_scarce(error: Exception) -> None:
    """Raises an error that says there are too many open files: nothing is wrong with the part."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error


def metadata_digest(part: Path) -> str:
    """Digest of every `zarr.json` of a part, but for the digest itself that stands in the first.

    Array data carry checksums of their own; this covers the rest.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is not JSON.
    """
    return _digest_below(part, json.loads((part / _FILE).read_bytes()))


def _digest_below(part: Path, root: Mapping[str, Any]) -> str:
    folders = folder_names(root["attributes"][ATTRIBUTE])
    return documents_digest(root, {name: json.loads((part / name / _FILE).read_bytes()) for name in folders})


def documents_digest(root: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Digest of the `zarr.json` of a part, parsed, and of those below it by their paths."""
    inner = dict(root["attributes"][ATTRIBUTE])
    inner.pop("metadata", None)
    return digest([{**root, "attributes": {**root["attributes"], ATTRIBUTE: inner}}, others])


def folder_names(attributes: Mapping[str, Any]) -> list[str]:
    """All groups and arrays below a part."""
    folders: set[str] = set()
    for name in array_names(attributes):
        steps = name.split("/")
        folders.update("/".join(steps[:depth]) for depth in range(1, len(steps) + 1))
    return sorted(folders)


def array_names(attributes: Mapping[str, Any]) -> list[str]:
    """All arrays of a part, those of the starts of its axes included."""
    axes = [about.get("axis", TOKENS) for about in attributes["arrays"].values()]
    return [*attributes["arrays"], *map(starts_name, dict.fromkeys([TOKENS, *(a for a in axes if a != PART)]))]


def crcs_of(attributes: Mapping[str, Any], name: str) -> bytes | None:
    """Checksums of the chunks of an array, 4 bytes each, as the part says them; None where it does not."""
    about = attributes["arrays"].get(name) or attributes.get("starts", {}).get(name) or {}
    return bytes.fromhex(about["crc32c"]) if "crc32c" in about else None


def load_attributes(part: Path) -> dict[str, Any]:
    """What kdpipe says about a part: its `kdpipe` attribute, proven whole.

    Raises:
        StoreError: the part is missing, damaged, not of kdpipe, or of another format version.
    """
    file = part / _FILE
    try:
        root = json.loads(file.read_bytes())
        attributes = root["attributes"][ATTRIBUTE]
        version = attributes["format"]
    except FileNotFoundError:
        raise damaged(part, f"{file}: missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_if_scarce(error)
        raise damaged(part, f"{file}: not the metadata of a part ({error!r})") from None
    if version != FORMAT:
        raise damaged(part, f"{file}: written in format {version}, and this kdpipe reads format {FORMAT}")
    try:
        found = _digest_below(part, root)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_if_scarce(error)
        raise damaged(part, f"{part}: its metadata cannot be read ({error!r})") from None
    if found != attributes.get("metadata"):
        raise damaged(part, f"{file} or a {_FILE} below it: damaged (the digest of the metadata does not match)")
    return attributes


def part_rows(part: Path, name: str | None = None) -> list[Row]:
    """The ledger rows of a finished part, made from its metadata alone.

    A stage commits exactly these, so that a ledger rebuilt from parts is the ledger that was lost.

    Args:
        part: folder of the part.
        name: its name below `parts/`; None: the folder's name.

    Raises:
        StoreError: see `load_attributes`.
    """
    attributes = load_attributes(part)
    rows = []
    for place, unit in enumerate(attributes["units"]):
        for sample in unit.get("samples", [{}]):
            entry = {**unit, **sample}
            rows.append(
                Row(
                    id=entry["id"],
                    source=attributes["source"],
                    key=unit["key"],
                    fields=entry.get("fields", {}),
                    part=name or part.name,
                    row=place,
                    tokens=entry["tokens"],
                    length=entry.get("length", 0),
                    content=entry.get("content", ""),
                    cover=entry.get("cover", {}),
                    made_with=attributes.get("made_with", ""),
                )
            )
    return rows


def rows_from_parts(parts: Path) -> Iterator[Row]:
    """The ledger rows of all parts in a folder that can be read, for a ledger that was lost.

    Where several parts hold the same sample the newest comes last, so that committing them in order keeps it.
    """
    found = [path for path in parts.glob("*.zarr") if (path / _FILE).is_file()]
    for path in sorted(found, key=lambda path: ((path / _FILE).stat().st_mtime_ns, path.name)):
        try:
            yield from part_rows(path)
        except StoreError:
            continue
