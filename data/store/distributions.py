"""How the distributions of a part are stored, and how they come back.

Shape suffixes: T tokens of a unit, K most entries kept, E entries of all its tokens together, n temperatures, B
vocabulary blocks, D draws.

Two layouts. `fixed`: K entries of each token, ids packed row by row; an entry that repeats the first id of its token is
none, and stands where fewer than K ids have any probability. `mass`: of each token the likeliest entries that
reach a mass, in the manner of a CSR matrix: `count` says how many, and ids and log-probabilities of all tokens follow
one another. What a token does not keep is in its tails, exactly, so each layout says all of what it says.

Log-probabilities of dtype `uint8` are 256 even steps between a token's largest and smallest (`range`, float16):
`logprob = range[0] - code / 255 * (range[0] - range[1])`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from kdpipe.data.errors import StoreError
from kdpipe.data.store.format import NO_ID, ArraySpec
from kdpipe.data.store.packing import id_bits, pack_ids, packed_bytes, unpack_ids

LogprobDtype = Literal["float16", "float32", "uint8"]


@dataclass(frozen=True, slots=True)
class StoredDistribution:
    """What a teacher says about each token of a sample. T tokens, K kept entries, n temperatures, B blocks, D draws.

    Attributes:
        ids: int64 [T, K], kept token ids, most likely first; -1 where a token keeps fewer.
        logprob: float32 [T, K], their log-probabilities at temperature 1 (nats), falling; -inf where there is no id.
        log_z: float32 [T, n], log sum exp(z / T_n) over the vocabulary (nats).
        log_tail: float32 [T, n, B], log-probability at T_n of block b without the kept ids (nats);
            -inf where nothing is left.
        temperatures: the n temperatures.
        block_bounds: B + 1 ids; block b covers `[block_bounds[b], block_bounds[b + 1])`.
        draws: int64 [T, n, D], ids drawn at T_n from the vocabulary without the kept ids; -1 where nothing is left.
            None unless they were asked for.
    """

    ids: np.ndarray
    logprob: np.ndarray
    log_z: np.ndarray
    log_tail: np.ndarray
    temperatures: tuple[float, ...]
    block_bounds: tuple[int, ...]
    draws: np.ndarray | None = None


@dataclass(frozen=True)
class Layout:
    """How each distribution of a part is stored.

    Attributes:
        k: entries asked for; `kept` are stored, fewer only where the whole vocabulary has fewer.
        kept: most entries of a token.
        temperatures: declared temperatures, 1 among them.
        block_bounds: `blocks + 1` rising ids from 0 to the end of the vocabulary.
        logprob: dtype of the kept log-probabilities.
        mass: mass that the entries of a token reach where k allows it; None: each token has k.
        min_k: with a mass, the fewest entries of a token.
        draws: `count` of draws, and `k`, how many of the likeliest ids are not in the tail they are from; None without.

    Raises:
        ValueError: 1 is not among the temperatures, the bounds do not rise from 0, or draws stand beside a mass.
    """

    k: int
    kept: int
    temperatures: tuple[float, ...]
    block_bounds: tuple[int, ...]
    logprob: LogprobDtype = "float16"
    mass: float | None = None
    min_k: int = 1
    draws: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        bounds = self.block_bounds
        if 1.0 not in self.temperatures:
            raise ValueError(f"temperatures {list(self.temperatures)} lack 1, from which the others are computed")
        if len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"block bounds {list(bounds)} do not rise from 0")
        if self.draws is not None and self.mass is not None:
            raise ValueError("draws are from the tail that one k leaves, and with a mass each token has its own")

    @property
    def blocks(self) -> int:
        """Vocabulary blocks B."""
        return len(self.block_bounds) - 1

    @property
    def bits(self) -> int:
        """Bits of a packed id."""
        return id_bits(self.block_bounds[-1])

    def specs(self, prefix: str) -> tuple[ArraySpec, ...]:
        """Arrays of one distribution; `docs/format.md` says what they mean.

        Args:
            prefix: `top`, or `format.lens_prefix(layer)`.
        """
        n, tail = len(self.temperatures), "float32" if self.logprob == "float32" else "float16"
        entries: tuple[ArraySpec, ...]
        if self.mass is None:
            entries = (
                ArraySpec(f"{prefix}/ids", (packed_bytes(self.kept, self.bits),), "uint8"),
                ArraySpec(f"{prefix}/logprob", (self.kept,), self.logprob),
            )
        else:
            entries = (
                ArraySpec(f"{prefix}/count", (), "uint8" if self.kept < 256 else "uint32"),
                ArraySpec(f"{prefix}/ids", (), "uint8", f"{prefix}/bytes"),
                ArraySpec(f"{prefix}/logprob", (), self.logprob, f"{prefix}/entries"),
            )
        return (
            *entries,
            *((ArraySpec(f"{prefix}/range", (2,), "float16"),) if self.logprob == "uint8" else ()),
            ArraySpec(f"{prefix}/log_z", (n,), "float32"),
            ArraySpec(f"{prefix}/log_tail", (n, self.blocks), tail),
            *((ArraySpec(f"{prefix}/draws", (n, self.draws["count"]), "uint32"),) if self.draws is not None else ()),
        )

    def bytes_per_token(self, entries: float | None = None) -> float:
        """Bytes of one token in one distribution.

        Args:
            entries: mean entries of a token in the layout `mass`; None: the most.
        """
        specs, kept = self.specs("d"), self.kept if entries is None else entries
        fixed = sum(spec.row_bytes for spec in specs if spec.axis == "tokens")
        if self.mass is None:
            return fixed
        return fixed + kept * (self.bits / 8 + next(s.row_bytes for s in specs if s.name == "d/logprob"))

    def attributes(self) -> dict[str, Any]:
        """Attributes a part needs so that its distributions can be read."""
        about: dict[str, Any] = {
            "layout": "fixed" if self.mass is None else "mass",
            "k": int(self.k),
            "kept": int(self.kept),
            "id_bits": self.bits,
            "logprob": self.logprob,
            "temperatures": [float(value) for value in self.temperatures],
            "block_bounds": [int(value) for value in self.block_bounds],
        }
        if self.mass is not None:
            about |= {"mass": float(self.mass), "min_k": int(self.min_k)}
        if self.draws is not None:
            about["draws"] = {"count": int(self.draws["count"]), "k": int(self.draws["k"])}
        return {"distributions": about}

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> Layout:
        """What `attributes` says.

        Raises:
            StoreError: the part has no distributions, or in a layout that this kdpipe does not read.
        """
        about = attributes.get("distributions", {})
        if about.get("layout") not in ("fixed", "mass"):
            raise StoreError(f"no distributions that this kdpipe reads (layout {about.get('layout')!r})")
        return Layout(
            k=about["k"],
            kept=about["kept"],
            temperatures=tuple(about["temperatures"]),
            block_bounds=tuple(about["block_bounds"]),
            logprob=about["logprob"],
            mass=about.get("mass"),
            min_k=about.get("min_k", 1),
            draws=about.get("draws"),
        )

    def encode(self, made: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of one unit, as `specs` declares them, without their prefix.

        Args:
            made: `ids` [T, K] (-1 or anything where `logprob` is -inf), `logprob` [T, K] falling, `log_z` [T, n],
                `log_tail` [T, n, B], and with draws `draws` [T, n, D], -1 where nothing is left. In the layout
                `mass` a token's entries come first in its row.
        """
        ids_TK, logprob_TK = made["ids"], made["logprob"].astype(np.float32)
        kept_TK = logprob_TK > -np.inf
        arrays: dict[str, np.ndarray] = {}
        if self.mass is not None:
            count_T = kept_TK.sum(1)
            arrays["count"] = count_T.astype(np.uint8 if self.kept < 256 else np.uint32)
            arrays["ids"] = pack_ids(ids_TK[kept_TK][None], self.bits)[0]
        else:
            arrays["ids"] = pack_ids(np.where(kept_TK, ids_TK, ids_TK[:, :1]), self.bits)
        if self.logprob == "uint8":
            last_T = np.maximum(kept_TK.sum(1) - 1, 0)
            rows_T = np.arange(len(ids_TK))
            ends_T2 = np.stack([logprob_TK[:, 0], logprob_TK[rows_T, last_T]], 1)
            arrays["range"] = np.maximum(ends_T2, np.finfo(np.float16).min).astype(np.float16)
            high_T1, low_T1 = arrays["range"].astype(np.float32)[:, :1], arrays["range"].astype(np.float32)[:, 1:]
            step_T1 = np.maximum(high_T1 - low_T1, 1e-30) / 255
            logprob_TK = ((high_T1 - logprob_TK) / step_T1).clip(0, 255).round()
        kept = logprob_TK if self.mass is None else logprob_TK[kept_TK]
        with np.errstate(over="ignore"):
            arrays |= {
                "logprob": kept.astype(self.logprob),
                "log_z": made["log_z"].astype(np.float32),
                "log_tail": made["log_tail"].astype(np.float32 if self.logprob == "float32" else np.float16),
            }
        if self.draws is not None:
            draws = made["draws"]
            arrays["draws"] = np.where(draws < 0, NO_ID, draws).astype(np.uint32)
        return arrays

    def decode(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `encode` was given, as far as it is kept: dtypes and absent entries as in `StoredDistribution`."""
        made = self._decode_fixed(stored) if self.mass is None else self._decode_mass(stored)
        return {**made, "log_z": stored["log_z"], "log_tail": _wide(stored["log_tail"])}

    def _decode_fixed(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids_TK = unpack_ids(stored["ids"], self.kept, self.bits)
        if self.logprob == "uint8":
            high_T, step_T = self._steps(stored)
            logprob_TK = high_T[:, None] - stored["logprob"] * step_T[:, None]
        else:
            logprob_TK = _wide(stored["logprob"])
        if self.kept > 1 and bool((ids_TK[:, -1] == ids_TK[:, 0]).any()):
            gone_TK = ids_TK == ids_TK[:, :1]
            gone_TK[:, 0] = False
            ids_TK[gone_TK], logprob_TK[gone_TK] = -1, -np.inf
        return {"ids": ids_TK, "logprob": logprob_TK}

    def _decode_mass(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        count_T = stored["count"].astype(np.int64)
        shape = (len(count_T), int(count_T.max(initial=0)))
        places_E = np.flatnonzero(np.arange(shape[1]) < count_T[:, None])
        ids_TK, logprob_TK = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        ids_TK.reshape(-1)[places_E] = unpack_ids(stored["ids"][None], len(places_E), self.bits)[0]
        if self.logprob == "uint8":
            high_E, step_E = (values_T.repeat(count_T) for values_T in self._steps(stored))
            logprob_E = high_E - stored["logprob"] * step_E
        else:
            logprob_E = _wide(stored["logprob"])
        logprob_TK.reshape(-1)[places_E] = logprob_E
        return {"ids": ids_TK, "logprob": logprob_TK}

    def _steps(self, stored: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of the dtype `uint8`: largest log-probability and size of a step, float32 [T] each."""
        high_T, low_T = stored["range"].astype(np.float32).T
        return high_T, (high_T - low_T) / 255


def narrowed(
    made: dict[str, np.ndarray],
    layout: Layout,
    *,
    k: int,
    mass: float | None,
    min_k: int,
    temperatures: Sequence[float],
) -> StoredDistribution:
    """A decoded distribution with fewer entries and temperatures.

    An entry that is dropped adds its probability to the tail of its block, at every temperature T, as
    `log p_T = (logprob + log_z[1]) / T - log_z[T]`; nothing is lost but the entry.
    """
    ids_TK, logprob_TK = made["ids"], made["logprob"]
    log_z_Tn, log_tail_TnB = made["log_z"], made["log_tail"]
    if tuple(temperatures) != layout.temperatures:
        columns = [layout.temperatures.index(temperature) for temperature in temperatures]
        log_z_Tn, log_tail_TnB = log_z_Tn[:, columns], log_tail_TnB[:, columns]
    width = ids_TK.shape[1]
    dropped_TK = None
    if k < width:
        dropped_TK = np.broadcast_to(np.arange(width) >= k, ids_TK.shape)
    if mass is not None and (layout.mass is None or mass < layout.mass or min_k < layout.min_k):
        cut_TK = np.arange(width) >= entries_for_mass(logprob_TK, mass, min_k)[:, None]
        dropped_TK = cut_TK if dropped_TK is None else dropped_TK | cut_TK
    if dropped_TK is not None:
        gone_TK = dropped_TK & (ids_TK >= 0)
        first = int((~dropped_TK).sum(1).min(initial=width))
        log_tail_TnB = _with_dropped(
            np.where(gone_TK, ids_TK, 0)[:, first:],
            np.where(gone_TK, logprob_TK, -np.inf)[:, first:],
            made["log_z"][:, layout.temperatures.index(1.0)],
            log_z_Tn,
            log_tail_TnB,
            temperatures,
            layout.block_bounds,
        )
        most = int((~dropped_TK).sum(1).max(initial=0)) if mass is not None else k
        ids_TK = np.where(dropped_TK, -1, ids_TK)[:, :most]
        logprob_TK = np.where(dropped_TK, np.float32(-np.inf), logprob_TK)[:, :most]
    return StoredDistribution(ids_TK, logprob_TK, log_z_Tn, log_tail_TnB, tuple(temperatures), layout.block_bounds)


def entries_for_mass(logprob_TK: np.ndarray, mass: float, min_k: int) -> np.ndarray:
    """Entries int64 [T] of each row, likeliest first, that reach a mass: at least `min_k`, at most all."""
    before_TK = np.cumsum(np.exp(logprob_TK.astype(np.float64)), axis=1)
    return np.clip((before_TK < mass).sum(1) + 1, min(min_k, logprob_TK.shape[1]), logprob_TK.shape[1])


def _wide(array: np.ndarray) -> np.ndarray:
    """float32 of float16; of many by torch, which is ten times as fast at it as numpy, where it is loaded anyway."""
    torch = sys.modules.get("torch")
    if torch is None or array.dtype != np.float16 or array.size < 4096:
        return array.astype(np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).float().numpy()


@lru_cache(maxsize=16)
def _bounds_array(bounds: tuple[int, ...]) -> np.ndarray:
    return np.asarray(bounds)


def _with_dropped(
    ids: np.ndarray,
    logprob: np.ndarray,
    log_z_1: np.ndarray,
    log_z: np.ndarray,
    log_tail: np.ndarray,
    temperatures: Sequence[float],
    bounds: tuple[int, ...],
) -> np.ndarray:
    """Tails [T, n, B] with the entries `ids` [T, d] that are no longer kept (-inf: none) added to their blocks."""
    logits = logprob.astype(np.float64) + log_z_1.astype(np.float64)[:, None]
    block = np.searchsorted(_bounds_array(bounds), ids, side="right") - 1
    tail = log_tail.astype(np.float64)
    for column, temperature in enumerate(temperatures):
        dropped = logits / temperature - log_z[:, column, None]
        for b in range(tail.shape[2]):
            in_block = np.where(block == b, dropped, -np.inf)
            tail[:, column, b] = np.logaddexp(tail[:, column, b], np.logaddexp.reduce(in_block, axis=1))
    return tail.astype(np.float32)
