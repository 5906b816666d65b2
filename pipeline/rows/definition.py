"""What each row of the table is: which terms of the loss are on, and which layers.

Source: Yang et al., arXiv 2509.18579, table 1, whose six rows these are, with a seventh. A row says what is on; how
much it weighs stands in the configuration (`train.weights`, and for the seventh row `train.task_weights`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.data.errors import ConfigError
from kdpipe.stages.config import Config
from kdpipe.stages.config_train import WeightsConfig

TERMS = tuple(field.name for field in dataclasses.fields(WeightsConfig))
_MODES = ("top", "skip", "all")  # from few layers to many


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: as in `--rows`, and the name of its folder.
        title: as in the table.
        terms: terms of the loss that are on; without any the student is left as it is.
        mode: `layers.mode`.
        by_task: whether `train.task_weights` counts.
    """

    name: str
    title: str
    terms: tuple[str, ...] = ()
    mode: str = "top"
    by_task: bool = False

    @property
    def trains(self) -> bool:
        """Whether there is a student to train, one for each seed."""
        return bool(self.terms)


_ROWS = (
    Row("base", "Base"),
    Row("sft", "SFT only", ("sft",)),
    Row("top", "Top textual + SFT", ("top", "sft")),
    Row("skip", "Skip-layer + SFT", ("top", "layer", "sft"), "skip"),
    Row("all", "All layers + SFT", ("top", "layer", "sft"), "all"),
    Row("acoustic", "All layers + acoustic + SFT", ("top", "layer", "acoustic", "sft"), "all"),
    Row("ours", "All layers + acoustic + weights by task", TERMS, "all", by_task=True),
)
NO_TASK_WEIGHTS = (
    "needs train.task_weights, other weights for the samples of some tasks (docs/training.md, Weights by task); set "
    "them, as in `kdpipe init --recipe ours`"
)

ROWS: Mapping[str, Row] = {row.name: row for row in _ROWS}
"""By name, in the order of the table."""


def choose(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in the order of the table.

    Raises:
        ConfigError: a name that is none, or none at all.
    """
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names:
        given = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError([f"--rows: {given} is no row; there are {', '.join(ROWS)}"])
    return [row for row in ROWS.values() if row.name in names]


def refuse_missing_weights(config: Config, rows: Iterable[Row]) -> None:
    """Refuses rows whose terms have no weight in the configuration.

    Raises:
        ConfigError: says which, of all rows at once.
    """
    problems = []
    for row in rows:
        if row.by_task and not config.train.task_weights:
            problems.append(f"row {row.name}: {NO_TASK_WEIGHTS}, or leave the row out with --rows")
            continue
        sizes = dataclasses.asdict(config.train.weights)
        needed = set(row.terms) - {"acoustic_top"}
        problems += [
            f"row {row.name}: train.weights.{term} is 0; give it a weight, or leave the row out with --rows"
            for term in TERMS
            if term in needed and not sizes[term]
        ]
    if problems:
        raise ConfigError(problems)


def settings(config: Config, row: Row, seed: int, folder: Path, cache: Path) -> tuple[str, ...]:
    """The row as texts of `--set`, over a configuration.

    Args:
        config: the configuration.
        row: the row.
        seed: `train.seed`.
        folder: the run folder of this row and seed.
        cache: the folder that all rows share.
    """
    places = {"run.folder": str(folder), "run.cache": str(cache), "evaluate.base": False}
    if not row.trains:
        return _texts(places | {"evaluate.model": dataclasses.asdict(config.student.model)})
    own = {"evaluate.model": None, "train.seed": seed}
    return _texts(places | own | _objective(config, row.terms, row.mode, by_task=row.by_task))


def widest(config: Config, rows: Iterable[Row]) -> tuple[str, ...]:
    """What all of the rows together ask of the teachers, as texts of `--set`: so that one pass serves them all."""
    trained = [row for row in rows if row.trains]
    terms = [term for term in TERMS if any(term in row.terms for row in trained)]
    mode = max((row.mode for row in trained), key=_MODES.index, default="top")
    by_task = any(row.by_task for row in trained)
    return _texts({"evaluate.model": None} | _objective(config, terms, mode, by_task=by_task))


def _objective(config: Config, terms: Sequence[str], mode: str, *, by_task: bool) -> dict[str, Any]:
    sizes = dataclasses.asdict(config.train.weights)
    values: dict[str, Any] = {f"train.weights.{term}": sizes[term] if term in terms else 0.0 for term in TERMS}
    schedules = {term: dataclasses.asdict(how) for term, how in config.train.weight_schedule.items() if term in terms}
    values |= {"layers.mode": mode, "layers.map": {}, "train.weight_schedule": schedules}
    if not by_task:
        values["train.task_weights"] = {}
    return values


def _texts(values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
