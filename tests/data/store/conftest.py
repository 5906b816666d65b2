"""Parts to read: a small world of samples with distributions and hidden states, from known logits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import (
    STORED_AS,
    TARGET_IDS,
    ArraySpec,
    hidden_attributes,
    hidden_prefix,
    hidden_specs,
    lens_prefix,
    under,
)
from kdpipe.data.store.shard_writer import ArrayWriter
from kdpipe.data.store.writer import PartWriter

VOCABULARY = 40
BOUNDS = (0, 4, 16, VOCABULARY)
TEMPERATURES = (1.0, 2.0, 0.5)
WIDTH = 6


def log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """Reference in float64; -inf for nothing."""
    return np.logaddexp.reduce(values.astype(np.float64), axis=axis)


def bucketed(
    logits: np.ndarray,
    k: int,
    *,
    mass: float | None = None,
    min_k: int = 1,
    temperatures: Sequence[float] = TEMPERATURES,
    bounds: Sequence[int] = BOUNDS,
) -> dict[str, np.ndarray]:
    """A distribution straight from its definition, in float64.

    Args:
        logits: [T, V], -inf where an id is masked.
        k: most entries kept.
        mass: mass that the kept entries of a token reach, where k allows it.
        min_k: with a mass, the fewest.

    Returns:
        `ids` and `logprob` [T, k], -1 and -inf where a token keeps fewer; `log_z` [T, n]; `log_tail` [T, n, B].
    """
    logits = logits.astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    log_z = np.stack([log_sum_exp(logits / t, 1) for t in temperatures], axis=1)
    logprob = np.take_along_axis(logits, order, 1) - log_z[:, [list(temperatures).index(1.0)]]
    there = logprob > -np.inf
    if mass is not None:
        mass_before = np.cumsum(np.exp(logprob), axis=1) - np.exp(logprob)
        there &= (mass_before < mass) | (np.arange(order.shape[1]) < min_k)
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, order, there, axis=1)
    rest = np.where(kept, -np.inf, logits)
    tails = [
        [log_sum_exp(rest[:, a:b] / t, 1) - log_z[:, column] for a, b in pairwise(bounds)]
        for column, t in enumerate(temperatures)
    ]
    return {
        "ids": np.where(there, order, -1),
        "logprob": np.where(there, logprob, -np.inf),
        "log_z": log_z,
        "log_tail": np.moveaxis(np.array(tails), 2, 0).reshape(len(logits), len(temperatures), len(bounds) - 1),
    }


@dataclass
class World:
    """A part on disk and what was put into it, by sample id."""

    path: Path
    layout: Layout
    logits: Mapping[str, np.ndarray]
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def layout_of(k: int = 12, **options: Any) -> Layout:
    """A layout for the vocabulary of these tests."""
    return Layout(k, min(k, VOCABULARY), TEMPERATURES, BOUNDS, **{"logprob": "float32", **options})


def make_world(
    path: Path,
    lengths: Sequence[int] = (5, 0, 17, 1, 9),
    *,
    k: int = 12,
    mass: float | None = None,
    logprob: str = "float32",
    seed: int = 0,
    name: str = "s",
    **options: Any,
) -> World:
    """A part of the source `textual` with one sample a length, ids `s0`, `s1`, ..."""
    rng = np.random.default_rng(seed)
    layout = layout_of(k, mass=mass, logprob=logprob)
    logits = {f"{name}{i}": 3 * rng.normal(size=(tokens, VOCABULARY)) for i, tokens in enumerate(lengths)}
    world = World(path, layout, logits)
    writer = PartWriter(
        path,
        source="textual",
        arrays=[
            ArraySpec(TARGET_IDS, (), "uint32"),
            *layout.specs("top"),
            *layout.specs(lens_prefix(7)),
            *hidden_specs(3, WIDTH, "int8"),
        ],
        attributes={**layout.attributes(), **hidden_attributes(codec="int8", layers=[3], width=WIDTH)},
        **options,
    )
    for sample, values in logits.items():
        tokens = len(values)
        arrays = {
            TARGET_IDS: rng.integers(0, VOCABULARY, tokens, dtype=np.uint32),
            **under("top", layout.encode(bucketed(values, k, mass=mass))),
            **under(lens_prefix(7), layout.encode(bucketed(values / 2, k, mass=mass))),
            f"{hidden_prefix(3)}/states": rng.integers(-127, 128, (tokens, WIDTH), dtype=np.int8),
            f"{hidden_prefix(3)}/scale": rng.random(tokens, dtype=np.float32),
        }
        world.arrays[sample] = arrays
        writer.append(
            sample,
            f"key-{sample}",
            arrays,
            {"fields": {"prompt": "p", "audio": sample}, "cover": {"k": k}, "length": tokens + 7, "content": sample},
        )
    writer.close()
    return world


def numbers(rows: int, width: tuple[int, ...] = (), dtype: str = "uint32") -> np.ndarray:
    """Rows that differ, of the dtype in which a declared dtype is stored."""
    stored = np.dtype(STORED_AS[dtype])
    count = rows * int(np.prod(width, dtype=int))
    raw = np.random.default_rng(rows).integers(0, 256, count * stored.itemsize, dtype=np.uint8)
    return np.nan_to_num(raw.view(stored), copy=False).reshape(rows, *width)


def write_array(
    folder: Path,
    values: np.ndarray,
    *,
    chunk_rows: int,
    per_shard: int,
    dtype: str | None = None,
    pieces: Sequence[int] = (),
) -> ArraySpec:
    """Writes one array as a part would hold it, in chunks and shards of these sizes, cut into pieces at these rows."""
    spec = ArraySpec("x", values.shape[1:], dtype or str(values.dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", chunk_rows * spec.row_bytes)
        writer = ArrayWriter(folder, spec, per_shard * chunk_rows * spec.row_bytes)
        for piece in np.split(values, list(pieces)):
            writer.append(piece)
        writer.close()
    return spec


def data_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but metadata, by its path there."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "zarr.json"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def flip(file: Path, position: int, bit: int = 0) -> None:
    """Changes one bit of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def open_descriptors() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "parts" / "a.zarr")
