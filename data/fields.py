"""Named digests of a sample, kept small: a run holds several sets of them for each of its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from kdpipe.data.hashing import digest_bytes, encode_text


class Names:
    """What the `Fields` of many samples have alike, and the names of what each has of its own.

    Args:
        common: what they have alike.
        places: names of a sample's own digests, and where they stand in `Fields.own`; they go before `common`.
    """

    def __init__(self, common: Mapping[str, str], places: Mapping[str, int]):
        self.common = common
        self.places = places

    @cached_property
    def text(self) -> tuple[str, Sequence[int]]:
        """The JSON text that is hashed, with `%s` for each of a sample's own digests, and where these stand."""
        places, pieces = [], []
        for name in sorted({*self.common, *self.places}):
            if name in self.places:
                places.append(self.places[name])
                value = "%s"
            else:
                value = encode_text(self.common[name]).replace("%", "%%")
            pieces.append(f"{encode_text(name).replace('%', '%%')}:{value}")
        return f"{{{','.join(pieces)}}}", places


class Fields(Mapping[str, str]):
    """A mapping that takes 48 bytes beside what it shares with others, where a `dict` of twelve takes 480.

    Equal to a `dict` of the same content, in the order of `Names.common` and then of `Names.places`; never changed.

    Args:
        names: one object for many samples.
        own: what one sample has, one sequence for all of its sources.
    """

    __slots__ = ("_names", "_own")

    def __init__(self, names: Names, own: Sequence[str]):
        self._names = names
        self._own = own

    @property
    def names(self) -> Names:
        """What it has alike with others."""
        return self._names

    def __getitem__(self, name: str) -> str:
        place = self._names.places.get(name)
        return self._names.common[name] if place is None else self._own[place]

    def __iter__(self) -> Iterator[str]:
        yield from self._names.common
        yield from (name for name in self._names.places if name not in self._names.common)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def digest(self) -> str:
        """What `kdpipe.data.hashing.digest` gives for the same mapping, without walking over it."""
        text, places = self._names.text
        own = self._own
        return digest_bytes((text % tuple([encode_text(own[place]) for place in places])).encode())
