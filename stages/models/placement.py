"""Where the weights of a model that is too large for one GPU lie: a map of its layers, or a share of every layer.

Both are transformers' own: `device_map` (whole layers, one GPU after the other at work; the package accelerate moves
what passes between them) and the tensor-parallel plan of a model's class (all GPUs at work on every layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kdpipe.data.errors import ModelError

_FREE_SHARE = 0.9
"""Share of a GPU's free memory that weights may take; the rest is for activations."""
_REPLICATED = "replicated_with_grad_allreduce"
"""transformers' style that leaves a weight whole on every rank (what it does to gradients does not matter here)."""


def spread(device_map: str | Mapping[str, Any], place: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that spread a model's layers over the GPUs of this machine.

    Args:
        device_map: `auto`, `balanced`, `sequential`, or a map of module names to devices.
        place: the kind of device; on the CPU all layers come to lie there.
    """
    if not isinstance(device_map, str):
        return {"device_map": dict(device_map)}
    memory: dict[int | str, int] = get_max_memory()
    if place.type == "cpu":
        memory = {"cpu": memory["cpu"]}
    else:
        memory = {device: 0 if device == "cpu" else int(_FREE_SHARE * free) for device, free in memory.items()}
    return {"device_map": device_map, "max_memory": memory}


def refuse_offloaded(name: str, model: PreTrainedModel) -> None:
    """Refuses a model some of whose layers found no room: they would be copied to a GPU in every forward pass.

    Raises:
        ModelError: weights lie on disk, or on the CPU beside GPUs.
    """
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    on_gpus = any(str(place) not in ("cpu", "disk") for place in places.values())
    out = [module for module, place in places.items() if place == "disk" or (on_gpus and str(place) == "cpu")]
    if out:
        raise ModelError(
            f"{name}: does not fit: {len(out)} of its {len(places)} modules, first {out[0]!r}, would lie on the CPU "
            "or on disk. Use more or larger GPUs, or a smaller dtype of this model."
        )


def meet_at_head(norm: nn.Module, head: nn.Module) -> None:
    """Moves what the final norm gives to the device of the output head, where states and weight are multiplied."""
    place = next((weight.device for weight in head.parameters()), None)
    if any(weight.device != place for weight in norm.parameters()):
        norm.register_forward_hook(lambda module, args, output: output.to(place))


def shares(name: str, skeleton: PreTrainedModel, size: int) -> dict[str, str]:
    """The tensor-parallel plan of a model, with output head and input embedding, which may be one, left whole.

    Args:
        name: of the model, for messages.
        skeleton: the model, without weights.
        size: ranks.

    Returns:
        Module name, `*` for layer numbers, to transformers' style.

    Raises:
        ModelError: its class has no plan, or its attention heads cannot be dealt out to `size` ranks.
    """
    remedy = "Spread its layers instead: teachers.device_map: auto, without teachers.tensor_parallel_size."
    ends = (skeleton.get_output_embeddings(), skeleton.get_input_embeddings())
    whole = [module for module, value in skeleton.named_modules() if any(value is end for end in ends)]
    plan = dict(skeleton.tp_plan)
    if not plan.keys() - set(whole):
        raise ModelError(f"{name}: transformers has no tensor-parallel plan for {type(skeleton).__name__}. {remedy}")
    text = skeleton.config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(text, field, None) or size
        if count % size:
            raise ModelError(
                f"{name}: teachers.tensor_parallel_size is {size}, but its {field} is {count}, which {size} processes "
                f"cannot share evenly. Say a number that divides it. Or: {remedy}"
            )
    return plan | dict.fromkeys(whole, _REPLICATED)


def refuse_unshared(name: str, layers: nn.ModuleList) -> None:
    """Refuses a model whose plan left its decoder layers whole.

    Raises:
        ModelError: no weight of a decoder layer is shared out.
    """
    if not any(isinstance(weight, DTensor) for weight in layers.parameters()):
        raise ModelError(
            f"{name}: the tensor-parallel plan of its class covers none of its decoder layers. Spread them instead: "
            "teachers.device_map: auto, without teachers.tensor_parallel_size."
        )
