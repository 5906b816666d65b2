"""Holds what is stored against the live teachers: the same samples again, without rounding, and how far that is off.

Dimension key: T tokens of a unit, K entries kept of a stored distribution, L of a live one, B blocks, H width.

With p the stored and q the live probabilities of the stored ids, and everything else as one outcome (a kept id that the
live teacher's L likeliest lack has at most the least of them):

    total variation = (sum |p - q| + |p_rest - q_rest|) / 2
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.codec import decode_states
from kdpipe.data.store.distributions import StoredDistribution
from kdpipe.data.store.format import hidden_prefix
from kdpipe.data.store.reader import PartReader
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.cache_teachers.capture import Job, Scribe
from kdpipe.stages.cache_teachers.run import Work, answer_job, hear_job, read_job, with_features
from kdpipe.stages.cache_teachers.shape import Shape
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.parallel import open_teacher
from kdpipe.stages.progress import progress
from kdpipe.stages.textualize.table import read_descriptions

_SPARE = 16
"""Live entries beyond twice the stored ones, so that a stored id is next to always among them."""


@dataclass
class Difference:
    """How far a source is off, over the samples that were asked again.

    Attributes:
        samples: their number.
        tokens: positions compared.
    """

    samples: int = 0
    tokens: int = 0
    _nats: list[np.ndarray] = field(default_factory=list)
    _variation: list[np.ndarray] = field(default_factory=list)
    _cosine: list[np.ndarray] = field(default_factory=list)

    def result(self) -> dict[str, float]:
        """Plain numbers, each with `_mean` and `_worst`, as far as there are.

        Returns:
            `nats`: absolute difference of the log-probabilities of kept ids. `variation`: total variation of a
            position's distribution. `cosine`: of hidden states, stored and live.
        """
        found = {}
        for name, pieces, worst in (
            ("nats", self._nats, np.max),
            ("variation", self._variation, np.max),
            ("cosine", self._cosine, np.min),
        ):
            flat = np.concatenate([piece.ravel() for piece in pieces]) if pieces else np.empty(0)
            if flat.size:
                found |= {f"{name}_mean": float(flat.mean()), f"{name}_worst": float(worst(flat))}
        return found

    def add_distribution(self, stored: StoredDistribution, live: Mapping[str, np.ndarray]) -> None:
        """Compares at temperature 1: `live` has `ids` and `logprob` [T, L]."""
        kept_TK = stored.ids >= 0
        log_q_TK = np.empty(stored.ids.shape)
        for t, (ids, log_q) in enumerate(zip(live["ids"], live["logprob"].astype(np.float64), strict=True)):
            by_id = dict(zip(ids.tolist(), log_q.tolist(), strict=True))
            log_q_TK[t] = [by_id.get(index, log_q[-1]) for index in stored.ids[t].tolist()]
        log_p_TK = stored.logprob.astype(np.float64)
        p_TK, q_TK = (np.where(kept_TK, np.exp(x), 0.0) for x in (log_p_TK, log_q_TK))
        p_rest_T = np.exp(stored.log_tail[:, 0].astype(np.float64)).sum(1)
        self._nats.append(np.abs(log_p_TK - log_q_TK)[kept_TK])
        self._variation.append((np.abs(p_TK - q_TK).sum(1) + np.abs(p_rest_T - (1 - q_TK.sum(1)))) / 2)

    def add_states(self, stored: torch.Tensor, live: np.ndarray) -> None:
        """Compares states [T, H]."""
        found = torch.nn.functional.cosine_similarity(stored.double(), torch.from_numpy(live).double(), dim=1)
        self._cosine.append(found.numpy())


def compare(ctx: Context, fresh: Sequence[Wanted], count: int) -> dict[str, Difference]:
    """Asks the live teachers again.

    Args:
        ctx: the run.
        fresh: wants that the store serves.
        count: samples of each source, evenly spread over its parts.

    Returns:
        By source.

    Raises:
        KdpipeError: a teacher cannot be loaded, or a stored part is damaged.
    """
    work = Work.of(ctx)
    chosen: dict[str, list[Wanted]] = {}
    for source in ("textual", "acoustic", "acoustic_top"):
        rows: dict[tuple[str, int], tuple[Row, Wanted]] = {}
        for want in fresh:
            if want.source == source and (row := work.ledger.get(want.id, source)) is not None:
                rows.setdefault((row.part, row.row), (row, want))
        ordered = [rows[place][1] for place in sorted(rows)]
        step = max(1.0, len(ordered) / count)
        chosen[source] = [ordered[int(n * step)] for n in range(min(count, len(ordered)))]
    found: dict[str, Difference] = {}
    if chosen["textual"]:
        assert work.needs.textual is not None
        said = read_descriptions(work.traces, {want.id for want in chosen["textual"]})
        found |= _ask(
            work,
            work.needs.textual,
            {"textual": chosen["textual"]},
            {"textual": lambda encoder, want: read_job(work, encoder, want, said[want.id])},
        )
    heard = {source: chosen[source] for source in ("acoustic", "acoustic_top") if chosen[source]}
    if heard:
        assert work.needs.acoustic is not None
        found |= _ask(
            work,
            work.needs.acoustic,
            heard,
            {
                "acoustic": lambda encoder, want: hear_job(work, encoder, [want]),
                "acoustic_top": lambda encoder, want: answer_job(work, encoder, want),
            },
        )
    return found


def _ask(
    work: Work,
    folder: ModelFolder,
    chosen: Mapping[str, Sequence[Wanted]],
    build: Mapping[str, Callable[[Encoder, Wanted], Job]],
) -> dict[str, Difference]:
    """Loads one teacher, compares what is chosen, and frees it."""
    found = {source: Difference() for source in chosen}
    encoder = Encoder(folder)
    with ExitStack() as stack:
        loaded = stack.enter_context(open_teacher(folder, work.ctx.config.teachers))
        bar = stack.enter_context(progress(sum(map(len, chosen.values())), f"live {folder.name}", "sample"))
        for source, wants in chosen.items():
            for want in wants:
                part, row = work.store.get(want.id, source)
                job = build[source](encoder, want)
                example = job.example if source == "textual" else with_features(work, encoder, job)
                shape = _exact(work, part, loaded.width, len(loaded.layers))
                scribe = Scribe(loaded, shape, "audio" if source == "acoustic" else "response")
                (arrays,) = scribe(encoder.collate([example]))()
                _compare_unit(found[source], part, row, shape, arrays)
                bar.update()
        del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _exact(work: Work, part: PartReader, width: int, layers: int) -> Shape:
    """What the part holds, without rounding and with more entries."""
    config = replace(work.ctx.config.teachers, logprob_dtype="float32", states="float32", tail_blocks=1)
    arrays = part.attributes["arrays"]
    cover: dict[str, Any] = {"hidden": list(part.attributes.get("states", {}).get("layers", []))}
    alignment = None
    if "distributions" in part.attributes:
        alignment = work.needs.alignment
        shared = alignment.valid - len(alignment.masked)
        k = min(shared, 2 * part.layout.kept + _SPARE)
        lens = sorted({int(name.split("/")[1]) for name in arrays if name.startswith("lens/")})
        cover |= {"k": k, "mass": 1.0, "min_k": k, "temperatures": [1.0], "lens": lens}
    return Shape(config, cover, width, layers, alignment, {})


def _compare_unit(
    difference: Difference, part: PartReader, row: int, shape: Shape, arrays: Mapping[str, np.ndarray]
) -> None:
    difference.samples += 1
    difference.tokens += part.tokens(row)
    for prefix in shape.prefixes:
        assert shape.layout is not None
        stored = part.distribution(row, prefix, temperatures=[1.0])
        mine = {name.removeprefix(f"{prefix}/"): a for name, a in arrays.items() if name.startswith(f"{prefix}/")}
        difference.add_distribution(stored, shape.layout.decode(mine))
    for layer in shape.hidden:
        live = decode_states({"states": arrays[f"{hidden_prefix(layer)}/states"]}, "float32").numpy()
        difference.add_states(part.hidden(row, layer), live)
