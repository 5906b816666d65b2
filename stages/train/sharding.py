"""FSDP2: each rank holds its share of the weights, gradients and moments, and borrows a layer while it computes it.

A unit is a layer of the decoder or of the audio tower; what is outside of the layers (embeddings, final norm, output
head) is a unit of its own, which stays whole from the forward pass to the end of the backward pass, so that the
losses find the output head whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from kdpipe.stages.models.loaded import LoadedModel
from kdpipe.stages.train.world import World


def shard(student: LoadedModel, world: World) -> None:
    """Gives each rank its share of a model, and moves it to the rank's device, unit by unit.

    Trained weights of lower precision are kept in float32 and rounded when they are gathered, as the unsharded model
    rounds its float32 copies. Gradients are summed over the ranks in float32, not averaged: the losses are normalized
    by the tokens of all ranks.

    Args:
        student: on the CPU, whole on every rank, with gradients switched off where nothing is trained.
        world: more than one rank.
    """
    model = student.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    low = {parameter.dtype for parameter in trained} - {torch.float32}
    assert len(low) <= 1 and not (low and any(parameter.dtype == torch.float32 for parameter in trained))
    policy = MixedPrecisionPolicy(
        param_dtype=next(iter(low), None), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = init_device_mesh(world.device.type, (world.size,))
    done: set[nn.Parameter] = set()
    for unit in [*_layers(model), model]:
        for parameter in set(unit.parameters()) - done:
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        done |= set(unit.parameters())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost module lists that have weights."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            yield from (entry for entry in module if any(True for _ in entry.parameters()))
