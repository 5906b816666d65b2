"""The rows of a manifest, whatever its format: each as a dictionary of columns, with its place for messages.

JSON lines, CSV, Parquet, and folders that Hugging Face `datasets` saved. pyarrow and datasets are imported only where
the format needs them: `kdpipe status` comes through here.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from kdpipe.data.errors import ManifestError

_PRINTED = 20


class Problems:
    """Collects what is wrong, so that all of it is told at once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, where: str, text: str) -> None:
        self.texts.append(f"{where}: {text}")

    def raise_any(self) -> None:
        if len(self.texts) > _PRINTED:
            raise ManifestError([*self.texts[:_PRINTED], f"... and {len(self.texts) - _PRINTED} more"])
        if self.texts:
            raise ManifestError(self.texts)


def kind(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of type {type(value).__name__}") if value is not None else "null"


def read_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a manifest row by row.

    Args:
        path: a `.jsonl`, `.json`, `.csv` or `.parquet` file, or a folder written by `save_to_disk`.
        problems: takes what cannot be read.

    Yields:
        The row's place (file and line; file and row, from 1, where there are no lines) and its columns. Values have
        the types of JSON, and bytes; blank cells of a CSV file are None.
    """
    readers = {".jsonl": _jsonl_rows, ".json": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        reader = _dataset_rows if path.is_dir() else readers.get(path.suffix.lower())
        if not path.exists():
            problems.add(str(path), "no such manifest")
        elif reader is None:
            problems.add(str(path), "unknown format: use .jsonl, .csv, .parquet or a Hugging Face dataset folder")
        else:
            yield from reader(path, problems)
    except OSError as error:
        problems.add(str(path), f"cannot be read: {error}")


def _jsonl_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path.name}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.lstrip().startswith(b"["):
                    problems.add(where, "a JSON array: write one object a line (jq -c '.[]')")
                    return
            if line.isspace():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                problems.add(where, "is not UTF-8")
            except json.JSONDecodeError as error:
                problems.add(where, f"is not JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
                problems.add(where, f"is not JSON that can be read: {error}")
            else:
                if isinstance(row, dict):
                    yield where, row
                else:
                    problems.add(where, f"is {kind(row)}: each line must be one JSON object")


def _csv_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, row in csv_rows(path, problems, lambda header, where: _good_header(header, where, problems)):
        yield where, _from_csv(row)


def csv_rows(
    path: Path, problems: Problems, is_good: Callable[[list[str], str], bool] = lambda header, where: True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file with a header, all cells as texts, each with its place.

    Args:
        path: the file.
        problems: takes what is wrong.
        is_good: whether a header, at a place, will do; where not, nothing is read.
    """
    # Bytes that are not UTF-8 become surrogates, which the check of each text finds and names by its line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                where, line = f"{path.name}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = [name.strip() for name in cells]
                    if not is_good(header, where):
                        return
                elif len(cells) != len(header):
                    problems.add(where, f"has {len(cells)} fields, and the header has {len(header)}")
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            problems.add(f"{path.name}:{line}", f"is not CSV: {error}")


def _from_csv(row: dict[str, Any]) -> dict[str, Any]:
    """Give the columns of a CSV row their types; what does not convert stays text, which is then refused."""
    for column in row:
        if not row[column]:
            row[column] = None
        elif column in ("start", "end"):
            with contextlib.suppress(ValueError):
                row[column] = float(row[column])
        elif column == "choices" and not row[column].lstrip().startswith("["):
            row[column] = [choice.strip() for choice in row[column].split("|")]
        elif column == "choices" or (column == "audio" and row[column].startswith('["')):
            with contextlib.suppress(ValueError):
                row[column] = json.loads(row[column])
    return row


def _parquet_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if not _good_header(file.schema_arrow.names, path.name, problems):
                return
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
    except (pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:  # also a cell that is no text
        problems.add(path.name, f"is not Parquet that can be read (behind row {number}): {error}")


def _dataset_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        problems.add(str(path), "is a folder, but none that `save_to_disk` of Hugging Face datasets wrote")
        return
    import datasets

    try:
        outside = next((name for name in _named_files(path) if name != os.path.basename(name)), None)
        if outside is not None:
            problems.add(str(path), f"names {outside!a}, which does not lie in it: save the dataset anew")
            return
        loaded = datasets.load_from_disk(str(path))
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {None: loaded}
        for split, dataset in splits.items():
            name = path.name if split is None else f"{path.name}/{split}"
            if not _good_header(dataset.column_names, name, problems):
                continue
            labels = {
                column: feature.names
                for column, feature in dataset.features.items()
                if isinstance(feature, datasets.ClassLabel)
            }
            number = 0
            # As Arrow, the Audio column stays {bytes, path}: nothing is decoded.
            for batch in cast(Any, dataset.with_format("arrow")).iter(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    for column, names in labels.items():
                        code = row[column]
                        row[column] = None if code is None or code < 0 else names[code]
                    if split is not None:
                        row.setdefault("split", str(split))
                    yield f"{name} row {number}", row
    except Exception as error:  # of a damaged folder `datasets` raises whatever its parts do
        problems.add(str(path), f"is not a dataset that can be read: {error}")


def _named_files(dataset: Path) -> Iterator[str]:
    """Names of the folders and files that a saved dataset says it consists of."""
    splits = dataset / "dataset_dict.json"
    names = json.loads(splits.read_text(encoding="utf-8"))["splits"] if splits.is_file() else ["."]
    for name in names:
        yield name
        state = json.loads((dataset / os.path.basename(name) / "state.json").read_text(encoding="utf-8"))
        yield from (file["filename"] for file in state["_data_files"])


def _good_header(columns: list[str], where: str, problems: Problems) -> bool:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        problems.add(where, f"column {', '.join(map(repr, twice))} stands there twice")
    if "id" not in columns:
        problems.add(where, f"there is no column 'id' (the columns are {', '.join(columns)})")
    return not twice and "id" in columns
