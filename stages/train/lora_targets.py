"""Which linear layers LoRA adapts, read from a checkpoint's headers alone: light, so that `kdpipe check` can ask."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kdpipe.data.errors import ConfigError
from kdpipe.stages.config import LoraConfig
from kdpipe.stages.models.folder import ModelFolder, weight_shapes

Part = Literal["decoder", "audio_tower", "projector"]
_PARTS: tuple[Part, ...] = ("decoder", "audio_tower", "projector")
_LAYER = re.compile(r"\.layers\.\d+\.")
_ELSEWHERE = ("talker.", "token2wav.", "thinker.visual.", "visual.")


@dataclass(frozen=True)
class Linear:
    """A linear layer of a checkpoint.

    Attributes:
        name: its published name, e.g. `thinker.model.layers.0.self_attn.q_proj`.
        part: where it stands.
        shape: rows and columns of its weight: outputs, inputs.
    """

    name: str
    part: Part
    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        """The last word of its name."""
        return self.name.rpartition(".")[2]


def linear_layers(base: ModelFolder) -> list[Linear]:
    """Linear layers in the decoder layers, the audio encoder's layers and the projector, by name.

    Raises:
        ModelError: the safetensors files cannot be read.
    """
    found = []
    for name, shape in weight_shapes(base.path).items():
        part = _part(base.family, name)
        if part is not None and name.endswith(".weight") and len(shape) == 2:
            found.append(Linear(name.removesuffix(".weight"), part, (shape[0], shape[1])))
    return sorted(found, key=lambda layer: layer.name)


def adapted_layers(base: ModelFolder, config: LoraConfig) -> tuple[Linear, ...]:
    """The layers that `train.lora.targets` chooses, by name.

    Raises:
        ConfigError: a target fits no linear layer, or the rank is more than a layer has; names all such mistakes.
        ModelError: the safetensors files cannot be read.
    """
    layers = linear_layers(base)
    chosen: set[Linear] = set()
    problems = []
    for target in config.targets:
        fitting = [layer for layer in layers if _fits(target, layer)]
        chosen.update(fitting)
        if not fitting:
            problems.append(
                f"train.lora.targets: {target!r} fits no linear layer of {base.name}{_known(target, layers)}"
            )
    narrow = min(chosen, key=lambda layer: (min(layer.shape), layer.name), default=None)
    if narrow is not None and config.rank > min(narrow.shape):
        rows, columns = narrow.shape
        problems.append(
            f"train.lora.rank: {config.rank} is more than the smaller side of {narrow.name} ({rows} x {columns}), so "
            f"its adapter would be larger than any change of it can need; lower it to {min(narrow.shape)}, or choose "
            "other targets"
        )
    if problems:
        raise ConfigError(problems)
    return tuple(sorted(chosen, key=lambda layer: layer.name))


def describe(config: LoraConfig, layers: Sequence[Linear]) -> str:
    """One line for people."""
    weights = config.rank * sum(sum(layer.shape) for layer in layers)
    scaling = config.alpha / (config.rank**0.5 if config.use_rslora else config.rank)
    kinds = [
        f"{', '.join(sorted({layer.kind for layer in layers if layer.part == part}))} of the {part}"
        for part in _PARTS
        if any(layer.part == part for layer in layers)
    ]
    return (
        f"rank {config.rank}, alpha {config.alpha} (scaling {scaling:g}{', rsLoRA' if config.use_rslora else ''}), "
        f"dropout {config.dropout:g}, {weights:,} weights on {len(layers)} linear layers: {'; '.join(kinds)}"
    )


def _part(family: str, name: str) -> Part | None:
    if name.startswith(_ELSEWHERE):
        return None
    if "multi_modal_projector." in name or (family == "qwen2_5_omni" and "audio_tower.proj." in name):
        return "projector"
    if not _LAYER.search(name):
        return None
    return "audio_tower" if "audio_tower." in name else "decoder"


def _fits(target: str, layer: Linear) -> bool:
    part, _, rest = target.partition(".")
    if part not in _PARTS:
        part, rest = "decoder", target
    return layer.part == part and (not rest or f".{layer.name}".endswith(f".{rest}"))


def _known(target: str, layers: Sequence[Linear]) -> str:
    kinds = {part: sorted({layer.kind for layer in layers if layer.part == part}) for part in _PARTS}
    close = difflib.get_close_matches(target, [*kinds["decoder"], *_PARTS], n=1, cutoff=0.6)
    return (
        f"; {f'did you mean {close[0]}? ' if close else ''}Say decoder, audio_tower, projector, or ends of names: "
        f"{', '.join(kinds['decoder'])} in the decoder, "
        f"{', '.join(f'audio_tower.{kind}' for kind in kinds['audio_tower'])} in the encoder"
    )
