"""Rows of a ledger in columns: where each source of each sample lies, for millions of them.

As objects, rows take ten times the memory and many times the time of a read. So they stay in Arrow columns, and a `Row`
is made when one is asked for. On disk (a manifest, see `kdpipe.data.ledger_files`) each named digest of `Row.fields` is
a column `fields.NAME`, empty where a row has none of that name; these are read when somebody asks for them.

What `kdpipe status` needs does without `pa.array` and `to_numpy`, which import pandas.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from json.encoder import encode_basestring_ascii as encode_text
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.data.hashing import digest_texts

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_CORE = ("id", "source", "key", "part", "row", "tokens", "length", "content", "cover", "held_as", "made_with")
_ADDED = ("held_as", "made_with")  # which manifests of earlier releases lack
_FEW = ("source", "part", "cover", "made_with")  # few values, each in many rows
_NUMBERS = ("row", "tokens", "length")
_PREFIX = "fields."
_AS_JSON = "fields"  # in manifests of earlier releases: all of a row's in one JSON text
_BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """Where one source of one sample lies.

    Attributes:
        id: sample id.
        source: what of the sample this is: `trace`, `targets`, `textual`, `acoustic`, `student`, ...
        key: digest of everything that could change its bytes.
        fields: the named digests the key is made of, kept to be able to say why a sample is stale.
        cover: what is stored beyond the key, e.g. `{"k": 64}`; a request is served if it asks for no more.
        part: name of the part below `parts/`.
        row: its place within the part.
        tokens: response tokens (audio tokens for `acoustic`).
        length: tokens of the student's whole sequence, prompt and audio included; 0 where that means nothing.
        content: digest of what came out, for early cutoff downstream.
        held_as: the key under which its part holds it, where `kdpipe accept` gave it another; else empty.
        made_with: names and versions of the libraries it was made with; empty where that was not recorded.
    """

    id: str
    source: str
    key: str
    fields: Mapping[str, str]
    part: str
    row: int = 0
    tokens: int = 0
    length: int = 0
    content: str = ""
    cover: Mapping[str, Any] = field(default_factory=dict)
    held_as: str = ""
    made_with: str = ""

    @property
    def part_key(self) -> str:
        """The key under which its part holds it."""
        return self.held_as or self.key


class Rows:
    """Rows in columns, one for each sample and source; never changed.

    Args:
        core: all columns but those of `Row.fields`.
        load: gives the columns of `Row.fields`, in the same order.
    """

    def __init__(self, core: pa.Table, load: Callable[[], pa.Table]):
        self._core = core.unify_dictionaries().combine_chunks()
        self._load = load
        self._places: dict[str, dict[str, int]] = {}

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Rows:
        """The rows given, in that order."""
        import pyarrow as pa

        rows = list(rows)
        if not rows:
            kinds = [(n, pa.int64() if n in _NUMBERS else pa.string()) for n in _CORE]
            few = [(n, pa.dictionary(pa.int32(), kind) if n in _FEW else kind) for n, kind in kinds]
            return cls(pa.schema(few).empty_table(), lambda: _table({}, 0))
        columns: dict[str, pa.Array] = {}
        for name in _CORE:
            values = [_stored(getattr(row, name)) for row in rows]
            column = pa.array(values, pa.int64() if name in _NUMBERS else pa.string())
            columns[name] = column.dictionary_encode() if name in _FEW else column
        names = sorted({name for row in rows for name in row.fields})
        fields = {_PREFIX + name: pa.array([row.fields.get(name) for row in rows], pa.string()) for name in names}
        made = _table(fields, len(rows))
        return cls(pa.table(columns), lambda: made)

    @classmethod
    def read(cls, manifest: Path) -> Rows:
        """The rows of a manifest file, which stays open.

        Raises:
            ValueError: it cannot be read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if manifest.is_dir():
            raise ValueError("a folder, not a file")
        try:
            written = pq.read_schema(manifest).names
            names = [name for name in written if name.startswith(_PREFIX)]
            old = _AS_JSON in written
            there = [name for name in _CORE if name not in _ADDED or name in written]
            few = [name for name in _FEW if name in there]
            file = pq.ParquetFile(manifest, page_checksum_verification=True, read_dictionary=few)
            core = _with_added(file.read(there, use_threads=False)).select(_CORE)
            core.validate(full=True)  # damage may leave codes that stand for nothing

            def load() -> pa.Table:
                try:
                    read = file.read([_AS_JSON] if old else names, use_threads=False)
                    return _from_json(read) if old else read
                except (OSError, TypeError, ValueError, pa.ArrowException) as error:
                    raise ValueError(f"{manifest}: not a manifest: {error}") from None

            rows = cls(core, load)
            for name, _ in rows.parts():
                if name != os.path.basename(name) or name in ("", ".", ".."):
                    raise ValueError(f"{name!r} is no name of a part")
        except (KeyError, OSError, TypeError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"not a manifest: {error}") from None
        return rows

    def __len__(self) -> int:
        return self._core.num_rows

    def __iter__(self) -> Iterator[Row]:
        for place, values in enumerate(self._zipped(_CORE)):
            yield self._row(place, values)

    def get(self, sample: str, source: str) -> Row | None:
        """The row of one source of one sample, or None."""
        place = self._placed(source).get(sample)
        if place is None:
            return None
        values = (self._core[name][place].as_py() for name in _CORE)
        return self._row(place, (self._covers[v] if n == "cover" else v for n, v in zip(_CORE, values, strict=True)))

    def values(self, source: str, *names: str) -> Iterator[tuple[Any, ...]]:
        """Attributes of all rows of a source, in the order of `names`; none of them `fields`."""
        return self._zipped(names, self._of(source))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Sources that there are rows of."""
        return tuple(sorted(self._core["source"].unique().to_pylist()))

    def parts(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each part that rows lie in, with each cover that rows have there."""
        import numpy as np

        parts, covers = self._column("part"), self._column("cover")
        codes = np.from_dlpack(parts.indices).astype(np.int64) * (len(covers.dictionary) + 1) + np.from_dlpack(
            covers.indices
        )
        names, texts = parts.dictionary.to_pylist(), covers.dictionary.to_pylist()
        for code in np.unique(codes).tolist():
            part, cover = divmod(code, len(texts) + 1)
            yield names[part], self._covers[texts[cover]]

    def changed(self, new: Collection[Row], gone: Iterable[tuple[str, str]]) -> Rows:
        """These rows without those of `gone`, and with `new`, each in place of the one of its sample and source."""
        import numpy as np
        import pyarrow as pa

        kept = np.ones(len(self), bool)
        for sample, source in (*((row.id, row.source) for row in new), *gone):
            place = self._placed(source).get(sample)
            if place is not None:
                kept[place] = False
        if kept.all() and not new:
            return self
        added = Rows.of(new)
        core = pa.concat_tables([self._core.filter(pa.array(kept)), added._core])
        fields = pa.concat_tables([self._fields.filter(pa.array(kept)), added._fields], promote_options="default")
        return Rows(core, lambda: fields)

    def digest(self) -> str:
        """Digest of the rows in any order: the name of their manifest."""
        ordered = self._sorted("id", "source")
        covers = {
            text: json.dumps(cover, sort_keys=True, separators=(",", ":")) for text, cover in self._covers.items()
        }

        without = ',"",""]'

        def texts() -> Iterator[str]:
            names = ("id", "source", "key", "part", "row", "tokens", "length", "cover", "content", *_ADDED)
            text = f"[{','.join(['%s'] * len(names))}]"
            for start in range(0, len(self), _BATCH_ROWS):
                some = self._core.take(ordered[start : start + _BATCH_ROWS])
                columns = []
                for name in names:
                    values = some[name].to_pylist()
                    columns.append(map(covers.__getitem__ if name == "cover" else _atom, values))
                lines = map(text.__mod__, zip(*columns, strict=True))
                # Where there are none, as in releases that knew of none: a manifest keeps its name.
                yield from (line.removesuffix(without) + "]" if line.endswith(without) else line for line in lines)

        return digest_texts(texts())

    def tables(self, rows: int) -> Iterator[pa.Table]:
        """All columns as they are written, so many rows at a time (once none, where there are none), in one order
        whatever the order here."""
        import pyarrow as pa

        ordered = self._sorted("source", "part", "row", "id")
        fields = self._fields
        for name in fields.column_names:
            if fields[name].null_count == len(self):
                fields = fields.drop_columns(name)
        fields = fields.select(sorted(fields.column_names))
        schema = pa.schema(
            [(name, pa.int64() if name in _NUMBERS else pa.string()) for name in _CORE]
            + [(name, pa.string()) for name in fields.column_names]
        )
        for start in range(0, max(len(self), 1), rows):
            some = ordered[start : start + rows]
            taken = [*self._core.take(some).columns, *fields.take(some).columns]
            yield pa.table(dict(zip(schema.names, taken, strict=True))).cast(schema).combine_chunks()

    @cached_property
    def _fields(self) -> pa.Table:
        return self._load()

    @cached_property
    def _covers(self) -> dict[str, dict[str, Any]]:
        """Covers by their text, each kept once."""
        texts = self._core["cover"].unique().to_pylist()
        covers = {text: json.loads(text) for text in texts}
        if not all(isinstance(cover, dict) for cover in covers.values()):
            raise TypeError("a cover is no mapping")
        return covers

    def _row(self, place: int, values: Iterable[Any]) -> Row:
        sample, source, key, *others = values
        return Row(sample, source, key, _FieldsOf(self, place), *others)

    def _placed(self, source: str) -> dict[str, int]:
        """Where the samples of a source stand."""
        places = self._places.get(source)
        if places is None:
            of = self._of(source)
            places = dict(zip(self._list("id", of), of.tolist(), strict=True))
            self._places[source] = places
        return places

    def _of(self, source: str) -> np.ndarray:
        """Places of the rows of a source."""
        import numpy as np

        column = self._column("source")
        names = column.dictionary.to_pylist()
        return np.flatnonzero(_codes(column) == (names.index(source) if source in names else -1))

    def _column(self, name: str) -> Any:
        """A column in one piece."""
        chunks = self._core[name].chunks
        return chunks[0] if chunks else self._core.schema.empty_table()[name].combine_chunks()

    def _list(self, name: str, places: np.ndarray | None = None) -> list[Any]:
        """A column as Python's objects; one object for all rows of a value, where there are few."""
        import pyarrow as pa

        column = self._column(name)
        if places is not None and len(places) < len(self):
            column = column.take(pa.Array.from_buffers(pa.int64(), len(places), [None, pa.py_buffer(places)]))
        if name not in _FEW:
            return column.to_pylist()
        found = column.dictionary.to_pylist()
        if name == "cover":
            found = [self._covers[text] for text in found]
        return [found[code] for code in column.indices.to_pylist()]

    def _zipped(self, names: Iterable[str], places: np.ndarray | None = None) -> Iterator[tuple[Any, ...]]:
        return zip(*(self._list(name, places) for name in names), strict=True)

    def _sorted(self, *names: str) -> np.ndarray:
        """Places in the order of some columns."""
        import numpy as np
        import pyarrow as pa

        columns: dict[str, Any] = {"place": np.arange(len(self))}
        for name in names:
            column = self._column(name)
            if name in _FEW:  # by which Arrow does not sort tables
                values = column.dictionary.to_pylist()
                ranks = np.empty(len(values), np.int32)
                ranks[sorted(range(len(values)), key=values.__getitem__)] = np.arange(len(values))
                column = ranks[_codes(column)]
            columns[name] = column
        return pa.table(columns).sort_by([(name, "ascending") for name in names])["place"].to_numpy()


class _FieldsOf(Mapping[str, str]):
    """The named digests of one row."""

    __slots__ = ("_place", "_rows")

    def __init__(self, rows: Rows, place: int):
        self._rows = rows
        self._place = place

    def __getitem__(self, name: str) -> str:
        table = self._rows._fields
        column = _PREFIX + name
        value = table[column][self._place].as_py() if column in table.column_names else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        for name, column in zip(self._rows._fields.column_names, self._rows._fields.columns, strict=True):
            if column[self._place].is_valid:
                yield name.removeprefix(_PREFIX)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def _with_added(core: pa.Table) -> pa.Table:
    """With the columns that an earlier release did not write."""
    import pyarrow as pa

    for name in _ADDED:
        if name not in core.column_names:
            empty = pa.array([""] * core.num_rows, pa.string())
            core = core.append_column(name, empty.dictionary_encode() if name in _FEW else empty)
    return core


def _codes(column: Any) -> Any:
    """Of a dictionary-encoded Arrow array, as a NumPy array of int32."""
    import numpy as np

    return np.from_dlpack(column.indices)


def _stored(value: Any) -> Any:
    return json.dumps(dict(value), sort_keys=True) if isinstance(value, Mapping) else value


def _atom(value: str | int) -> str:
    """What JSON writes for a text or a whole number."""
    return encode_text(value) if isinstance(value, str) else repr(value)


def _table(columns: Mapping[str, pa.Array], rows: int) -> pa.Table:
    """A table that knows its number of rows even without columns."""
    import pyarrow as pa

    return pa.table(dict(columns)) if columns else pa.table({"": pa.nulls(rows)}).select([])


def _from_json(texts: pa.Table) -> pa.Table:
    import pyarrow as pa

    read = [json.loads(text) for text in texts[_AS_JSON].to_pylist()]
    names = sorted({name for fields in read for name in fields})
    columns = {_PREFIX + name: pa.array([fields.get(name) for fields in read], pa.string()) for name in names}
    return _table(columns, len(read))
