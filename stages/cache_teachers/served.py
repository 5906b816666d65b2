"""A textual teacher that vLLM runs: its distributions from `prompt_logprobs`, under the contract of `head`.

Dimension key: T response positions of a sample, N entries that vLLM returns of a position, K kept entries.

vLLM returns the N likeliest of all ids and their log-probabilities q over *all* rows of the output head. With U the
returned ids that are shared, kept the K likeliest of U:

    rest = 1 - sum_returned q                                mass of what was not returned, in float64
    rest = min(rest, shared ids not returned * least returned q), at least 0
    tail = sum_(U without kept) q + rest
    logprob = log q - log(sum_kept q + tail),    log_tail = log tail - log(sum_kept q + tail)

So masked ids that were returned are taken out on both sides, and what is left is normalized again. Masked ids that were
not returned stay in the tail: each has less than the least returned entry. Output heads are padded with rows that are
all alike, so that where one masked id is likely, many can be: a sample is asked again, with room for every masked id
there is, where a position shows one and those it does not show could have more than 1% of what is left.

Accuracy: vLLM takes the log-softmax in float32. All log-probabilities of a position share the error of its normalizer,
and a tail, as a difference from 1, has that error as its absolute floor: up to 1e-4 of mass over 152,000 rows with
PyTorch on a CPU, mostly too little, since small terms vanish in a sum near 1. Where masked ids take nearly all mass,
the floor is divided by what they leave. `head` sums what is left and knows its tails to a relative 1e-4. More than K
shared entries are returned wherever there are more, so that a tail is never below its own likeliest id, and -inf only
where K covers all shared ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.stages.config import EngineConfig, TeachersConfig
from kdpipe.stages.models.engine import Engine, open_engine
from kdpipe.stages.models.flight import ENGINE_DIED
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Example
from kdpipe.stages.models.launch import Scoring
from kdpipe.stages.models.vocabulary import Alignment

_SPARE = 16
"""Entries asked beyond K + 1 at first, in the place of masked ids."""
_LOG_DOUBT = math.log(0.01)
"""Share of a position's mass that unseen masked ids may have at most, where others of them are seen."""
_MEMORY = (
    "teachers.serve.max_num_seqs, teachers.head_chunk, teachers.max_length or teachers.serve.gpu_memory_utilization "
    "(CPU: teachers.serve.cpu_kv_cache_gib)"
)


@contextlib.contextmanager
def serve(
    folder: ModelFolder, config: TeachersConfig, alignment: Alignment, k: int, say: Callable[[str], None] = print
) -> Iterator[ServedTeacher]:
    """Starts vLLM for a textual teacher, and ends it with the block.

    `teachers.head_chunk` bounds the positions of one step, and so the logits that are held at once.

    Args:
        folder: the teacher.
        config: the `teachers` section: `serve` says how vLLM is started, `max_length` how long a sample can be.
        alignment: ids to normalize over.
        k: entries to keep; more than there are shared ids means all of them.
        say: prints one line for the user when an engine that died is started again.

    Raises:
        ModelError: the tokenizer cannot be used.
        KdpipeError: vLLM does not start.
    """
    keep = Keep.of(folder.head_rows, alignment, k)
    # One token more than a sample has: vLLM does not end a request without one.
    launch = EngineConfig(**dataclasses.asdict(config.serve), max_model_len=config.max_length + 1)
    scoring = Scoring(entries=keep.most, batch_tokens=config.head_chunk)
    with open_engine(folder, launch, clips=0, seed=0, scoring=scoring, memory=_MEMORY, say=say) as engine:
        yield ServedTeacher(engine, keep)


@dataclass(frozen=True)
class Keep:
    """What is asked of a position.

    Attributes:
        k: entries K to keep, no more than there are shared ids.
        is_shared: bool [rows of the output head], False for masked ids.
        shared: number of shared ids.
        masked: number of the others.
        first: entries asked at first.
        most: entries that have room for every masked id beside `first` shared ones.
    """

    k: int
    is_shared: np.ndarray
    shared: int
    masked: int
    first: int
    most: int

    @staticmethod
    def of(rows: int, alignment: Alignment, k: int) -> Keep:
        is_shared = np.arange(rows) < alignment.valid
        is_shared[list(alignment.masked)] = False
        shared = int(is_shared.sum())
        k = min(k, shared)
        first = rows if k == shared else min(rows, k + 1 + _SPARE)
        return Keep(k, is_shared, shared, rows - shared, first, most=min(rows, first + rows - shared))


@dataclass
class _Asked:
    """An example on its way, the entries last asked of each of its positions, and what it gave once that is known."""

    example: Example
    entries: int
    arrays: dict[str, np.ndarray] | Rejected | None = None


class ServedTeacher:
    """A teacher that vLLM runs; made by `serve`. Used by one thread."""

    def __init__(self, engine: Engine, keep: Keep):
        self.engine = engine
        self.keep = keep

    def __call__(
        self, examples: Iterable[Example]
    ) -> Generator[tuple[Example, dict[str, np.ndarray] | Rejected], None, None]:
        """Scores the responses of examples, many at once, and gives them back in their order.

        Examples are taken from `examples` as there is room: at most `Engine.capacity` of them, twice
        `serve.max_num_seqs`, are in the engine or wait for an earlier one. The same ids may get log-probabilities that
        differ in their last digits when they are batched with other samples.

        Args:
            examples: text only, with at least one prompt token each, at most `teachers.max_length` tokens long.

        Yields:
            Each example, and for its T targets: `ids` int64 [T, K], likeliest first; `logprob` float32 [T, K] (nats);
            `log_z` float32 [T, 1]; `log_tail` float32 [T, 1, 1], -inf where K covers all shared ids. Row t predicts
            `target_ids[t]`. The one temperature is 1. vLLM keeps logits and normalizers to itself, and only
            differences of `log_z` between temperatures are ever used: here it is 0. In their place stands a `Rejected`
            for an example that the engine dies of (`engine_died`).

        Raises:
            KdpipeError: the engine died too often, refused a sample, or gave NaN; the latter two name the sample.
        """
        waiting: deque[_Asked] = deque()
        running: dict[str, _Asked] = {}
        source = iter(examples)
        left = True
        try:
            while True:
                while left and len(waiting) < self.engine.capacity:
                    example = next(source, None)
                    if example is None:
                        left = False
                        break
                    waiting.append(self._begin(example, running))
                if waiting and waiting[0].arrays is not None:
                    asked = waiting.popleft()
                    assert asked.arrays is not None
                    yield asked.example, asked.arrays
                elif waiting:
                    self._advance(running)
                else:
                    return
        finally:
            self.engine.forget(running)

    def _begin(self, example: Example, running: dict[str, _Asked]) -> _Asked:
        assert len(example.prompt_ids) and not example.features
        asked = _Asked(example, self.keep.first)
        if len(example.target_ids):
            self._ask(asked, running)
        else:
            nothing = np.empty((0, self.keep.first))
            asked.arrays = distil(nothing.astype(np.int64), nothing, self.keep)
        return asked

    def _ask(self, asked: _Asked, running: dict[str, _Asked]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=asked.entries,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = np.concatenate([asked.example.prompt_ids, asked.example.target_ids]).tolist()
        running[self.engine.ask({"prompt_token_ids": ids}, params)] = asked

    def _advance(self, running: dict[str, _Asked]) -> None:
        """Waits for the engine's next step, and reads what it finished."""
        for name, output in self.engine.finished():
            asked = running.pop(name, None)
            if asked is None:
                continue
            if isinstance(output, Rejected):
                if output.reason != ENGINE_DIED:
                    raise self._error(asked.example, output.detail)
                asked.arrays = output
                continue
            ids_TN, logq_TN = _returned(output.prompt_logprobs, asked)
            if not np.isfinite(logq_TN[:, 0]).all() or np.isnan(logq_TN).any():
                raise self._error(
                    asked.example,
                    "the teacher's logits hold NaN or infinity. Run it in a wider dtype (`dtype: float32`).",
                )
            asked.arrays = distil(ids_TN, logq_TN, self.keep)
            if asked.arrays is None:
                asked.entries = self.keep.most
                self._ask(asked, running)

    def _error(self, example: Example, text: str) -> KdpipeError:
        return KdpipeError(f"{self.engine.encoder.folder.name}, sample {example.id}: {text}")


def _returned(flat: Any, asked: _Asked) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [T, N] and log-probabilities float64 [T, N] of the response's positions, likeliest first.

    Args:
        flat: vLLM's `FlatLogprobs` of the whole sequence: nothing for its first token, and for each further one that
            token itself, then the likeliest.
        asked: whose they are.
    """
    start = flat.start_indices[len(asked.example.prompt_ids)]
    shape = (len(asked.example.target_ids), asked.entries + 1)
    ids_TN = np.array(flat.token_ids[start:], dtype=np.int64).reshape(shape)
    logq_TN = np.array(flat.logprobs[start:], dtype=np.float64).reshape(shape)
    return ids_TN[:, 1:], logq_TN[:, 1:]


def distil(ids_TN: np.ndarray, logq_TN: np.ndarray, keep: Keep) -> dict[str, np.ndarray] | None:
    """Kept entries and tail over the shared ids, from the likeliest of all ids; see the module's equations.

    Args:
        ids_TN: int64, likeliest first.
        logq_TN: float64, over all rows of the output head (nats).
        keep: what to keep of it.

    Returns:
        What `ServedTeacher` yields; None where a position has too few shared ids among its entries, or too much may
        be masked of what it does not show.
    """
    k, entries = keep.k, ids_TN.shape[1]
    shared_TN = keep.is_shared[ids_TN]
    count_T = shared_TN.sum(1)
    if (count_T < min(k + 1, keep.shared)).any():
        return None
    # The largest by `expm1`, so that nothing is lost of a teacher that is sure.
    rest_T = -np.expm1(logq_TN[:, 0]) - np.exp(logq_TN[:, 1:]).sum(1)
    with np.errstate(divide="ignore"):
        most_T = np.log(keep.shared - count_T) + logq_TN[:, -1]
        log_rest_T = np.minimum(np.log(np.maximum(rest_T, 0.0)), most_T)
        unseen_T = np.log(keep.masked - entries + count_T) + logq_TN[:, -1]
    order_TN = np.argsort(~shared_TN, axis=1, kind="stable")
    logq_TN = np.where(shared_TN, logq_TN, -np.inf)
    logq_TN = np.take_along_axis(logq_TN, order_TN, axis=1)
    kept_TK = logq_TN[:, :k]
    log_tail_T = np.logaddexp(np.logaddexp.reduce(logq_TN[:, k:], axis=1), log_rest_T)
    total_T = np.logaddexp(np.logaddexp.reduce(kept_TK, axis=1), log_tail_T)
    if entries < keep.most and ((count_T < entries) & (unseen_T > total_T + _LOG_DOUBT)).any():
        return None
    return {
        "ids": np.take_along_axis(ids_TN, order_TN, axis=1)[:, :k],
        "logprob": (kept_TK - total_T[:, None]).astype(np.float32),
        "log_z": np.zeros((len(ids_TN), 1), np.float32),
        "log_tail": (log_tail_T - total_T).astype(np.float32)[:, None, None],
    }
