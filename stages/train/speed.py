"""What makes training take less memory or less time and does not change the loss but in its rounding."""

from __future__ import annotations

import torch

from kdpipe.stages.config import TrainConfig
from kdpipe.stages.models.loaded import LoadedModel


def set_speed(student: LoadedModel, config: TrainConfig) -> None:
    """Switches gradient checkpointing and compilation on, as configured.

    Args:
        student: in training mode.
        config: `gradient_checkpointing`, `checkpoint_every`, `compile`.
    """
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for place, layer in enumerate(student.layers):
            if place % config.checkpoint_every:
                layer.gradient_checkpointing = False  # type: ignore[assignment]
    if config.compile:
        for layer in student.layers:
            # The forward pass alone, so that hooks, names of weights, and recomputation stay outside of what is
            # compiled. All layers share one graph.
            layer.forward = torch.compile(layer.forward, dynamic=True)
