"""Whether the values of a part can be what a teacher said: finite, in order, and distributions that sum to 1.

Checksums prove that bytes are what was written; this proves what was written. Shape suffixes as in
`kdpipe.data.store.distributions`: T tokens of a unit, K most entries kept, n temperatures, B blocks, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import NO_ID
from kdpipe.data.store.packing import packed_bytes

_SLACK = {"float32": 1e-3, "float16": 1.5e-2, "uint8": 1.5e-2}
"""By how much the mass of a token may differ from 1 at temperature 1: rounding of all that is summed."""

_ABOVE_ZERO = 1e-4
"""By how much a log-probability may be above 0 (nats): rounding of the normalizer it was taken from."""


def infinite(name: str, dtype: str, rows: np.ndarray) -> np.ndarray | None:
    """Which rows of an array hold a value that is not finite, or a scale below 0.

    Args:
        name: of the array.
        dtype: declared, as in `format.STORED_AS`.
        rows: [rows, *width] in the storage dtype.

    Returns:
        bool [rows], or None where all are sound, or where infinity may stand in this array.
    """
    short = name.rsplit("/", 1)[-1]
    if short in ("logprob", "log_tail"):
        return None
    if dtype == "bfloat16":
        bad = (rows & 0x7F80) == 0x7F80
    elif dtype == "float8_e4m3fn":
        bad = (rows & 0x7F) == 0x7F
    elif rows.dtype.kind == "f":
        bad = ~np.isfinite(rows)
        if short == "scale":
            bad |= rows < 0
    else:
        return None
    return np.any(bad.reshape(len(rows), -1), axis=1) if np.any(bad) else None


@lru_cache(maxsize=8)
def unshared(bits: int, valid: int, masked: tuple[int, ...]) -> np.ndarray:
    """Which ids of `bits` bits no distribution is over: bool [2 ** bits]."""
    table = np.zeros(1 << bits, bool)
    table[valid:] = True
    table[list(masked)] = True
    return table


def unit_fault(
    layout: Layout, read: Callable[[str], np.ndarray], unshared_ids: np.ndarray, spans: Mapping[str, int]
) -> str | None:
    """What is wrong with a distribution of one unit, in words, or None.

    Args:
        layout: of the part.
        read: gives an array of the unit by its name without prefix, in its storage dtype.
        unshared_ids: bool [2 ** bits], see `unshared`.
        spans: with a mass, rows of the unit on the axes `entries` and `bytes`.
    """
    names = {"ids", "logprob", "log_z", "log_tail"}
    stored: dict[str, Any] = {}
    if layout.mass is not None:
        stored["count"] = count_T = read("count")
        total = int(count_T.sum(dtype=np.int64))
        if len(count_T) and not 1 <= int(count_T.min()) <= int(count_T.max()) <= layout.kept:
            return f"counts of entries from {count_T.min()} to {count_T.max()}, not from 1 to {layout.kept}"
        if total != spans["entries"] or packed_bytes(total, layout.bits) != spans["bytes"]:
            return f"{total} entries by their counts, {spans['entries']} in {spans['bytes']} bytes by their starts"
    if layout.logprob == "uint8":
        names.add("range")
    stored |= {name: read(name) for name in names}
    if not len(stored["log_z"]):
        return None
    if layout.logprob == "uint8" and (stored["range"][:, 1] > stored["range"][:, 0]).any():
        return "a range that rises"
    made = layout.decode(stored)
    found = _entries_fault(made, layout, unshared_ids) or _mass_fault(made, stored, layout)
    if found is None and layout.draws is not None:
        found = _draws_fault(read("draws"), unshared_ids)
    return found


def _entries_fault(made: Mapping[str, np.ndarray], layout: Layout, unshared_ids: np.ndarray) -> str | None:
    ids_TK, logprob_TK, log_tail_TnB = made["ids"], made["logprob"], made["log_tail"]
    # NaN is not at most anything.
    if not (logprob_TK <= _ABOVE_ZERO).all():
        return "a log-probability that is NaN or above 0"
    if not (logprob_TK[:, 1:] <= logprob_TK[:, :-1]).all():
        return "log-probabilities that do not fall"
    if not (log_tail_TnB <= _ABOVE_ZERO).all():
        return "a tail that is NaN or above 0"
    wrong_TK = unshared_ids[ids_TK]
    if wrong_TK.any() and (wrong_TK & (logprob_TK > -np.inf)).any():
        return "a token id that is masked or beyond the vocabulary"
    return None


def _mass_fault(made: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray], layout: Layout) -> str | None:
    logprob_TK, log_z_Tn, log_tail_TnB = made["logprob"], made["log_z"], made["log_tail"]
    slack: Any = _SLACK[layout.logprob]
    if layout.logprob == "uint8":
        ends_T2 = stored["range"].astype(np.float32)
        slack = slack + 0.51 * (ends_T2[:, 0] - ends_T2[:, 1]) / 255
    one = layout.temperatures.index(1.0)
    for column, temperature in enumerate(layout.temperatures):
        log_p_TK = logprob_TK
        if temperature != 1.0:
            log_p_TK = (logprob_TK + log_z_Tn[:, one, None]) / temperature - log_z_Tn[:, column, None]
        kept_T = np.exp(log_p_TK).sum(1)
        mass_T = kept_T + np.exp(log_tail_TnB[:, column]).sum(1)
        if not (np.abs(mass_T - 1) <= slack * max(1.0, 1 / temperature)).all():
            worst = mass_T[np.nanargmax(np.abs(mass_T - 1))] if np.isfinite(mass_T).any() else np.nan
            return f"a distribution that sums to {worst:.4f} at temperature {temperature:g}"
        if temperature == 1.0 and layout.mass is not None:
            short_T = (stored["count"] < layout.kept) & (kept_T < layout.mass - slack)
            if short_T.any():
                return f"entries that reach a mass of {kept_T[short_T].min():.4f}, not {layout.mass:g}"
    return None


def _draws_fault(draws_TnD: np.ndarray, unshared_ids: np.ndarray) -> str | None:
    real_TnD = draws_TnD != NO_ID
    if (draws_TnD[real_TnD] >= len(unshared_ids)).any() or unshared_ids[draws_TnD[real_TnD]].any():
        return "a drawn id that is masked or beyond the vocabulary"
    return None if (draws_TnD[..., 1:] >= draws_TnD[..., :-1]).all() else "draws that do not rise"
