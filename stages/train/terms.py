"""What the loss is made of, resolved from the configuration and the sizes of the models.

Two configurations that mean the same give equal terms, and so the same key: a weight of zero makes the settings of
its term irrelevant, `beta`, `alpha` and the draws matter to the divergences that use them, and a layer mode is its map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kdpipe.data.errors import ConfigError
from kdpipe.stages.cache_teachers.layers import layer_map
from kdpipe.stages.cache_teachers.requirements import Requirements
from kdpipe.stages.config import Config, Distance, TrainConfig
from kdpipe.stages.config import Divergence as DivergenceKind
from kdpipe.stages.config_train import ScheduleConfig

NO_FLOAT16 = (
    "student.model.dtype: gradients underflow in float16, and kdpipe does not scale the loss. Say bfloat16 or float32."
)
NO_DRAWS = (
    "train.divergence: sampled_ce takes the tails from draws, and teachers.draws is 0; "
    "set teachers.draws (32, say), or choose another divergence"
)
_NAMES = ("top", "layer", "acoustic", "acoustic_top", "sft")
_SKEWED = ("skew_kl", "skew_reverse_kl")


@dataclass(frozen=True)
class Compared:
    """How two distributions are compared.

    Attributes:
        kind: divergence from teacher to student.
        beta: mixture weight of `jsd`; 0 with the others.
        temperature: softmax temperature of both.
        t_squared: multiply by temperature^2; False at temperature 1.
        k: most entries of a teacher that count one by one.
        alpha: skew of `skew_kl` and `skew_reverse_kl`; 0 with the others.
        draws: ids drawn from a teacher's tail that stand for it in `sampled_ce`; 0 with the others.
        mass: mass that these entries reach, where k allows it; 1: all k count.
        min_k: the fewest entries; k where the mass is 1.
    """

    kind: DivergenceKind
    beta: float
    temperature: float
    t_squared: bool
    k: int
    alpha: float = 0.0
    draws: int = 0
    mass: float = 1.0
    min_k: int = 1

    def describe(self) -> str:
        """A phrase for people."""
        name = self.kind
        if name == "jsd":
            name = f"jsd (beta {self.beta:g})"
        elif name in _SKEWED:
            name = f"{name} (alpha {self.alpha:g})"
        tails = f"{self.draws} draws from each tail" if self.draws else "exact tails"
        kept = f"k = {self.k}" if self.mass >= 1 else f"entries of mass {self.mass:g} ({self.min_k} to {self.k})"
        return f"{name} at temperature {self.temperature:g}, {kept} and {tails}"


@dataclass(frozen=True)
class Terms:
    """L = sft CE + top D_top + layer sum_i D_i + acoustic mean_i d_i + acoustic_top D_ac.

    Attributes:
        sft, top, layer, acoustic, acoustic_top: weights.
        compared: how distributions are compared; None where no term compares any.
        layers: student layer to textual-teacher layer, counted from 1; empty without layer term.
        match: lens: D_i is a divergence through each model's own norm and head; hidden: a distance of projected states.
        acoustic_layers: layers whose states at the audio positions are compared; empty without acoustic term.
        distance: of hidden states; None where no term compares any.
        z_loss: weight of the squared log-sum-exp in the cross-entropy; 0 where that is off.
        tasks: by task, the weights of its samples where they are not those above.
        schedules: by term that is on, how a factor of its weight moves; those that are not named stay.
    """

    sft: float
    top: float
    layer: float
    acoustic: float
    acoustic_top: float
    compared: Compared | None
    layers: Mapping[int, int]
    match: Literal["lens", "hidden"] | None
    acoustic_layers: tuple[int, ...]
    distance: Distance | None
    z_loss: float = 0.0
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    schedules: Mapping[str, ScheduleConfig] = field(default_factory=dict)

    def on(self, name: str) -> bool:
        """Whether a term counts for any sample."""
        return getattr(self, name) > 0 or any(weights[name] > 0 for weights in self.tasks.values())

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term that is on, in the order of the sum; 0 for one that is on for some task alone."""
        return {name: getattr(self, name) for name in _NAMES if self.on(name)}

    def weights_of(self, task: str | None) -> dict[str, float]:
        """The same for samples of one task."""
        own = self.weights if task is None else self.tasks.get(task, self.weights)
        return {name: own[name] for name in self.weights}

    def identity(self) -> dict[str, Any]:
        """Plain values that are equal exactly when two objectives are, apart from the weights of tasks.

        Those are in the keys of their samples.
        """
        values = asdict(self)
        del values["tasks"]
        if not self.schedules:
            # Only where there are any: keys of objectives without are older than schedules.
            del values["schedules"]
        return values

    def describe(self) -> list[str]:
        """One line for each term, for people."""
        lines = []
        how = "" if self.compared is None else self.compared.describe()
        pairs = ", ".join(f"{ours}->{theirs}" for ours, theirs in self.layers.items())
        between = how if self.match == "lens" else f"{self.distance} distance of projected states"
        texts = {
            "top": f"textual teacher, last layer: {how}",
            "layer": f"textual teacher, student->teacher layers {pairs}: {between}",
            "acoustic": f"acoustic teacher, states at the audio positions of layers "
            f"{', '.join(map(str, self.acoustic_layers))}: {self.distance} distance",
            "acoustic_top": f"acoustic teacher, last layer: {how}",
            "sft": "cross-entropy on the response" + (f" with z-loss {self.z_loss:g}" if self.z_loss else ""),
        }
        for name, weight in self.weights.items():
            own = [f"{w[name]:g} for {task}" for task, w in self.tasks.items() if w[name] != weight]
            lines.append(f"{', '.join([f'{weight:g}', *own])} x {texts[name]}{_moves(self.schedules.get(name))}")
        return lines


def _moves(schedule: ScheduleConfig | None) -> str:
    if schedule is None:
        return ""
    return (
        f"; its weight times {schedule.start:g} to {schedule.end:g}, {schedule.kind}, "
        f"from {schedule.after:g} to {schedule.until:g} of the steps"
    )


def resolve_terms(config: Config, needs: Requirements) -> Terms:
    """The objective that a configuration means.

    Args:
        config: the configuration.
        needs: what it asks of the teachers.

    Raises:
        ConfigError: every weight is zero, the layer map does not fit the models, or there are no draws to sample from.
    """
    train, weights, most = config.train, config.train.weights, config.train.largest_weights
    if not any(asdict(most).values()):
        raise ConfigError(["train.weights: all are zero, so there is nothing to learn. Set at least one."])
    layers: dict[int, int] = {}
    if most.layer > 0 and needs.textual is not None:
        layers = layer_map(config.layers, needs.student.layers, needs.textual.layers)
    hidden = config.layers.match == "hidden"
    compared = None
    if most.top > 0 or most.acoustic_top > 0 or (layers and not hidden):
        sampled = train.divergence == "sampled_ce"
        if sampled and not needs.draws:
            raise ConfigError([NO_DRAWS])
        compared = Compared(
            train.divergence,
            train.beta if train.divergence == "jsd" else 0.0,
            train.temperature,
            train.scale_by_temperature_squared and train.temperature != 1.0,
            needs.k,
            train.alpha if train.divergence in _SKEWED else 0.0,
            needs.draws if sampled else 0,
            needs.mass,
            needs.min_k,
        )
    return Terms(
        sft=weights.sft,
        top=weights.top,
        layer=weights.layer,
        acoustic=weights.acoustic,
        acoustic_top=weights.acoustic_top,
        compared=compared,
        layers=dict(sorted(layers.items())),
        match=config.layers.match if layers else None,
        acoustic_layers=needs.heard,
        distance=config.layers.distance if needs.heard or (layers and hidden) else None,
        z_loss=train.z_loss if most.sft > 0 else 0.0,
        tasks=_tasks(train),
        schedules={
            name: schedule
            for name, schedule in sorted(train.weight_schedule.items())
            if getattr(most, name) > 0 and not schedule.start == schedule.end == 1.0
        },
    )


def _tasks(train: TrainConfig) -> dict[str, dict[str, float]]:
    """Weights of the tasks that have others than samples in general."""
    own = {task: train.weights_of(task) for task in sorted(train.task_weights)}
    return {task: asdict(weights) for task, weights in own.items() if weights != train.weights}
