"""Parts to read: a small world of samples with distributions and hidden states, from known logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.data.store.format import (
    TARGET_IDS,
    ArraySpec,
    distribution_attributes,
    distribution_specs,
    hidden_attributes,
    hidden_prefix,
    hidden_specs,
    lens_prefix,
    under,
)
from kdpipe.data.store.writer import PartWriter

VOCABULARY = 40
BOUNDS = (0, 4, 16, VOCABULARY)
TEMPERATURES = (1.0, 2.0, 0.5)
WIDTH = 6


def log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """Reference in float64; -inf for nothing."""
    return np.logaddexp.reduce(values.astype(np.float64), axis=axis)


def bucketed(logits: np.ndarray, k: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The arrays of a distribution, straight from its definition, in float64.

    Args:
        logits: [T, V].
        k: entries kept.
        dtype: of `logprob`.
    """
    logits = logits.astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    log_z = np.stack([log_sum_exp(logits / t, 1) for t in TEMPERATURES], axis=1)
    tails = [
        [log_sum_exp(np.where(kept, -np.inf, logits)[:, a:b] / t, 1) - log_z[:, column] for a, b in pairwise(BOUNDS)]
        for column, t in enumerate(TEMPERATURES)
    ]
    return {
        "ids": order.astype(np.uint32),
        "logprob": (np.take_along_axis(logits, order, 1) - log_z[:, :1]).astype(dtype),
        "log_z": log_z.astype(np.float32),
        "log_tail": np.moveaxis(np.array(tails), 2, 0).astype(np.float32).reshape(len(logits), 3, 3),
    }


@dataclass
class World:
    """A part on disk and what was put into it, by sample id."""

    path: Path
    logits: Mapping[str, np.ndarray]
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def specs(k: int = 12, dtype: str = "float32") -> tuple[ArraySpec, ...]:
    shape = (k, len(TEMPERATURES), len(BOUNDS) - 1, dtype)
    return (
        ArraySpec(TARGET_IDS, (), "uint32"),
        *distribution_specs("top", *shape),  # type: ignore[arg-type]
        *distribution_specs(lens_prefix(7), *shape),  # type: ignore[arg-type]
        *hidden_specs(3, WIDTH, "int8"),
    )


def attributes(k: int = 12) -> dict[str, Any]:
    return {
        **distribution_attributes(k=k, temperatures=TEMPERATURES, block_bounds=BOUNDS),
        **hidden_attributes(codec="int8", layers=[3], width=WIDTH),
    }


def make_world(
    path: Path,
    lengths: Sequence[int] = (5, 0, 17, 1, 9),
    *,
    k: int = 12,
    seed: int = 0,
    name: str = "s",
    **options: Any,
) -> World:
    """A part of the source `textual` with one sample a length, ids `s0`, `s1`, ..."""
    rng = np.random.default_rng(seed)
    world = World(path, {f"{name}{i}": 3 * rng.normal(size=(tokens, VOCABULARY)) for i, tokens in enumerate(lengths)})
    writer = PartWriter(path, source="textual", arrays=specs(k), attributes=attributes(k), **options)
    for sample, logits in world.logits.items():
        tokens = len(logits)
        arrays = {
            TARGET_IDS: rng.integers(0, VOCABULARY, tokens, dtype=np.uint32),
            **under("top", bucketed(logits, k)),
            **under(lens_prefix(7), bucketed(logits / 2, k)),
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


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "parts" / "a.zarr")
