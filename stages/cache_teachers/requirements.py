"""What the configuration asks of the teachers, found from configuration and tokenizer files alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kdpipe.data.errors import ConfigError
from kdpipe.data.store.format import is_low_rank
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.layers import acoustic_layers, layer_map
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.vocabulary import Alignment, Vocabulary, align, load_vocabulary


@dataclass(frozen=True)
class Requirements:
    """What must be known of each sample.

    Attributes:
        student: the model to teach; its tokenizer makes the targets.
        textual: the teacher that reads, or None where no term needs it.
        acoustic: the teacher that hears, or None.
        alignment: ids that all distributions are over, the same in all of them.
        k: most entries kept of a distribution, no more than there are shared ids.
        mass: mass that the kept entries reach, where k allows it; 1: k of each are kept.
        min_k: the fewest entries kept; k where the mass is 1.
        temperatures: rising, 1 among them.
        lens: textual-teacher layers whose lens distributions are wanted, without the last: its lens is the top.
        hidden: textual-teacher layers whose states are wanted.
        heard: layers whose states at the audio positions are wanted of the acoustic teacher.
        acoustic_top: whether its distributions over the response are wanted.
        draws: ids to draw from the tail of each distribution, beside k kept entries.
    """

    student: ModelFolder
    textual: ModelFolder | None
    acoustic: ModelFolder | None
    alignment: Alignment
    k: int
    mass: float
    min_k: int
    temperatures: tuple[float, ...]
    lens: tuple[int, ...]
    hidden: tuple[int, ...]
    heard: tuple[int, ...]
    acoustic_top: bool
    draws: int

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources wanted of a sample, in the order they are made."""
        asked = {
            "targets": True,
            "textual": self.textual is not None,
            "acoustic": bool(self.heard),
            "acoustic_top": self.acoustic_top,
        }
        return tuple(source for source, is_asked in asked.items() if is_asked)


def requirements(ctx: Context) -> Requirements:
    """Derives what must be cached from the loss weights, and checks that the models suit each other.

    The acoustic teacher's states are compared with the student's directly, so it must have the student's shape.

    Raises:
        ConfigError: the layer map or the acoustic teacher does not fit the student.
        ModelError: a model cannot be found or read.
        VocabularyError: a teacher's tokenizer disagrees with the student's; names the first differing id.
    """
    config = ctx.config
    weights = config.train.largest_weights
    student = resolve(config.student.model, ctx.base)
    _must_hear(student, "student.model")
    reader = resolve(config.teachers.textual.model, ctx.base)
    textual = acoustic = None
    lens: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    heard: tuple[int, ...] = ()
    if weights.top > 0 or weights.layer > 0:
        textual = reader
    if textual is not None and weights.layer > 0:
        layers = tuple(sorted(set(layer_map(config.layers, student.layers, textual.layers).values())))
        if config.layers.match == "hidden":
            hidden = layers
        else:
            lens = tuple(layer for layer in layers if layer != textual.layers)
    if weights.acoustic > 0 or weights.acoustic_top > 0:
        acoustic = resolve(config.acoustic, ctx.base)
        _must_hear(acoustic, "teachers.acoustic.model")
    if acoustic is not None and weights.acoustic > 0:
        _must_match(acoustic, student)
        heard = acoustic_layers(config, student.layers)
    # The reader's vocabulary counts whether or not this run's weights use it, so that runs with other weights share
    # one cache and one definition of the cross-entropy.
    alignment = _align_all(
        student, [reader, *([acoustic] if acoustic is not None and weights.acoustic_top > 0 else [])]
    )
    rank = config.teachers.rank if is_low_rank(config.teachers.states) else 0
    for one, layers in ((textual, hidden), (acoustic, heard)):
        if one is not None and layers and rank > one.width:
            raise ConfigError([f"teachers.rank: {rank} is more than the width of {one.name}, {one.width}. Lower it."])
    k = min(config.teachers.k, alignment.valid - len(alignment.masked))
    mass = 1.0 if config.teachers.mass is None else config.teachers.mass
    return Requirements(
        student,
        textual,
        acoustic,
        alignment,
        k=k,
        mass=mass,
        min_k=k if mass >= 1 else min(k, config.teachers.min_k),
        temperatures=tuple(sorted({1.0, *map(float, config.teachers.temperatures)})),
        lens=lens,
        hidden=hidden,
        heard=heard,
        acoustic_top=weights.acoustic_top > 0,
        draws=config.teachers.draws,
    )


def _must_hear(folder: ModelFolder, key: str) -> None:
    if not folder.hears:
        raise ConfigError([f"{key}: {folder.name} is a text model and cannot hear. Name an audio language model."])


def _must_match(acoustic: ModelFolder, student: ModelFolder) -> None:
    ours, theirs = (
        f"{folder.family} with {folder.layers} layers of width {folder.width}" for folder in (student, acoustic)
    )
    if ours != theirs:
        raise ConfigError(
            [
                f"teachers.acoustic.model: {acoustic.name} is {theirs}, the student {ours}. Their hidden states "
                "cannot be compared; name a snapshot of the student, or leave it out."
            ]
        )


def _align_all(student: ModelFolder, teachers: list[ModelFolder]) -> Alignment:
    """Ids that the student shares with every teacher."""
    found = [
        align(_vocabulary(student.path, student.name), _vocabulary(t.path, t.name), student.head_rows, t.head_rows)
        for t in teachers
    ]
    valid = min(one.valid for one in found)
    masked = sorted({index for one in found for index in one.masked if index < valid})
    return Alignment(valid, tuple(masked))


@lru_cache(maxsize=8)
def _vocabulary(path: Path, name: str) -> Vocabulary:
    return load_vocabulary(path, name)
