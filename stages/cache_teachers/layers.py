"""Which teacher layer teaches which student layer. Layers are counted from 1."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.data.errors import ConfigError
from kdpipe.stages.config import Config, LayersConfig


def layer_map(config: LayersConfig, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Student layer to teacher layer, ascending.

    `top` is the last pair; `skip` takes every `every`-th student layer and `all` takes each, both with the
    proportional map `round(i * teacher_layers / student_layers)` of arXiv 2509.18579, halves rounded up (Python's
    `round` would take them to the even neighbour); `map` is what the user wrote.

    Args:
        config: the `layers` section.
        student_layers: depth of the student.
        teacher_layers: depth of the textual teacher.

    Raises:
        ConfigError: a layer does not exist, or no layer is chosen.
    """
    if config.mode == "map":
        return _explicit(config, student_layers, teacher_layers)
    chosen: Sequence[int] = {
        "top": [student_layers],
        "skip": _skipped(config, student_layers),
        "all": range(1, student_layers + 1),
    }[config.mode]
    return {i: max(1, (2 * i * teacher_layers + student_layers) // (2 * student_layers)) for i in chosen}


def acoustic_layers(config: Config, student_layers: int) -> tuple[int, ...]:
    """Layers whose hidden states the acoustic teacher supplies, ascending.

    Raises:
        ConfigError: no layer is chosen.
    """
    if config.teachers.acoustic.layers == "all":
        return tuple(range(1, student_layers + 1))
    return tuple(_skipped(config.layers, student_layers, wanted=True))


def _skipped(config: LayersConfig, student_layers: int, *, wanted: bool = False) -> Sequence[int]:
    chosen = range(config.every, student_layers + 1, config.every)
    if not chosen and (wanted or config.mode == "skip"):
        raise ConfigError(
            [
                f"layers.every: {config.every} chooses no layer of a student with {student_layers}. "
                f"Choose at most {student_layers}."
            ]
        )
    return chosen


def _explicit(config: LayersConfig, student_layers: int, teacher_layers: int) -> dict[int, int]:
    problems = []
    if not config.map:
        problems.append("layers.map: is empty with layers.mode: map. Write pairs such as {28: 36}.")
    for ours, theirs in sorted(config.map.items()):
        if not 1 <= ours <= student_layers:
            problems.append(f"layers.map: the student has no layer {ours}; its layers are 1 to {student_layers}.")
        if not 1 <= theirs <= teacher_layers:
            problems.append(f"layers.map: the teacher has no layer {theirs}; its layers are 1 to {teacher_layers}.")
    if problems:
        raise ConfigError(problems)
    return dict(sorted(config.map.items()))
