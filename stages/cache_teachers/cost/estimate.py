"""What the stage will cost before it is started: bytes by source, and time.

Only what is to do counts. Numbers of tokens are exact where targets or units of the same clips were made before, are
estimated from at most `lengths.MOST_SAMPLES` samples where texts and clips are there, and are an upper bound where the
traces are still to be written. Entries of a distribution with a mass are those of parts that are there, or else k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdpipe.stages.base import Context, StagePlan, Wanted, covers
from kdpipe.stages.cache_teachers.cost.contents import Basis, least, part_shape, teacher_of
from kdpipe.stages.cache_teachers.cost.lengths import (
    Lengths,
    audio_lengths,
    evenly,
    known_targets,
    response_lengths,
    text_prompt_tokens,
)
from kdpipe.stages.cache_teachers.cost.sizes import cut, ledger_bytes, part_bytes, unit_entry
from kdpipe.stages.cache_teachers.cost.speed import Duration, Work, duration
from kdpipe.stages.cache_teachers.requirements import Requirements
from kdpipe.stages.cache_teachers.shape import WINDOW_PARTS, together

_LEDGER_WANTS = 2048
"""Wants of which a table is written into memory, to learn what a row of the ledger weighs."""
_WINDOW_POSITIONS = 1500
"""Positions of Qwen2-Audio's tower for a clip, whatever its length."""


@dataclass(frozen=True)
class Line:
    """What one kind of data will take.

    Attributes:
        name: what it is, such as `textual: lens, 3 layers`.
        units: units to make: samples, or clips with the prompt before them; 0 where that means nothing.
        tokens: of all of them; 0 where that means nothing.
        bytes: on disk.
        basis: how well that is known.
    """

    name: str
    units: int
    tokens: int
    bytes: int
    basis: Basis


@dataclass(frozen=True)
class Estimate:
    """What a stage will cost.

    Attributes:
        lines: what it will store, in the order it is made.
        times: how long each teacher takes, by source.
        notes: what the numbers are taken from.
    """

    lines: tuple[Line, ...]
    times: Mapping[str, Duration]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(line.bytes for line in self.lines)

    @property
    def firm_bytes(self) -> int:
        """Of all lines that are not upper bounds."""
        return sum(line.bytes for line in self.lines if line.basis != "at most")

    @property
    def basis(self) -> Basis:
        """How well the sum is known."""
        return least(line.basis for line in self.lines)


@dataclass(frozen=True)
class _Group:
    """Units of one source that are stored alike, in the order of the plan.

    Attributes:
        source: whose units these are.
        wants: one a unit.
        cover: what is stored of each.
        sharing: samples that share a unit, on average.
    """

    source: str
    wants: Sequence[Wanted]
    cover: Mapping[str, Any]
    sharing: float


def estimate(ctx: Context, plan: StagePlan, needs: Requirements, *, time: bool = True) -> Estimate:
    """What is left to do will cost.

    Args:
        ctx: the run.
        plan: of the stage; only its `todo` counts.
        needs: what the configuration asks of the teachers.
        time: whether to say how long, too. Where a teacher has not run on this device before, PyTorch is imported and
            multiplies matrices for half a second.

    Raises:
        ModelError: a tokenizer cannot be read.
    """
    return _Estimator(ctx, plan, needs).run(time=time)


class _Estimator:
    def __init__(self, ctx: Context, plan: StagePlan, needs: Requirements):
        self._ctx = ctx
        self._plan = plan
        self._needs = needs
        self._ledger = plan.ledger
        self._targets = {want.id: want for want in plan.wanted if want.source == "targets"}
        self._places = {sample.id: place for place, sample in enumerate(ctx.samples(ctx.config.data.train_split))}
        self._lines: dict[str, Line] = {}
        self._notes: dict[str, None] = {}

    def run(self, *, time: bool) -> Estimate:
        rows = 0
        times: dict[str, Duration] = {}
        for source in self._needs.sources:
            wants = self._to_make(source)
            if not wants:
                continue
            work = [self._store(group) for group in self._groups(source, wants)]
            rows += len(wants)
            if time and source != "targets":
                whole = self._with_prompts(source, sum(w.tokens for w in work), sum(w.head_rows for w in work), wants)
                times[source] = duration(self._ctx, source, teacher_of(self._needs, source), whole)
        if rows:
            size = ledger_bytes(evenly(self._plan.todo, _LEDGER_WANTS), rows)
            self._add(Line("ledger", 0, 0, size, "estimated"))
        return Estimate(tuple(self._lines.values()), times, tuple(self._notes))

    def _add(self, line: Line) -> None:
        """Takes a line, into one with the one of the same name if there is one."""
        had = self._lines.get(line.name)
        if had is not None:
            basis = least((had.basis, line.basis))
            sums = (had.units + line.units, had.tokens + line.tokens, had.bytes + line.bytes)
            line = Line(line.name, *sums, basis)
        self._lines[line.name] = line

    def _to_make(self, source: str) -> list[Wanted]:
        """Wants whose units are to be made; clips that other samples have stored already cost nothing."""
        todo = [want for want in self._plan.todo if want.source == source]
        if source != "acoustic":
            return todo
        lost = self._ledger.lost_parts()
        stored = {row.key: row for row in self._ledger.rows() if row.source == source and row.part not in lost}
        return [want for want in todo if not (want.key in stored and covers(stored[want.key].cover, want.cover))]

    def _groups(self, source: str, wants: Sequence[Wanted]) -> list[_Group]:
        """Units by what is stored of them: what is asked for, and what the rows to be replaced hold."""
        units: dict[str, list[Wanted]] = {}
        for want in wants:
            units.setdefault(want.key if source == "acoustic" else want.id, []).append(want)
        groups: dict[str, tuple[Mapping[str, Any], list[list[Wanted]]]] = {}
        for sharing in units.values():
            rows = [self._ledger.get(want.id, source) for want in sharing]
            held = [row.cover for row in rows if row is not None and row.key == sharing[0].key]
            cover = together([*held, *(want.cover for want in sharing)])
            groups.setdefault(repr(sorted(cover.items())), (cover, []))[1].append(sharing)
        return [
            _Group(source, [sharing[0] for sharing in made], cover, sum(map(len, made)) / len(made))
            for cover, made in groups.values()
        ]

    def _store(self, group: _Group) -> Work:
        """Adds the lines of one group, and says what its teacher has to do, prompts not included."""
        source, config, cover = group.source, self._ctx.config.teachers, group.cover
        lengths = self._measure(group)
        mean = round(lengths.total / len(lengths.tokens))
        unit = unit_entry(source, group.wants[0], tokens=mean, sharing=group.sharing)
        shape, entries, note = part_shape(self._ctx, self._needs, self._ledger, source, cover, unit)
        if note is not None:
            self._notes[note] = None
        windows = None
        if source != "targets":
            window = WINDOW_PARTS * config.part_samples
            windows = np.array([self._places[want.id] // window for want in group.wants], np.int64)
        sizes = part_bytes(shape, *cut(lengths.tokens, config.part_samples, windows))
        lens, hidden = cover.get("lens", []), cover.get("hidden", [])
        names = {"targets": "targets", "textual": "textual: top", "acoustic_top": "acoustic: top"}
        of_states = f"{source}: {_layers(hidden)}, {config.states}"
        weights: dict[str, int] = {names.get(source, of_states): 0}
        for name, size in sizes.items():
            place = names.get(source, of_states)
            if name.startswith("lens/"):
                place = f"textual: lens, {_layers(lens)}"
            elif name.startswith("hidden/"):
                place = of_states
            weights[place] = weights.get(place, 0) + size
        known = self._basis(lengths)
        for name, size in weights.items():
            basis = known if name in (of_states, "targets") else least((known, entries))
            self._add(Line(name, len(group.wants), lengths.total, size, basis))
        return Work(lengths.total, lengths.total * (1 + len(lens)) if cover.get("k") else 0)

    def _measure(self, group: _Group) -> Lengths:
        """Tokens of the units of a group."""
        if group.source == "acoustic":
            lengths = audio_lengths(self._ctx, self._ledger, teacher_of(self._needs, group.source), group.wants)
            unit = "clips"
        else:
            student = self._needs.student
            lengths = response_lengths(self._ctx, self._ledger, student, group.wants, self._targets)
            unit = "responses"
        estimated = len(lengths.tokens) - lengths.known - lengths.bounded
        if estimated:
            self._notes[f"{unit}: length of {estimated:,} estimated from {lengths.sampled:,} of them"] = None
        if lengths.bounded:
            limit = f"textualize.trace.max_tokens = {self._ctx.config.textualize.trace.max_tokens:,}"
            self._notes[f"{unit}: {lengths.bounded:,} are still to be written, at most {limit} each"] = None
        return lengths

    def _basis(self, lengths: Lengths) -> Basis:
        if lengths.bounded:
            return "at most"
        return "exact" if lengths.known == len(lengths.tokens) else "estimated"

    def _with_prompts(self, source: str, tokens: float, head_rows: float, wants: Sequence[Wanted]) -> Work:
        """All that a teacher has to do: prompts before responses, the system message and the tower before audio."""
        ctx, student, folder = self._ctx, self._ctx.config.student, teacher_of(self._needs, source)
        if source == "textual":
            asks = ctx.config.teachers.textual
            each = text_prompt_tokens(ctx, folder, wants, asks.prompt, asks.system)
            return Work(tokens + each * len(wants), head_rows)
        some, units = evenly(wants), len({want.key for want in wants}) if source == "acoustic" else len(wants)
        heard = audio_lengths(ctx, self._ledger, folder, some).total / len(some) * units
        clips = sum(len(ctx.manifest.by_id[want.id].audio) for want in some) / len(some) * units
        tower = _WINDOW_POSITIONS * clips if folder.family == "qwen2_audio" else 2 * heard
        if source == "acoustic":
            return Work(tokens + text_prompt_tokens(ctx, folder, wants[:1], "", student.system) * units, 0, tower)
        rows = [known_targets(self._ledger, self._targets, want.id) for want in wants]
        lengths = [row.length for row in rows if row is not None]
        if len(lengths) == len(wants):
            return Work(sum(lengths), head_rows, tower)
        text = text_prompt_tokens(ctx, folder, wants, student.prompt, student.system)
        return Work(tokens + heard + text * units, head_rows, tower)


def _layers(layers: Sequence[int]) -> str:
    return f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"
