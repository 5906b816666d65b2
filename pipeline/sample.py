"""One sample of the teacher store for people: beside each token of the response, what a teacher expected there.

Dimension key: T response tokens, K kept entries.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import click
import numpy as np

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.format import TARGET_IDS, TOP, lens_prefix
from kdpipe.data.store.reader import PartReader, Store, StoredDistribution
from kdpipe.pipeline.cache import store_folder
from kdpipe.pipeline.terminal import columns_of, fitted, printable, terminal_width, visible
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.vocabulary import load_vocabulary

_TOKEN, _NUMBER, _GAP = 14, 6, "  "
_SOURCES = ("targets", "textual", "acoustic", "acoustic_top")
_DISTRIBUTIONS = ("textual", "acoustic_top")


def show_sample(ctx: Context, sample: str, *, layer: int | None = None, tokens: slice = slice(None)) -> list[str]:
    """A sample's response beside what its teachers say, in lines that fit the terminal.

    Args:
        ctx: the run.
        sample: its id.
        layer: the lens of this layer of the textual teacher; None: the last layers.
        tokens: response positions to show.

    Raises:
        KdpipeError: the store holds no such sample or layer, or its part is damaged.
    """
    store_folder(ctx)
    ledger = ctx.ledger(STAGE.name)
    rows = {source: row for source in _SOURCES if (row := ledger.get(sample, source)) is not None}
    if not rows:
        raise KdpipeError(_unknown(sample, {row.id for row in ledger.rows()}))
    store = Store(ledger.parts, ledger)
    texts = token_texts(ctx)
    lines = [_bold(printable(sample)), *_question(ctx, sample)]
    for source, row in rows.items():
        part, _ = store.get(sample, source)
        line = f"  {source:<13}{row.tokens:>6} tokens   parts/{row.part}, row {row.row}{_beside(part)}"
        lines.append(fitted(line, terminal_width()).rstrip())
    ids = None
    if "targets" in rows:
        part, row = store.get(sample, "targets")
        ids = part.read(row, [TARGET_IDS])[TARGET_IDS].astype(np.int64)
    shown = [source for source in _DISTRIBUTIONS if source in rows and (layer is None or source == "textual")]
    if layer is not None and not shown:
        raise KdpipeError(f"sample {sample!r}: the textual teacher is not stored, and so no lens of layer {layer}")
    for source in shown:
        part, row = store.get(sample, source)
        found = _distribution(part, row, layer)
        if found is None:
            continue
        if ids is None or len(ids) != len(found.ids):
            lines += ["", f"{source}: not of the response that is stored now; run `kdpipe {STAGE.name}`"]
            continue
        lines += ["", _title(part, layer), *_table(found, ids, tokens, texts)]
    return lines


def _unknown(sample: str, known: set[str]) -> str:
    close = difflib.get_close_matches(sample, known, n=1)
    hint = f"Did you mean {printable(close[0])}?" if close else f"{len(known)} samples are stored."
    return f"{sample!a}: no such sample in the teacher store. {hint}"


def _question(ctx: Context, sample: str) -> list[str]:
    try:
        found = next((one for one in ctx.manifest.samples if one.id == sample), None)
    except KdpipeError:
        return []
    if found is None:
        return ["  not in the manifest any more"]
    choices = f"  ({' / '.join(found.choices)})" if found.choices else ""
    width = terminal_width() - 2
    return [f"  {fitted(printable(found.question + choices), width).rstrip()}"]


def _beside(part: PartReader) -> str:
    """What a part holds beside the table: hidden states."""
    about = part.attributes.get("states")
    if about is None:
        return ""
    return f"; states of {len(about['layers'])} layers ({about['codec']})"


def _distribution(part: PartReader, row: int, layer: int | None) -> StoredDistribution | None:
    arrays = part.attributes["arrays"]
    prefix = TOP if layer is None or layer == part.attributes.get("teacher", {}).get("layers") else lens_prefix(layer)
    if f"{prefix}/log_z" in arrays:
        return part.distribution(row, prefix, temperatures=[1.0])
    if layer is None:
        return None
    lens = sorted(int(name.split("/")[1]) for name in arrays if name.startswith("lens/") and name.endswith("/log_z"))
    there = f"there are those of {', '.join(map(str, lens))}" if lens else "there are none"
    raise KdpipeError(f"--layer {layer}: its lens is not stored; {there}. `layers` in the configuration chooses them.")


def _title(part: PartReader, layer: int | None) -> str:
    which = "last layer" if layer is None else f"lens of layer {layer}"
    return f"{_bold(part.source)}, {which}, at temperature 1"


@dataclass(frozen=True)
class Numbers:
    """How a teacher's distribution stands to the target at each position; [T] each.

    Attributes:
        p: probability of the target; where it is not kept, the most it can be.
        is_kept: whether it is.
        rank: of the target among the kept ids, from 0; K where it is not kept.
        tail: probability of all ids that are not kept.
        entropy: of the kept ids and the tail blocks (nats), a lower bound of the teacher's.
    """

    p: np.ndarray
    is_kept: np.ndarray
    rank: np.ndarray
    tail: np.ndarray
    entropy: np.ndarray

    @staticmethod
    def of(found: StoredDistribution, ids: np.ndarray) -> Numbers:
        log_p_TK, log_tail_TB = found.logprob.astype(np.float64), found.log_tail[:, 0].astype(np.float64)
        hit_TK = found.ids == ids[:, None]
        is_kept = hit_TK.any(1)
        rank = np.where(is_kept, hit_TK.argmax(1), found.ids.shape[1])
        least = np.exp(np.where(np.isfinite(log_p_TK), log_p_TK, np.inf).min(1))
        tail = np.exp(log_tail_TB).sum(1)
        p = np.where(is_kept, np.exp(np.where(hit_TK, log_p_TK, -np.inf).max(1)), np.minimum(least, tail))
        outcomes = np.concatenate([log_p_TK, log_tail_TB], 1)
        outcomes = np.where(np.isfinite(outcomes), outcomes, 0.0)  # 0 log 0 is 0, and so is 1 log 1
        terms = np.exp(outcomes) * outcomes
        return Numbers(p, is_kept, rank, tail, np.maximum(0.0, -terms.sum(1)))


def _table(found: StoredDistribution, ids: np.ndarray, tokens: slice, texts: Mapping[int, str]) -> list[str]:
    numbers = Numbers.of(found, ids)
    places = range(len(ids))[tokens]
    digits = max(2, len(str(len(ids))))
    width = terminal_width()
    token = min(_TOKEN, max([6, *(columns_of(_text(texts, int(ids[t]))) for t in places)]))
    head = f"{'t':>{digits}}{_GAP}{fitted('target', token)}{_GAP}{'p':>{_NUMBER}}{'tail':>{_NUMBER + 1}}{'nats':>6}"
    if not len(places):
        return [f"{_GAP}no tokens in this range; there are {len(ids)}"]
    cells = [_cells(found, t, texts) for t in places]
    widths = _widths(cells, terminal_width() - columns_of(head) - len(_GAP))
    title = f"{head}{_GAP}{'what the teacher expected' if sum(widths) > 24 else ''}"
    lines = [click.style(title.rstrip(), dim=True)]
    for t, row in zip(places, cells, strict=True):
        p = _probability(numbers.p[t], at_most=not numbers.is_kept[t])
        line = f"{t:>{digits}}{_GAP}{fitted(_text(texts, int(ids[t])), token)}{_GAP}{p:>{_NUMBER}}"
        line += f"{_probability(numbers.tail[t]):>{_NUMBER + 1}}{numbers.entropy[t]:>6.2f}{_GAP}"
        for place, ((text, number), width) in enumerate(zip(row, widths, strict=False)):
            text = fitted(text, width - _NUMBER - len(_GAP))
            is_target = place == numbers.rank[t]
            line += click.style(text, fg="green", bold=True) if is_target else text
            line += f" {click.style(number, dim=True)}{_GAP}"
        lines.append(line.rstrip())
    chosen = np.array(places, np.int64)
    likeliest, kept = (numbers.rank[chosen] == 0).mean(), numbers.is_kept[chosen].mean()
    bound = "" if kept == 1 else "at most "
    lines += textwrap.wrap(
        f"target likeliest at {likeliest:.0%}, kept at {kept:.0%} of {len(chosen)} tokens; in the mean p {bound}"
        f"{numbers.p[chosen].mean():.3f}, tail {numbers.tail[chosen].mean():.3f}, entropy at least "
        f"{numbers.entropy[chosen].mean():.2f} nats",
        terminal_width(),
        initial_indent=_GAP,
        subsequent_indent=_GAP,
    )
    return lines


def _cells(found: StoredDistribution, t: int, texts: Mapping[int, str]) -> list[tuple[str, str]]:
    """The likeliest ids of a position: text and probability."""
    pairs = zip(found.ids[t].tolist(), np.exp(found.logprob[t]).tolist(), strict=True)
    return [(_text(texts, index), _probability(p)) for index, p in pairs if index >= 0]


def _widths(cells: Sequence[Sequence[tuple[str, str]]], room: int) -> list[int]:
    """Columns of each place among the likeliest ids, probability and gap included, as many as there is room for."""
    widths: list[int] = []
    for place in range(max(map(len, cells), default=0)):
        texts = [row[place][0] for row in cells if place < len(row)]
        width = min(_TOKEN, max(map(columns_of, texts))) + _NUMBER + len(_GAP)
        if sum(widths) + width - len(_GAP) > room:
            break
        widths.append(width)
    return widths


def _probability(p: float, *, at_most: bool = False) -> str:
    """Five characters: `0.873`, `3e-05`; one more, `<`, for a bound."""
    text = f"{p:.3f}" if p >= 0.0005 or p == 0 else f"{max(p, 1e-99):.0e}"
    return f"<{text}" if at_most else text


def _text(texts: Mapping[int, str], index: int) -> str:
    return texts.get(index) or f"[{index}]"


def _bold(text: str) -> str:
    return click.style(text, bold=True)


def token_texts(ctx: Context, shown: Callable[[str], str] = visible) -> dict[int, str]:
    """What the student's tokens say, made visible by `shown`; empty where the tokenizer cannot be read."""
    try:
        folder = resolve(ctx.config.student.model, ctx.base)
        vocabulary = load_vocabulary(folder.path, folder.name)
    except KdpipeError:
        return {}
    return {
        index: shown(token) if index in vocabulary.special else _decoded(token, shown)
        for index, token in vocabulary.tokens.items()
    }


def _decoded(token: str, shown: Callable[[str], str]) -> str:
    """A token of a byte-level vocabulary as text; bytes that are no text by themselves are escaped."""
    bytes_of = _byte_alphabet()
    if not all(char in bytes_of for char in token):
        return shown(token.replace("▁", " "))
    raw = bytes(bytes_of[char] for char in token)
    try:
        return shown(raw.decode())
    except UnicodeDecodeError:
        return shown(raw.decode("utf-8", "backslashreplace"))


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte by the character that stands for it in byte-level vocabularies (those of GPT-2, and so of Qwen)."""
    plain: Sequence[Any] = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
