"""Names, types and version of what stands in a part; the one place writer and reader take them from.

A part is a Zarr v3 group. Its arrays lie flat, one row after another, along an *axis*; unit `u` (a sample, or a clip)
owns rows `starts[u]` to `starts[u + 1]` of the axis, where `starts` is an array of the part too.
`docs/format.md` says the same in full.

Axes, and the arrays of their starts:
    `tokens`, starts in `offsets`: one row a token.
    `<prefix>/entries` and `<prefix>/bytes`, starts in arrays of these names: kept entries of a distribution whose
        tokens keep different numbers, and the bytes of their ids.
    `part`: the array belongs to the part as a whole, not to its units.

Array names:
    `target_ids`: uint32 [T], the tokenized response.
    `<prefix>/...`: a distribution, where the prefix is `top` or `lens/<teacher layer>`; see
        `kdpipe.data.store.distributions`.
    `hidden/<layer>/states`, `hidden/<layer>/scale` where the codec has scales, and `hidden/<layer>/basis` where it has
        one (axis `part`): hidden states; see `kdpipe.data.store.codec`.

Layers are counted from 1 and written with at least two digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FORMAT = 2
"""Version of the layout; a reader refuses any other."""

ATTRIBUTE = "kdpipe"
"""Group attribute that holds everything kdpipe says about a part."""

RESERVED = frozenset({"format", "source", "units", "arrays", "starts", "metadata"})
"""Entries of that attribute which the writer makes itself."""

NO_ID = 2**32 - 1
"""Stands for a draw from an empty tail."""

TOKENS = "tokens"
PART = "part"
OFFSETS = "offsets"
TARGET_IDS = "target_ids"
TOP = "top"

SHARD_BYTES = 128 << 20
"""Upper bound of a shard file's data (bytes); a small part has one smaller shard an array."""

STATES_CHUNK_BYTES = 1 << 20
ROWS_CHUNK_BYTES = 1 << 18
"""Chunk sizes (bytes) of hidden states and of everything else: what one checksum covers and one read fetches."""

STORED_AS = {
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "int64": "int64",
    "float16": "float16",
    "float32": "float32",
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "int8": "int8",
}
"""Declared dtype to the dtype in Zarr, which has neither bfloat16 nor float8: their bits are stored."""

_BYTES = {
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "int64": 8,
    "float16": 2,
    "float32": 4,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
}

StatesCodec = Literal["bfloat16", "float32", "int8", "fp8", "low_rank", "low_rank_int8"]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a part.

    Attributes:
        name: its path in the group.
        width: shape of one row; `()` for one number a row.
        dtype: one of `STORED_AS`.
        axis: what its rows are: `tokens`, `part`, or an axis of its own whose starts stand in an array of that name.
    """

    name: str
    width: tuple[int, ...]
    dtype: str
    axis: str = TOKENS

    def __post_init__(self) -> None:
        if self.dtype not in STORED_AS:
            raise ValueError(f"array {self.name}: dtype {self.dtype!r} is not one of {', '.join(STORED_AS)}")
        if any(size < 1 for size in self.width):
            raise ValueError(f"array {self.name}: width {self.width} has a size below 1")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return _BYTES[self.dtype] * math.prod(self.width)

    @property
    def chunk_rows(self) -> int:
        """Rows in one chunk."""
        target = STATES_CHUNK_BYTES if self.name.startswith("hidden/") else ROWS_CHUNK_BYTES
        return max(1, target // self.row_bytes)


def lens_prefix(layer: int) -> str:
    """Prefix of the lens distribution of a teacher layer, counted from 1: `lens/07`."""
    return f"lens/{layer:02d}"


def hidden_prefix(layer: int) -> str:
    """Prefix of the hidden states of a teacher layer, counted from 1: `hidden/07`."""
    return f"hidden/{layer:02d}"


def under(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays with the prefix before their names, as `PartWriter.append` wants them."""
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def starts_name(axis: str) -> str:
    """Name of the array that holds the starts of an axis."""
    return OFFSETS if axis == TOKENS else axis


def is_low_rank(codec: StatesCodec) -> bool:
    """Whether states are stored as coefficients of a basis."""
    return codec in ("low_rank", "low_rank_int8")


def hidden_specs(layer: int, width: int, codec: StatesCodec, rank: int = 0) -> tuple[ArraySpec, ...]:
    """Arrays of one layer's hidden states in a codec; see `kdpipe.data.store.codec`.

    Args:
        layer: counted from 1.
        width: of the model.
        codec: name of the codec.
        rank: numbers a token in the low-rank codecs.
    """
    prefix = hidden_prefix(layer)
    codes = {"fp8": "float8_e4m3fn", "low_rank": "bfloat16", "low_rank_int8": "int8"}.get(codec, codec)
    specs = [ArraySpec(f"{prefix}/states", (rank if is_low_rank(codec) else width,), codes)]
    if codec in ("int8", "fp8", "low_rank_int8"):
        specs.append(ArraySpec(f"{prefix}/scale", (), "float32"))
    if is_low_rank(codec):
        specs.append(ArraySpec(f"{prefix}/basis", (width,), "float16", PART))
    return tuple(specs)


def hidden_attributes(*, codec: StatesCodec, layers: Sequence[int], width: int, rank: int = 0) -> dict[str, Any]:
    """Attributes a part needs so that its hidden states can be read."""
    about = {"codec": codec, "layers": [int(layer) for layer in layers], "width": int(width)}
    return {"states": about | ({"rank": rank} if is_low_rank(codec) else {})}
