"""The benchmarks that can be imported: from their published files to rows of a manifest, and to official files.

A row carries `benchmark` (a name of `BENCHMARKS`) and `item` (the published item as JSON); `docs/benchmarks.md` says
what is done with each.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.evaluate.benchmarks.base import Benchmark
from kdpipe.stages.evaluate.benchmarks.clotho_aqa import CLOTHO_AQA
from kdpipe.stages.evaluate.benchmarks.emotion import IEMOCAP, MELD
from kdpipe.stages.evaluate.benchmarks.lettered import AIR_BENCH, MMSU
from kdpipe.stages.evaluate.benchmarks.worded import MMAR, MMAU

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {one.name: one for one in (MMAU, MMAR, MMSU, AIR_BENCH, MELD, IEMOCAP, CLOTHO_AQA)}
)
"""All benchmarks by name."""


def find(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        KdpipeError: there is none; the text names those there are.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = difflib.get_close_matches(name.lower().replace("-", "_"), BENCHMARKS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise KdpipeError(f"{name!r}: no such benchmark.{hint} There are {', '.join(BENCHMARKS)}.")


def item_of(value: Any, name: str) -> Mapping[str, Any]:
    """The published item in a manifest row's column `item`.

    Args:
        value: what stands there.
        name: id of the row, for messages.

    Raises:
        KdpipeError: it is not what an import wrote.
    """
    try:
        item = json.loads(value) if isinstance(value, str) else value
        json.dumps(item)  # it is written again, into the official file
    except (TypeError, ValueError, RecursionError):
        item = None
    if not isinstance(item, Mapping):
        raise KdpipeError(
            f"sample {name!r}: its row says `benchmark`, but its column `item` does not hold the benchmark's item. "
            "Make the manifest with `kdpipe benchmark import`."
        )
    return item


def official_predictions(name: str, rows: Sequence[tuple[Mapping[str, Any], str | None]]) -> bytes:
    """The prediction file of a benchmark, as its script reads it.

    Args:
        name: of the benchmark.
        rows: the published item and the prediction of each sample; None where there is no prediction.

    Raises:
        KdpipeError: no such benchmark, or an item is none of its items.
    """
    return find(name).official(rows)[1]
