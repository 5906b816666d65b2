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


Grams = tuple[int, dict[int, torch.Tensor]]
"""Tokens seen, and by layer the sum of the outer products of their states, as `gram_of` gives it."""


@torch.inference_mode()
def grams_of(loaded: LoadedModel, batch: Batch, layers: Sequence[int], over: Literal["response", "audio"]) -> Grams:
    """What a batch adds to the bases of layers.

    Args:
        loaded: the teacher.
        batch: on any device.
        layers: counted from 1.
        over: positions that count.
    """
    rows = (batch.response_rows if over == "response" else batch.audio_rows).to(loaded.device)
    with loaded.capture(layers, rows) as states_NH:
        loaded.hidden(batch)
    return len(rows), {layer: gram_of(states_NH[layer]) for layer in layers}


def fit_bases(seen: Iterable[Grams], rank: int, say: Callable[[str], None], name: str) -> dict[int, np.ndarray]:
    """Fits bases float16 [rank, H] of layers on what a teacher says of some batches.

    Args:
        seen: of each batch; at least one.
        rank: of the bases.
        say: prints a line.
        name: of the teacher.
    """
    rest = iter(seen)
    tokens, sums = next(rest)
    for more, grams in rest:
        tokens += more
        sums = {layer: gram + grams[layer] for layer, gram in sums.items()}
    text = ", ".join(map(str, sums))
    say(f"cache-teachers: bases of rank {rank} for layers {text} are fitted on {tokens} tokens of {name}")
    return {layer: basis_of(gram, rank) for layer, gram in sums.items()}
