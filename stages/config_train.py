"""What a user can say about stage two: the loss and its weights, adapters, and the training of the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from kdpipe.stages.config_fields import Device, bounded, execution

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "sampled_ce"]
Term = Literal["top", "layer", "acoustic", "acoustic_top", "sft"]


@dataclass(frozen=True)
class WeightsConfig:
    """L = top * L_top + layer * sum L_layer + acoustic * L_ac + acoustic_top * L_ac_top + sft * L_sft."""

    top: float = bounded(1.0, 0.0)
    """Textual teacher, last layer."""
    layer: float = bounded(0.05, 0.0)
    """Textual teacher, mapped layers (summed over layers)."""
    acoustic: float = bounded(0.05, 0.0)
    """Acoustic teacher's hidden states at the audio positions (mean over layers)."""
    acoustic_top: float = bounded(0.0, 0.0)
    """Acoustic teacher's distribution over the response."""
    sft: float = bounded(0.5, 0.0)
    """Cross-entropy on the response."""


@dataclass(frozen=True)
class TaskWeightsConfig:
    """Weights of the samples of one task, in place of those of `train.weights`; None keeps those."""

    top: float | None = bounded(None, 0.0)
    """As `train.weights.top`, for samples of this task; null keeps that one."""
    layer: float | None = bounded(None, 0.0)
    """Likewise."""
    acoustic: float | None = bounded(None, 0.0)
    """Likewise."""
    acoustic_top: float | None = bounded(None, 0.0)
    """Likewise."""
    sft: float | None = bounded(None, 0.0)
    """Likewise."""

    def over(self, general: WeightsConfig) -> WeightsConfig:
        """The weights of this task's samples where all others have `general`."""
        named = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(general, **named)


@dataclass(frozen=True)
class ScheduleConfig:
    """A factor of a weight that moves from `start` to `end` while training goes on."""

    kind: Literal["linear", "cosine"] = "linear"
    """Form of the way from `start` to `end`."""
    start: float = bounded(1.0, 0.0)
    """Factor up to `after`."""
    end: float = bounded(0.0, 0.0)
    """Factor from `until` on."""
    after: float = bounded(0.0, 0.0, 1.0)
    """Share of the steps after which the factor leaves `start`."""
    until: float = bounded(1.0, 0.0, 1.0)
    """Share of the steps at which it reaches `end`; where equal to `after`, it jumps."""


def largest(several: Iterable[WeightsConfig]) -> WeightsConfig:
    """The largest weight of each term: above zero where the term counts for any sample."""
    every = [dataclasses.asdict(one) for one in several]
    return WeightsConfig(**{name: max(one[name] for one in every) for name in every[0]})


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the student's weights stay as they are, and two small matrices beside each are trained."""

    rank: int = bounded(16, 1)
    """Rank of each adapter; at most the smaller side of each layer it adapts (vLLM serves adapters up to 512)."""
    alpha: int = bounded(32, 1)
    """An adapter counts alpha / rank times."""
    dropout: float = bounded(0.0, 0.0, 0.9)
    """Share of an adapter's inputs that is dropped while training. With it, `train.micro_batch_tokens` and
    the device decide which."""
    targets: tuple[str, ...] = ("decoder",)
    """Linear layers that are adapted: `decoder` (all of the language model's), `audio_tower`, `projector`; or ends of
    names in the decoder (`q_proj`, `self_attn.o_proj`, `layers.3.mlp.up_proj`), in the encoder with `audio_tower.`
    before them."""
    use_rslora: bool = False
    """Count adapters alpha / sqrt(rank) times, which suits high ranks (Kalajdzievski, 2023)."""


@dataclass(frozen=True)
class TrainConfig:
    """Stage two: the student."""

    weights: WeightsConfig = WeightsConfig()
    task_weights: Mapping[str, TaskWeightsConfig] = dataclasses.field(default_factory=dict)
    """By the manifest's `task`: other weights for samples of that task; see docs/training.md, "Weights by task"."""
    weight_schedule: Mapping[Term, ScheduleConfig] = dataclasses.field(default_factory=dict)
    """By term: a factor of its weight that moves over the steps, for samples of every task."""
    divergence: Divergence = "jsd"
    """Divergence between teacher and student distributions; `sampled_ce` needs `teachers.draws`."""
    beta: float = bounded(0.5, 0.0, 1.0)
    """Mixture weight of `jsd` (0.5: the symmetric one of the paper)."""
    alpha: float = bounded(0.1, 0.0, 0.99)
    """Skew of `skew_kl` and `skew_reverse_kl`, from 0 to 0.99."""
    temperature: float = bounded(1.0, 0.01)
    """Softmax temperature of both; must be one of `teachers.temperatures`."""
    scale_by_temperature_squared: bool = True
    """Multiply divergences by temperature^2, so that gradients keep their size (Hinton et al., 2015)."""
    z_loss: float = bounded(0.0, 0.0)
    """Weight of the squared log-sum-exp in the cross-entropy, which keeps logits from drifting (PaLM: 1e-4);
    it counts with `weights.sft`."""
    epochs: int = bounded(3, 1)
    """Passes over the samples."""
    max_steps: int | None = bounded(None, 1)
    """Stop after this many optimizer steps, if earlier."""
    learning_rate: float = bounded(1e-5, 0.0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after warm-up, to zero."""
    warmup_ratio: float = bounded(0.03, 0.0, 1.0)
    """Share of the steps in which the learning rate rises linearly."""
    weight_decay: float = bounded(0.0, 0.0)
    """AdamW's decoupled decay, on matrices only."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW's moment decays."""
    grad_clip: float = bounded(1.0, 0.0)
    """Largest gradient norm; 0 turns clipping off."""
    global_batch_tokens: int = bounded(16384, 1)
    """Sequence tokens in one optimizer step (identity: it changes the student)."""
    micro_batch_tokens: int = bounded(4096, 1, how=True)
    """Sequence tokens in one forward pass, padding included; the loss does not depend on it."""
    packing: bool = execution(False)
    """Put the sequences of a micro-batch one after the other instead of padding them; see docs/training.md, "Speed"."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: prefixes of names, or `audio_tower`, `projector`, `embeddings`."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; null: all weights but those of `freeze`. See docs/training.md."""
    window_parts: int = bounded(8, 1)
    """Parts whose samples are shuffled together."""
    seed: int = bounded(0, 0, 2**63 - 1)
    """Seeds the order of the samples and everything random in training."""
    validation_fraction: float = bounded(0.0, 0.0, 0.5)
    """Share of the clips that are never trained on, so that the loss on their samples tells what was learnt; 0: none.
    See docs/training.md, "Validation"."""
    validate_steps: int = bounded(200, 1, how=True)
    """Optimizer steps between measurements of the held-out loss; the last step is always followed by one."""
    export: Literal["last", "best"] = "last"
    """The student: that of the last step, or the one with the lowest held-out loss, which needs
    `validation_fraction`."""
    checkpoint_steps: int = bounded(200, 1, how=True)
    """Optimizer steps between checkpoints; with validation, one follows each lowest loss as well."""
    keep_checkpoints: int = bounded(2, 1, how=True)
    """Last checkpoints kept; the one with the lowest held-out loss stays beside them."""
    skip_nonfinite: int = bounded(0, 0, how=True)
    """Most steps of a run that may be skipped because loss or gradient is NaN or infinite; one more stops it. It
    decides whether there is a student, not which; what was skipped stands in metrics.jsonl and the model card."""
    log_steps: int = bounded(1, 1, how=True)
    """Optimizer steps between lines in metrics.jsonl."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = execution(())
    """Where metrics go beside metrics.jsonl; needs `pip install` of what is named. See docs/training.md, "Watching"."""
    device: Device = execution("auto")
    """auto: a GPU where there is one."""
    fsdp: bool = execution(False)
    """Under torchrun or Slurm: share weights, gradients and moments out to the processes (FSDP2), instead of keeping
    all of them in each; see docs/training.md, "Several processes"."""
    head_form: Literal["auto", "reference", "chunked", "triton", "in_forward"] = execution("auto")
    """How the output head and its losses are computed; auto: see docs/losses.md, "Forms"."""
    gradient_checkpointing: bool = execution(False)
    """Recompute activations in the backward pass: less memory, more time."""
    checkpoint_every: int = bounded(1, 1, how=True)
    """With `gradient_checkpointing`: recompute one decoder layer of so many, the first of each (1: all of them)."""
    compile: bool = execution(False)
    """Compile the decoder layers with `torch.compile`: faster steps after a slow first one; needs a C++ compiler."""

    def weights_of(self, task: str | None) -> WeightsConfig:
        """Weights of the samples of a task, or of those without one."""
        own = None if task is None else self.task_weights.get(task)
        return self.weights if own is None else own.over(self.weights)

    @property
    def largest_weights(self) -> WeightsConfig:
        """The largest weight of each term: above zero where the term counts for any task."""
        return largest([self.weights, *map(self.weights_of, self.task_weights)])
