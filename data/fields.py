"""Named digests of a sample, kept small: a run holds several sets of them for each of its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


class Fields(Mapping[str, str]):
    """A mapping that takes 56 bytes beside what it shares with others, where a `dict` of twelve takes 480.

    Equal to a `dict` of the same content, in the order of `common` and then of `places`; never changed.

    Args:
        common: what many samples have alike, one mapping for all of them.
        places: names of what is a sample's own, and where it stands in `own`; they go before `common`.
        own: what one sample has, one sequence for all of its sources.
    """

    __slots__ = ("_common", "_own", "_places")

    def __init__(self, common: Mapping[str, str], places: Mapping[str, int], own: Sequence[str]):
        self._common = common
        self._places = places
        self._own = own

    def __getitem__(self, name: str) -> str:
        place = self._places.get(name)
        return self._common[name] if place is None else self._own[place]

    def __iter__(self) -> Iterator[str]:
        yield from self._common
        yield from (name for name in self._places if name not in self._common)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class Sharing:
    """Makes `Fields` of mappings that come one by one, as from a file: what is as in the first of them is kept once."""

    def __init__(self) -> None:
        self._common: dict[tuple[str, ...], Mapping[str, str]] = {}
        self._places: dict[tuple[str, ...], Mapping[str, int]] = {}

    def __call__(self, fields: Mapping[str, str]) -> Fields:
        common = self._common.setdefault(tuple(fields), fields)
        names = tuple(name for name, value in fields.items() if common[name] != value)
        places = self._places.setdefault(names, {name: place for place, name in enumerate(names)})
        return Fields(common, places, tuple(fields[name] for name in names))
