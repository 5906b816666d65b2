"""Bases of the low-rank codecs: one a layer and teacher, fitted once on samples spread over the data.

Every part holds the bases its states are in, so it can be read alone. Later parts of the same teacher and codec take
those of the parts that are there, so that states of one store can be compared and trained on together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch

from kdpipe.data.ledger import Ledger
from kdpipe.data.store.codec import basis_of, gram_of
from kdpipe.data.store.format import hidden_prefix
from kdpipe.data.store.reader import PartReader
from kdpipe.stages.base import Wanted
from kdpipe.stages.models.inputs import Batch
from kdpipe.stages.models.loaded import LoadedModel

SAMPLES = 256
"""Samples that bases are fitted on, evenly spread over what is to be done."""

_OF_TEACHER = ("version", "teacher.model", "acoustic.model", "codec")


def known_bases(ledger: Ledger, want: Wanted, layers: Iterable[int]) -> dict[int, np.ndarray]:
    """Bases float16 [r, H] by layer that parts of the same source, teacher and codec hold."""
    mine = {name: want.fields[name] for name in _OF_TEACHER if name in want.fields}
    lost = ledger.lost_parts()
    parts = {
        row.part
        for row in ledger.rows()
        if row.source == want.source and row.part not in lost and mine.items() <= row.fields.items()
    }
    missing, found = set(layers), {}
    for name in sorted(parts):
        if not missing:
            break
        part = PartReader(ledger.parts / name)
        for layer in sorted(missing & set(part.attributes.get("states", {}).get("layers", ()))):
            found[layer] = part.constant(f"{hidden_prefix(layer)}/basis")
        missing -= found.keys()
    return found


@torch.inference_mode()
def fit_bases(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    layers: Sequence[int],
    over: Literal["response", "audio"],
    rank: int,
    say: Callable[[str], None],
) -> dict[int, np.ndarray]:
    """Fits bases float16 [rank, H] of layers on what a teacher says of some batches.

    Args:
        loaded: the teacher.
        batches: on any device.
        layers: counted from 1.
        over: positions that count.
        rank: of the bases.
        say: prints a line.
    """
    grams: dict[int, torch.Tensor] = {}
    tokens = 0
    for batch in batches:
        rows = (batch.response_rows if over == "response" else batch.audio_rows).to(loaded.device)
        with loaded.capture(layers, rows) as states_NH:
            loaded.hidden(batch)
        tokens += len(rows)
        for layer in layers:
            gram = gram_of(states_NH[layer])
            grams[layer] = grams[layer] + gram if layer in grams else gram
    text = ", ".join(map(str, layers))
    say(f"cache-teachers: bases of rank {rank} for layers {text} are fitted on {tokens} tokens of {loaded.folder.name}")
    return {layer: basis_of(gram, rank) for layer, gram in grams.items()}
