"""A teacher store as a mapping from sample ids to tensors, for notebooks and scripts of one's own.

    store = open_store("runs/mine")
    sample = store["dog-1"]
    sample.target_ids                     # int64 [T]
    sample.textual.top.probs()            # float32 [T, K]
    sample.textual.lens[9].at(2.0)
    sample.acoustic.hidden[28]            # [audio tokens, width]

Nothing is read before it is asked for, and torch is imported only then. Dimension key: T response tokens, A audio
tokens, H width of the teacher, K most entries kept, n temperatures, B vocabulary blocks, D draws.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger
from kdpipe.data.store.format import TARGET_IDS, TOP, lens_prefix
from kdpipe.data.store.reader import PartReader, Store

if TYPE_CHECKING:
    import torch

_STAGE = "cache-teachers"
_LENS = "lens/"


def open_store(path: str | Path) -> TeacherStore:
    """Opens a teacher store for reading; needs no configuration.

    Args:
        path: a run folder, the folder that `run.cache` names, or the `cache-teachers` folder in it.

    Raises:
        StoreError: there is no teacher store, or its ledger cannot be read.
    """
    given = Path(path).expanduser()
    for folder in (given / _STAGE, given):
        if (folder / "HEAD").is_file() and (folder / "parts").is_dir():
            return TeacherStore(folder)
    raise StoreError(
        f"{given}: no teacher store here ({_STAGE}/HEAD is missing). Name the run folder, or the folder that "
        "`run.cache` of the configuration names, after `kdpipe cache-teachers` has run."
    )


@dataclass(frozen=True, repr=False)
class Distribution:
    """What a teacher says at each response position: its likeliest ids, and the mass of all others.

    Row t is the distribution that predicts `target_ids[t]`. Kept entries and tails sum to 1 (up to the rounding of
    float16). Logarithms are natural (nats).

    Attributes:
        ids: int64 [T, K], kept token ids, most likely first; -1 where a token keeps fewer than K.
        logprob: float32 [T, K], their log-probabilities at `temperature`, falling; -inf where there is no id.
        log_z: float32 [T, n], log sum exp(z / T_n) over the vocabulary.
        log_tail: float32 [T, n, B], log-probability at T_n of vocabulary block b without the kept ids; -inf where
            nothing is left.
        temperatures: the n temperatures.
        block_bounds: B + 1 ids; block b covers ids `[block_bounds[b], block_bounds[b + 1])`.
        draws: int64 [T, n, D], ids drawn at T_n from the tail, -1 where nothing is left; None where none are stored.
        temperature: of `logprob`.
    """

    ids: torch.Tensor
    logprob: torch.Tensor
    log_z: torch.Tensor
    log_tail: torch.Tensor
    temperatures: tuple[float, ...]
    block_bounds: tuple[int, ...]
    draws: torch.Tensor | None = None
    temperature: float = 1.0

    def at(self, temperature: float) -> Distribution:
        """The same at another declared temperature T, n = 1: `log p_T = (logprob + log_z[1]) / T - log_z[T]`.

        Raises:
            StoreError: it was not declared when the teachers were cached, and so its tails are not known.
        """
        if temperature not in self.temperatures:
            raise StoreError(
                f"temperature {temperature} is not one of {', '.join(f'{t:g}' for t in self.temperatures)}. Add it to "
                "`teachers.temperatures` and run `kdpipe cache-teachers`, or ask the sample itself, not what `at` gave."
            )
        column = self.temperatures.index(temperature)
        logprob = self.logprob
        if temperature != self.temperature:
            log_z_1 = self.log_z[:, self.temperatures.index(self.temperature), None]
            logprob = (logprob + log_z_1) * self.temperature / temperature - self.log_z[:, column, None]
        return replace(
            self,
            logprob=logprob,
            log_z=self.log_z[:, column : column + 1],
            log_tail=self.log_tail[:, column : column + 1],
            temperatures=(temperature,),
            draws=None if self.draws is None else self.draws[:, column : column + 1],
            temperature=temperature,
        )

    def probs(self) -> torch.Tensor:
        """Probabilities of the kept ids at `temperature`, float32 [T, K]; 0 where there is no id."""
        return self.logprob.exp()

    def tail(self) -> torch.Tensor:
        """Probability of all ids that are not kept, at `temperature`, by vocabulary block: float32 [T, B]."""
        return self.log_tail[:, self.temperatures.index(self.temperature)].exp()

    def __repr__(self) -> str:
        tokens, entries = self.ids.shape
        at = "" if self.temperature == 1.0 else f" at temperature {self.temperature:g}"
        declared = ", ".join(f"{t:g}" for t in self.temperatures)
        return (
            f"Distribution({tokens} tokens, up to {entries} ids each{at}; temperatures {declared}; "
            f"{len(self.block_bounds) - 1} tail blocks)"
        )


class NotStored(StoreError, KeyError):
    """A sample, source or layer that a store does not hold."""

    __str__ = Exception.__str__


class Layers(Mapping[int, Any]):
    """Something of several layers of a teacher, by layer (counted from 1); each is read when it is asked for."""

    def __init__(self, what: str, layers: tuple[int, ...], read: Callable[[int], Any]):
        self._what = what
        self._layers = layers
        self._read = read

    def __getitem__(self, layer: int) -> Any:
        if layer not in self._layers:
            there = f"layers {', '.join(map(str, self._layers))}" if self._layers else "none of any layer"
            raise NotStored(f"{self._what} of layer {layer} is not stored; there is {there}")
        return self._read(layer)

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Layers({self._what} of {', '.join(map(str, self._layers)) or 'no layer'})"


class Knowledge:
    """What one teacher knows about one sample.

    Attributes:
        tokens: rows: T for the sources over the response, A for `acoustic`.
        lens: `Distribution` by layer, of inner layers taken through the teacher's own norm and head.
        hidden: states after a layer, before the final norm, by layer: [tokens, H] bfloat16 or float32, as the codec of
            the store gives them back (int8, fp8 and low rank: float32).
        attributes: what the part says of itself: `distributions`, `states`, `fidelity`, `alignment`, `teacher`.
    """

    def __init__(self, sample: str, part: PartReader, row: int):
        self._sample = sample
        self._part = part
        self._row = row
        self.tokens = part.tokens(row)
        self.attributes = part.attributes
        arrays = part.attributes["arrays"]
        prefixes = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
        lens = tuple(sorted(int(prefix.removeprefix(_LENS)) for prefix in prefixes if prefix.startswith(_LENS)))
        layers = tuple(part.attributes.get("states", {}).get("layers", ()))
        about = f"sample {sample!r}, {part.source}"
        self.lens: Mapping[int, Distribution] = Layers(f"{about}: lens", lens, lambda n: self._read(lens_prefix(n)))
        self.hidden: Mapping[int, torch.Tensor] = Layers(
            f"{about}: hidden states", layers, lambda layer: part.hidden(row, layer)
        )
        self._has_top = TOP in prefixes

    @property
    def top(self) -> Distribution:
        """The distribution of the teacher's last layer.

        Raises:
            StoreError: it is not stored, or damaged.
        """
        if not self._has_top:
            raise NotStored(
                f"sample {self._sample!r}: {self._part.source} holds no distributions, only hidden states of layers "
                f"{', '.join(map(str, self.hidden))}"
            )
        return self._read(TOP)

    def _read(self, prefix: str) -> Distribution:
        import torch

        layout = self._part.layout
        # Draws are of the tail that one k leaves; beside more kept entries they mean nothing.
        has_draws = layout.draws is not None and layout.draws["k"] >= layout.kept
        found = self._part.distribution(self._row, prefix, draws=has_draws)
        return Distribution(
            ids=torch.from_numpy(np.array(found.ids)),
            logprob=torch.from_numpy(np.array(found.logprob)),
            log_z=torch.from_numpy(np.array(found.log_z)),
            log_tail=torch.from_numpy(np.array(found.log_tail)),
            temperatures=found.temperatures,
            block_bounds=found.block_bounds,
            draws=None if found.draws is None else torch.from_numpy(found.draws),
        )

    def __repr__(self) -> str:
        holds = ["top"] if self._has_top else []
        holds += [f"{name} of {len(layers)} layers" for name in ("lens", "hidden") if (layers := getattr(self, name))]
        return f"Knowledge({self._part.source} of {self._sample!r}: {self.tokens} tokens; {', '.join(holds)})"


class Sample:
    """One sample of a store: its response, and what the teachers know about it.

    Attributes:
        id: of the sample.
        sources: what is stored of it, such as `targets`, `textual`, `acoustic`.
    """

    def __init__(self, store: TeacherStore, sample_id: str, sources: tuple[str, ...]):
        self._store = store
        self.id = sample_id
        self.sources = sources

    def __reduce__(self) -> tuple[Any, ...]:
        return Sample, (self._store, self.id, self.sources)

    @cached_property
    def target_ids(self) -> torch.Tensor:
        """The response in token ids of the student, end token included: int64 [T].

        Raises:
            StoreError: it is not stored, or damaged.
        """
        import torch

        part, row = self._get("targets")
        return torch.from_numpy(part.read(row, [TARGET_IDS])[TARGET_IDS].astype(np.int64))

    @cached_property
    def textual(self) -> Knowledge:
        """What the teacher knows that reads: at each response position.

        Raises:
            StoreError: it is not stored, or damaged.
        """
        return Knowledge(self.id, *self._get("textual"))

    @cached_property
    def acoustic(self) -> Knowledge:
        """What the teacher knows that hears: hidden states at each audio token; samples with the same clips share them.

        Raises:
            StoreError: it is not stored, or damaged.
        """
        return Knowledge(self.id, *self._get("acoustic"))

    @property
    def acoustic_top(self) -> Distribution:
        """What the teacher that hears says at each response position.

        Raises:
            StoreError: it is not stored, or damaged.
        """
        return Knowledge(self.id, *self._get("acoustic_top")).top

    def _get(self, source: str) -> tuple[PartReader, int]:
        if source not in self.sources:
            raise NotStored(
                f"sample {self.id!r}: {source} is not stored; there is {', '.join(self.sources)}. "
                "`kdpipe cache-teachers` stores what the weights of the configuration (`train.weights`) ask for."
            )
        return self._store.reader.get(self.id, source)

    def __repr__(self) -> str:
        return f"Sample({self.id!r}: {', '.join(self.sources)})"


class TeacherStore(Mapping[str, Sample]):
    """Samples of a teacher store by id, as `open_store` gives them. Safe to use from several threads.

    It shows the store as it was when it was opened; open it again to see what was added.

    Args:
        folder: the folder `cache-teachers`.

    Attributes:
        folder: that folder.
        sources: what is stored of any sample.
        reader: gives the part and row of a sample's source, for what is not offered here.

    Raises:
        StoreError: the ledger cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        ledger = Ledger(folder, folder.parent / "tmp")
        self._of: dict[str, tuple[str, ...]] = {}
        for row in sorted(ledger.rows(), key=lambda row: (row.id, _order(row.source))):
            self._of[row.id] = (*self._of.get(row.id, ()), row.source)
        self.sources = tuple(sorted({s for sources in self._of.values() for s in sources}, key=_order))
        self.reader = Store(ledger.parts, ledger)

    def __getitem__(self, sample_id: str) -> Sample:
        if sample_id not in self._of:
            close = difflib.get_close_matches(str(sample_id), self._of, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it holds {len(self)} samples"
            raise NotStored(f"{self.folder}: holds no sample {sample_id!r}{hint}")
        return Sample(self, sample_id, self._of[sample_id])

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherStore, (self.folder,)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __repr__(self) -> str:
        return f"TeacherStore({str(self.folder)!r}: {len(self)} samples; {', '.join(self.sources) or 'empty'})"


_ORDER = ("targets", "textual", "acoustic", "acoustic_top")


def _order(source: str) -> tuple[int, str]:
    return (_ORDER.index(source) if source in _ORDER else len(_ORDER), source)
