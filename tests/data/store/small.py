"""A small finished store with every source and every kind of array, committed to a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.store.codec import Fidelity, encode_states, fit_basis
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import TARGET_IDS, ArraySpec, hidden_attributes, hidden_specs, lens_prefix, under
from kdpipe.data.store.metadata import part_rows
from kdpipe.data.store.writer import PartWriter

from .conftest import VOCABULARY, WIDTH, bucketed, layout_of

LENGTHS = {"dog-1": 3, "cat-2": 2, "ox": 4}
HEARD = {"clip-a": ("dog-1", "cat-2"), "clip-b": ("ox",)}
SOURCES = ("targets", "textual", "acoustic", "acoustic_top")


@dataclass
class Small:
    """The store, and what was put into it."""

    folder: Path
    logits: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    states: dict[str, np.ndarray] = field(default_factory=dict)
    target_ids: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def tmp(self) -> Path:
        return self.folder.parent / "tmp"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder, self.tmp)


def make_small(run: Path, *, sources: Sequence[str] = SOURCES, draws: bool = True) -> Small:
    """Builds it in `run/cache-teachers`, a part a source."""
    rng = np.random.default_rng(0)
    store = Small(run / "cache-teachers")
    layouts: dict[str, Layout] = {
        "textual": layout_of(6, logprob="float16", draws={"count": 2, "k": 6} if draws else None),
        "acoustic_top": layout_of(5, logprob="uint8", mass=0.8),
    }
    basis = fit_basis(torch.from_numpy(rng.normal(size=(9, WIDTH))), 2)
    for source in sources:
        path = store.tmp / f"{source}.zarr"
        specs, attributes, constants = _declared(source, layouts, basis)
        writer = PartWriter(path, source=source, arrays=specs, attributes=attributes, constants=constants)
        if source == "acoustic":
            seen = Fidelity()
            for clip, samples in HEARD.items():
                states = torch.from_numpy(rng.normal(size=(2, WIDTH)).astype(np.float32))
                store.states[clip] = states.numpy()
                arrays = under("hidden/28", encode_states(states, "low_rank_int8", basis))
                arrays |= under("hidden/03", encode_states(states, "low_rank_int8", basis))
                seen.update(states, states)
                writer.append(clip, f"k-{clip}", arrays, _info(clip, samples=[{"id": s} for s in samples]))
            writer.close({"fidelity": {"hidden/03": seen.result(), "hidden/28": seen.result()}})
        else:
            for sample, tokens in LENGTHS.items():
                arrays = {}
                if source == "targets":
                    ids = rng.integers(0, VOCABULARY, tokens, dtype=np.uint32)
                    store.target_ids[sample] = ids
                    arrays = {TARGET_IDS: ids}
                for prefix in _PREFIXES.get(source, ()):
                    logits = store.logits[sample, f"{source}/{prefix}"] = 3 * rng.normal(size=(tokens, VOCABULARY))
                    arrays |= under(prefix, _distribution(layouts[source], logits))
                writer.append(sample, f"k-{source}-{sample}", arrays, _info(sample))
            writer.close()
        name = f"{source}.zarr"
        store.ledger.commit(part_rows(path, name), built={name: path})
    store.ledger.commit(rejects=[Reject("bad", "targets", "k", "too_long", "9 tokens")])
    return store


_PREFIXES = {"textual": ("top", lens_prefix(9)), "acoustic_top": ("top",)}


def _info(name: str, **more: Any) -> dict[str, Any]:
    return {"fields": {"content": f"c-{name}", "student.tokenizer": "t"}, "cover": {"k": 6}, "content": "c", **more}


def _declared(source: str, layouts: dict[str, Layout], basis: np.ndarray) -> tuple[list[ArraySpec], dict, dict]:
    if source == "targets":
        return [ArraySpec(TARGET_IDS, (), "uint32")], {}, {}
    if source == "acoustic":
        specs = [spec for layer in (3, 28) for spec in hidden_specs(layer, WIDTH, "low_rank_int8", 2)]
        about = hidden_attributes(codec="low_rank_int8", layers=[3, 28], width=WIDTH, rank=2)
        return specs, about, {"hidden/03/basis": basis, "hidden/28/basis": basis}
    specs = [spec for prefix in _PREFIXES[source] for spec in layouts[source].specs(prefix)]
    return specs, layouts[source].attributes() | {"alignment": {"valid": VOCABULARY, "masked": []}}, {}


def _distribution(layout: Layout, logits: np.ndarray) -> dict[str, np.ndarray]:
    made = bucketed(logits, layout.k, mass=layout.mass)
    if layout.draws is not None:
        left = np.sort(np.argsort(-logits, 1)[:, layout.k :], 1)
        made["draws"] = np.repeat(left[:, None, :2], len(layout.temperatures), 1)
    return layout.encode(made)
