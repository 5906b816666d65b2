"""Where the textual teacher disagrees with what the student is taught, token by token, from the teacher store.

Dimension key: T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.format import TARGET_IDS, TOP
from kdpipe.data.store.open import TeacherStore
from kdpipe.data.store.reader import StoredDistribution
from kdpipe.pipeline.report.reading import NotThere, samples_by_id
from kdpipe.pipeline.report.values import visible
from kdpipe.pipeline.sample import Numbers, token_texts
from kdpipe.stages.base import Context

LOOKED_AT = 48
"""Samples of the store that are looked at, spread evenly over the sorted ids."""
_LOWEST, _MOST_TOKENS, _WORST, _CANDIDATES = 3, 500, 5, 4
LEVELS = ((0.5, "0.5 or more"), (0.1, "0.1 to 0.5"), (0.01, "0.01 to 0.1"), (0.0, "below 0.01"))
"""Least probability of each shade, with the words for it."""


@dataclass(frozen=True)
class Token:
    """One token of a response.

    Attributes:
        text: what it says, visibly.
        level: its shade, from 0 (the teacher agrees) to 3.
        told: what the teacher says there.
        breaks: whether a line ends after it.
    """

    text: str
    level: int
    told: str
    breaks: bool


@dataclass(frozen=True)
class Parting:
    """A place where the teacher gave the target little: the token's place, text and probability, and what it
    expected instead."""

    place: int
    text: str
    p: str
    expected: str


@dataclass(frozen=True)
class TaughtSample:
    """A training sample as its teacher sees it.

    Attributes:
        id, question: of the sample; the question is empty where the manifest does not have it.
        tokens: of the response, the first 500.
        length: how many there are.
        mean: log-probability of the targets, in the mean over tokens (nats), as a text.
        likeliest: share of the tokens at which the target is the teacher's likeliest.
        worst: where the teacher gave the target least.
        is_usual: whether it was chosen as the median, and not as one of the lowest.
    """

    id: str
    question: str
    tokens: Sequence[Token]
    length: int
    mean: str
    likeliest: float
    worst: Sequence[Parting]
    is_usual: bool


@dataclass(frozen=True)
class Taught:
    """The samples shown, of how many looked at and stored, and what could not be read."""

    samples: Sequence[TaughtSample]
    looked_at: int
    stored: int
    problems: Sequence[str]


@dataclass(frozen=True, eq=False)
class _Looked:
    id: str
    ids: np.ndarray
    found: StoredDistribution
    numbers: Numbers
    mean: float


def taught(ctx: Context) -> Taught:
    """Looks at some samples of the store; gives those whose teacher disagrees the most, and the median one.

    Raises:
        NotThere: no teacher is cached, or not the textual one.
        StoreError: the store's ledger is damaged.
    """
    folder = ctx.folder("cache-teachers")
    if not (folder / "HEAD").is_file():
        raise NotThere("cache-teachers has not run; `kdpipe cache-teachers` runs it.")
    store = TeacherStore(folder)
    known = sorted(name for name in store if {"targets", "textual"} <= set(store[name].sources))
    if not known:
        raise NotThere(
            "The store holds no distributions of the textual teacher, since the weights of this configuration "
            "(train.weights) ask for none."
        )
    places = np.unique(np.linspace(0, len(known) - 1, min(LOOKED_AT, len(known))).round().astype(int))
    looked, problems = [], []
    for place in places:
        try:
            looked.append(_look(store, known[place]))
        except (KdpipeError, OSError) as error:
            problems.append(str(error))
    looked.sort(key=lambda one: (one.mean, one.id))
    different = list({one.ids.tobytes(): one for one in reversed(looked)}.values())[::-1]
    chosen = different[:_LOWEST]
    usual = different[len(different) // 2] if len(different) > _LOWEST else None
    if usual is not None and usual not in chosen:
        chosen.append(usual)
    texts = token_texts(ctx, lambda text: text)
    samples, _ = samples_by_id(ctx)
    shown = []
    for one in chosen:
        sample = samples.get(one.id)
        shown.append(_shown(one, texts, "" if sample is None else sample.question, one is usual))
    return Taught(shown, len(places), len(known), problems)


def _look(store: TeacherStore, name: str) -> _Looked:
    part, row = store.reader.get(name, "targets")
    ids = part.read(row, [TARGET_IDS])[TARGET_IDS].astype(np.int64)
    part, row = store.reader.get(name, "textual")
    found = part.distribution(row, TOP, temperatures=[1.0])
    if len(found.ids) != len(ids) or not len(ids):
        raise KdpipeError(
            f"sample {name!a}: what the textual teacher says is not of the response that is stored now. "
            "Run `kdpipe cache-teachers`."
        )
    numbers = Numbers.of(found, ids)
    return _Looked(name, ids, found, numbers, float(np.log(np.maximum(numbers.p, 1e-30)).mean()))


def _shown(one: _Looked, texts: Mapping[int, str], question: str, is_usual: bool) -> TaughtSample:
    ids, numbers = one.ids, one.numbers
    told = [_token(one, t, texts) for t in range(min(len(ids), _MOST_TOKENS))]
    worst = [
        Parting(t, _visible(_text(texts, int(ids[t]))), _probability(one, t), _expected(one, t, texts))
        for t in sorted(np.argsort(numbers.p, kind="stable")[:_WORST].tolist())
        if numbers.rank[t] != 0
    ]
    likeliest = float((numbers.rank == 0).mean())
    mean = f"{one.mean:.2f}".replace("-", "−")
    return TaughtSample(one.id, question, told, len(ids), mean, likeliest, worst, is_usual)


def _token(one: _Looked, t: int, texts: Mapping[int, str]) -> Token:
    text = _text(texts, int(one.ids[t]))
    p = float(one.numbers.p[t])
    level = next((place for place, (least, _) in enumerate(LEVELS) if p >= least), len(LEVELS) - 1)
    told = f"probability {_probability(one, t)}; expected: {_expected(one, t, texts)}"
    return Token(_visible(text, spaces=False), level, told, "\n" in text)


def _expected(one: _Looked, t: int, texts: Mapping[int, str]) -> str:
    pairs = list(zip(one.found.ids[t].tolist(), np.exp(one.found.logprob[t]).tolist(), strict=True))
    named = [
        f"{_visible(_text(texts, index))} {p:.3f}" for index, p in pairs[:_CANDIDATES] if index >= 0 and p >= 0.0005
    ]
    return " · ".join(named)


def _probability(one: _Looked, t: int) -> str:
    p = float(one.numbers.p[t])
    text = f"{p:.3f}" if p >= 0.0005 or p == 0 else f"{p:.0e}"
    return text if one.numbers.is_kept[t] else f"at most {text}"


def _text(texts: Mapping[int, str], index: int) -> str:
    return texts.get(index) or f"[{index}]"


def _visible(text: str, *, spaces: bool = True) -> str:
    """Line ends and tabs as signs, all else that does not print escaped; with `spaces`, these as `␣`."""
    shown = visible(text.replace("\n", "⏎").replace("\t", "⇥").replace("\u00a0", "⍽"))
    return shown.replace(" ", "␣") if spaces else shown
