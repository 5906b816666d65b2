"""What bench_store.py measures of small rows: distributions of a teacher, a few hundred tokens a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  (loaded as in training; the reader widens float16 with it)

from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import TARGET_IDS, TOP, ArraySpec, under
from kdpipe.data.store.reader import Store
from kdpipe.data.store.writer import PartWriter

VOCABULARY = 151_936
K = 64
MASS = 0.98
SOURCE = "textual"


@dataclass
class Rows:
    """A store of one part, and what was put into it.

    Attributes:
        store: the store.
        layout: how the distributions lie.
        ids: of the samples.
        made: what each was given.
        entries: mean kept entries of a token.
    """

    store: Store
    layout: Layout
    ids: list[str]
    made: list[dict[str, np.ndarray]]
    entries: float


def distribution(tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Made-up teacher's words of a sample: distinct ids, log-probabilities that fall by a power law, sharp or flat."""
    ranks, everyone = np.arange(1, K + 1), np.arange(1, 4 * K + 1)
    power = rng.gamma(3.0, 1.2, (tokens, 1)) + 0.2
    logit = -power * np.log(ranks)
    log_z = np.log(np.exp(-power * np.log(everyone)).sum(1, keepdims=True))
    tail = np.log(np.exp(-power * np.log(everyone[K:]) - log_z).sum(1))
    stride = rng.integers(1, VOCABULARY // K, (tokens, 1))
    ids = (rng.integers(0, VOCABULARY, (tokens, 1)) + stride * rng.permuted(np.tile(ranks, (tokens, 1)), axis=1)) % (
        VOCABULARY
    )
    return {
        "ids": ids,
        "logprob": (logit - log_z).astype(np.float32),
        "log_z": log_z.astype(np.float32),
        "log_tail": tail[:, None, None].astype(np.float32),
    }


def cut(made: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with the fewest entries that reach the mass; what is left goes to the tail."""
    probability = np.exp(made["logprob"].astype(np.float64))
    kept = np.cumsum(probability, axis=1) - probability < MASS
    tail = np.exp(made["log_tail"][:, 0, 0].astype(np.float64)) + np.where(kept, 0, probability).sum(1)
    return {
        "ids": np.where(kept, made["ids"], -1),
        "logprob": np.where(kept, made["logprob"], np.float32(-np.inf)),
        "log_z": made["log_z"],
        "log_tail": np.log(tail)[:, None, None].astype(np.float32),
    }


def make(folder: Path, *, samples: int, tokens: int, mass: bool, seed: int) -> Rows:
    """Writes a part of `samples` samples of `tokens` tokens each."""
    rng = np.random.default_rng(seed)
    layout = Layout(k=K, kept=K, temperatures=(1.0,), block_bounds=(0, VOCABULARY), mass=MASS if mass else None)
    arrays, made, ledger = [ArraySpec(TARGET_IDS, (), "uint32"), *layout.specs(TOP)], [], {}
    writer = PartWriter(folder / "a.zarr", source=SOURCE, arrays=arrays, attributes=layout.attributes())
    for number in range(samples):
        found = distribution(tokens, rng)
        made.append(cut(found) if mass else found)
        name, key = f"s{number}", f"key-{number}"
        row = writer.append(name, key, {TARGET_IDS: np.zeros(tokens, np.uint32), **under(TOP, layout.encode(made[-1]))})
        ledger[name, SOURCE] = Row(name, SOURCE, key, {}, "a.zarr", row, tokens)
    writer.close()
    entries = float(np.mean([(one["logprob"] > -np.inf).sum(1).mean() for one in made]))
    return Rows(Store(folder, _Ledger(ledger)), layout, [f"s{n}" for n in range(samples)], made, entries)


@dataclass
class _Ledger:
    """Rows by sample and source, as `kdpipe.data.ledger.Ledger` gives them."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def get(self, sample: str, source: str) -> Row | None:
        return self.rows.get((sample, source))


def decoded(rows: Rows, sample: str) -> Any:
    """What training asks for."""
    part, row = rows.store.get(sample, SOURCE)
    return part.distribution(row, TOP)


def undecoded(rows: Rows, sample: str) -> Any:
    """The stored arrays of it, in memory of their own."""
    part, row = rows.store.get(sample, SOURCE)
    return part.read(row, [spec.name for spec in rows.layout.specs(TOP)])


def check(rows: Rows) -> bool:
    """Whether what comes back is what was put in, to the precision of float16."""
    same = True
    for sample, made in zip(rows.ids, rows.made, strict=True):
        found = decoded(rows, sample)
        width = found.ids.shape[1]
        same = same and np.array_equal(found.ids, made["ids"][:, :width]) and not (made["ids"][:, width:] >= 0).any()
        same = same and np.array_equal(found.logprob, made["logprob"][:, :width].astype(np.float16).astype(np.float32))
        same = same and np.array_equal(found.log_z, made["log_z"])
        same = same and np.array_equal(found.log_tail, made["log_tail"].astype(np.float16).astype(np.float32))
    return bool(same)


def _zarr(rows: Rows, folder: Path, tokens: int) -> Callable[[str], Any]:
    import zarr

    part, _ = rows.store.get(rows.ids[0], SOURCE)
    names = [spec.name for spec in rows.layout.specs(TOP)]
    arrays = [zarr.open_array(folder / "a.zarr" / name, mode="r") for name in names]

    def read(sample: str) -> Any:
        row = part.row_of(sample)
        start = tokens * row
        return [array[start : start + tokens] for array in arrays]

    return read


def measure(folder: Path, *, samples: int, tokens: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Microseconds a sample of each way, in shuffled order, checksums verified before, by rounds."""
    fixed = make(folder / "fixed", samples=samples, tokens=tokens, mass=False, seed=seed)
    mass = make(folder / "mass", samples=samples, tokens=tokens, mass=True, seed=seed)
    same = {"fixed": check(fixed), "mass": check(mass)}
    ways: dict[str, tuple[str, Rows, Callable[[str], Any]]] = {
        "fixed-decoded": (f"k = {K}, read and decoded", fixed, lambda sample: decoded(fixed, sample)),
        "fixed-read": (f"k = {K}, read only", fixed, lambda sample: undecoded(fixed, sample)),
        "mass-decoded": (f"mass {MASS}, read and decoded", mass, lambda sample: decoded(mass, sample)),
        "mass-read": (f"mass {MASS}, read only", mass, lambda sample: undecoded(mass, sample)),
        "zarr-read": (f"k = {K}, read only, by zarr-python", fixed, _zarr(fixed, folder / "fixed", tokens)),
    }
    order = np.random.default_rng(7).permutation(samples).tolist()
    micros: dict[str, list[float]] = {key: [] for key in ways}
    for turn in range(repeats + 1):
        for key, (_, rows, read) in ways.items():
            names = [rows.ids[number] for number in (order[:8] if key == "zarr-read" else order)]
            began = time.perf_counter()
            for name in names:
                read(name)
            if turn:  # the first is to warm up
                micros[key].append((time.perf_counter() - began) / len(names) * 1e6)
    return [
        {
            "case": key,
            "title": title,
            "micros": micros[key],
            "entries": rows.entries,
            "same": same[key.partition("-")[0]] if key != "zarr-read" else True,
            "goal": 60.0 if key == "fixed-decoded" else None,
        }
        for key, (title, rows, _) in ways.items()
    ]
