"""One part of the teacher store in the making: units go in, and come out as ledger rows when it is committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.data.errors import StoreError
from kdpipe.data.files import build_aside, naming
from kdpipe.data.hashing import digest
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.ledger_rows import Row
from kdpipe.data.manifest import Sample
from kdpipe.data.store.format import FORMAT, ArraySpec
from kdpipe.data.store.metadata import part_rows
from kdpipe.data.store.writer import PartWriter
from kdpipe.stages.base import Context, Wanted, covers
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.environment import environment


class PartBuilder:
    """A part being built; `building` makes it.

    Args:
        ctx: the run.
        ledger: takes the finished part.
        source: whose units these are.
        path: where to build.
        arrays: arrays of every unit.
        attributes: of the part.
        cover: what every unit holds beyond its key.
        constants: arrays of the part as a whole.
    """

    def __init__(
        self,
        ctx: Context,
        ledger: Ledger,
        source: str,
        path: Path,
        arrays: Sequence[ArraySpec],
        attributes: Mapping[str, Any],
        cover: Mapping[str, Any],
        constants: Mapping[str, np.ndarray] | None = None,
    ):
        self._ctx = ctx
        self._ledger = ledger
        self._source = source
        self._path = path
        self._cover = dict(cover)
        self._made_with = environment(ctx, STAGE.name).text
        attributes = {**attributes, "made_with": self._made_with}
        self._writer = PartWriter(path, source=source, arrays=arrays, attributes=attributes, constants=constants)
        self._units: list[tuple[str, str]] = []
        self._rows: list[Row] = []

    def add(
        self,
        wants: Sequence[Wanted],
        arrays: Mapping[str, np.ndarray],
        *,
        length: int = 0,
        content: str = "",
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds one unit.

        Args:
            wants: the samples it serves, all under one key; a unit of several is named by the key, not by a sample.
            arrays: `[tokens, *width]` by name.
            length, content: as in `Row`.
            info: further JSON values kept with the unit.
        """
        first = wants[0]
        key = first.key
        about: dict[str, Any] = {"fields": dict(first.fields), "cover": self._cover, "length": length}
        about |= {"content": content, **(info or {})}
        unit_id = first.id
        if self._source == "acoustic":
            unit_id, about = key, about | {"samples": [{"id": want.id} for want in wants]}
        with naming(self._path):
            place = self._writer.append(unit_id, key, arrays, about)
        tokens = self._writer.tokens(place)
        self._units.append((unit_id, key))
        for want in wants:
            row = Row(want.id, self._source, key, want.fields, "", place, tokens, length, content, self._cover)
            self._rows.append(replace(row, made_with=self._made_with))

    def commit(
        self,
        samples: Iterable[Sample] = (),
        *,
        rejects: Iterable[Reject] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Finishes the part and takes it into the ledger, with rejections; a part without units leaves these alone.

        Its name is the digest of its units' keys, so the same work gives the same name.

        Args:
            samples: whose clips were read; refused if one changed meanwhile.
            rejects: to record.
            attributes: known only now.
        """
        self._ctx.recheck(samples)
        if not self._units:
            self._ledger.commit(rejects=rejects, soon=True)
            return
        with naming(self._path):
            self._writer.close(attributes)
        name = digest([FORMAT, self._source, sorted(self._units), self._cover])[:16] + ".zarr"
        rows = [replace(row, part=name) for row in self._rows]
        self._ledger.commit(rows, rejects=rejects, built={name: self._path}, soon=True)


def adopt(ledger: Ledger, todo: Sequence[Wanted]) -> list[Wanted]:
    """Takes in parts that are there without rows, as after a crash before the manifest was written.

    Args:
        ledger: of the stage.
        todo: what is to be made.

    Returns:
        What is left to be made.
    """
    stray = ledger.unreferenced_parts()
    wanted = {(want.id, want.source): want for want in todo} if stray else {}
    found: dict[tuple[str, str], Row] = {}
    for path in stray:
        try:
            rows = part_rows(path)
        except StoreError:
            continue
        for row in rows:
            want = wanted.get((row.id, row.source))
            if want is not None and row.key == want.key and covers(row.cover, want.cover):
                found[row.id, row.source] = row
    if found:
        ledger.commit(found.values())
    return [want for want in todo if (want.id, want.source) not in found]


@contextmanager
def building(
    ctx: Context,
    ledger: Ledger,
    source: str,
    arrays: Sequence[ArraySpec],
    attributes: Mapping[str, Any],
    cover: Mapping[str, Any],
    constants: Mapping[str, np.ndarray] | None = None,
) -> Iterator[PartBuilder]:
    """A part built aside, and thrown away unless it is committed within the block."""
    with build_aside(ledger.tmp, ".zarr") as path:
        yield PartBuilder(ctx, ledger, source, path, arrays, attributes, cover, constants)
