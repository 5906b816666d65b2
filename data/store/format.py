"""Names, types and version of what stands in a part; the one place writer and reader take them from.

A part is a Zarr v3 group. Every array of it is ragged and lies flat, `[tokens, *width]`, one row a token; unit `u`
(a sample, or a clip) owns rows `offsets[u]` to `offsets[u + 1]`. `docs/format.md` says the same in full.

Array names:
    `target_ids`: uint32 [T], the tokenized response.
    `<prefix>/ids`, `<prefix>/logprob`, `<prefix>/log_z`, `<prefix>/log_tail`, and `<prefix>/draws` where ids were drawn
        from the tail: a distribution, where the prefix is `top` or `lens/<teacher layer>`.
    `hidden/<layer>/states`, and `hidden/<layer>/scale` where the codec has scales: hidden states.

Layers are counted from 1 and written with at least two digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

FORMAT = 1
"""Version of the layout; a reader refuses any other."""

ATTRIBUTE = "kdpipe"
"""Group attribute that holds everything kdpipe says about a part."""

RESERVED = frozenset({"format", "source", "units", "arrays", "metadata"})
"""Entries of that attribute which the writer makes itself."""

NO_ID = 2**32 - 1
"""Stands for a draw from an empty tail."""

OFFSETS = "offsets"
TARGET_IDS = "target_ids"
TOP = "top"

SHARD_BYTES = 128 << 20
"""Upper bound of a shard file's data (bytes); a small part has one smaller shard an array."""

STATES_CHUNK_BYTES = 1 << 20
ROWS_CHUNK_BYTES = 1 << 18
"""Chunk sizes (bytes) of hidden states and of everything else: what one checksum covers and one read fetches."""

STORED_AS = {
    "uint32": "uint32",
    "int64": "int64",
    "float16": "float16",
    "float32": "float32",
    "bfloat16": "uint16",
    "int8": "int8",
}
"""Declared dtype to the dtype in Zarr, which has no bfloat16: its bits are stored."""

_BYTES = {"uint32": 4, "int64": 8, "float16": 2, "float32": 4, "bfloat16": 2, "int8": 1}

StatesCodec = Literal["bfloat16", "float32", "int8"]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a part.

    Attributes:
        name: its path in the group.
        width: shape of one token's row; `()` for one number a token.
        dtype: one of `STORED_AS`.
    """

    name: str
    width: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in STORED_AS:
            raise ValueError(f"array {self.name}: dtype {self.dtype!r} is not one of {', '.join(STORED_AS)}")
        if any(size < 1 for size in self.width):
            raise ValueError(f"array {self.name}: width {self.width} has a size below 1")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
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


def distribution_specs(
    prefix: str,
    k: int,
    n_temperatures: int,
    blocks: int,
    logprob_dtype: Literal["float16", "float32"],
    *,
    draws: int = 0,
) -> tuple[ArraySpec, ...]:
    """Arrays of one distribution a token.

    Args:
        prefix: `top` or `lens_prefix(layer)`.
        k: entries kept (no more than the shared vocabulary has).
        n_temperatures: declared temperatures.
        blocks: vocabulary blocks whose tail mass is kept apart.
        logprob_dtype: precision of the kept log-probabilities.
        draws: ids drawn from the tail at each temperature.

    Returns:
        Specifications of `ids` [T, k], `logprob` [T, k], `log_z` [T, temperatures], `log_tail`
        [T, temperatures, blocks] and, with draws, `draws` [T, temperatures, draws]; see `docs/format.md` for what they
        mean.
    """
    drawn = (ArraySpec(f"{prefix}/draws", (n_temperatures, draws), "uint32"),) if draws else ()
    return (
        ArraySpec(f"{prefix}/ids", (k,), "uint32"),
        ArraySpec(f"{prefix}/logprob", (k,), logprob_dtype),
        ArraySpec(f"{prefix}/log_z", (n_temperatures,), "float32"),
        ArraySpec(f"{prefix}/log_tail", (n_temperatures, blocks), "float32"),
        *drawn,
    )


def distribution_attributes(
    *,
    k: int,
    temperatures: Sequence[float],
    block_bounds: Sequence[int],
    draws: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Attributes a part needs so that its distributions can be read.

    Args:
        k: entries asked for; the arrays may be narrower only where the whole vocabulary is kept.
        temperatures: declared temperatures, in the order of the arrays; 1 among them.
        block_bounds: `blocks + 1` rising ids; block b covers ids in `[block_bounds[b], block_bounds[b + 1])`.
        draws: `count` of draws, and `k`, how many of the likeliest ids are not in the tail they are from (at most the k
            above); None without.

    Raises:
        ValueError: 1 is not among the temperatures, or the bounds do not rise from 0.
    """
    if 1.0 not in temperatures:
        raise ValueError(f"temperatures {list(temperatures)} lack 1, from which the others are computed")
    if len(block_bounds) < 2 or block_bounds[0] != 0 or any(a >= b for a, b in pairwise(block_bounds)):
        raise ValueError(f"block bounds {list(block_bounds)} do not rise from 0")
    return {
        "distributions": {
            "layout": "fixed",
            "k": int(k),
            "temperatures": [float(value) for value in temperatures],
            "block_bounds": [int(value) for value in block_bounds],
            **({} if draws is None else {"draws": {"count": int(draws["count"]), "k": int(draws["k"])}}),
        }
    }


def hidden_specs(layer: int, width: int, codec: StatesCodec) -> tuple[ArraySpec, ...]:
    """Arrays of one layer's hidden states in a codec; see `kdpipe.data.store.codec`."""
    prefix = hidden_prefix(layer)
    states = ArraySpec(f"{prefix}/states", (width,), codec)
    return (states, ArraySpec(f"{prefix}/scale", (), "float32")) if codec == "int8" else (states,)


def hidden_attributes(*, codec: StatesCodec, layers: Sequence[int], width: int) -> dict[str, Any]:
    """Attributes a part needs so that its hidden states can be read."""
    return {"states": {"codec": codec, "layers": [int(layer) for layer in layers], "width": int(width)}}
