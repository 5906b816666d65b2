"""AdamW on float32 weights, the learning-rate schedule, clipping, and what is left untrained.

Weights of lower precision get a float32 copy that AdamW works on, since a step of 1e-5 is lost in the rounding of
bfloat16. Their gradients are summed up in float32 as well, one micro-batch after the other, and freed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.config import TrainConfig
from kdpipe.stages.train.names import is_named

PROJECTION_RATE = 1e-3
"""Least peak learning rate of the losses' projections: they start from nothing, and at the 1e-5 of a pretrained model
they would stay there."""


def learning_rate_factor(step: int, total: int, config: TrainConfig) -> float:
    """Share of the peak learning rate in a step.

    Rises linearly over the first `ceil(warmup_ratio * total)` steps, reaching 1 in the last of them, then falls
    towards 0, which the step after the last would reach.

    Args:
        step: from 0.
        total: steps of the whole run.
        config: `schedule` and `warmup_ratio`.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "constant":
        return 1.0
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def freeze(model: nn.Module, names: Mapping[str, str], prefixes: Iterable[str], family: str) -> int:
    """Switches gradients off for what `train.freeze` names.

    Args:
        model: the student.
        names: name of each parameter in the model to its name in the checkpoint.
        prefixes: beginnings of names, in the model or in the checkpoint, or an alias: `audio_tower` (the encoder
            without its projector), `projector` (from the encoder's width to the language model's), `embeddings`
            (of the input; the output head too where the two are tied).
        family: the student's family.

    Returns:
        Number of weights that stay as they are.

    Raises:
        KdpipeError: a prefix fits no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for prefix in prefixes:
        chosen = [name for name in parameters if is_named(prefix, name, names.get(name, name), family)]
        if not chosen:
            known = sorted({".".join(name.split(".")[:2]) for name in names.values()})
            raise KdpipeError(
                f"train.freeze: no parameter's name begins with {prefix!r}. Name audio_tower, projector, embeddings, "
                f"or a prefix such as {', '.join(known[:8])}."
            )
        for name in chosen:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise KdpipeError("train.freeze: leaves nothing to train. Take a prefix away.")
    return sum(parameter.numel() for parameter in parameters.values() if not parameter.requires_grad)


class Optimizer:
    """AdamW over named parameters.

    Args:
        model: the student's trained parameters by name.
        projections: the losses' own parameters by name; float32.
        config: learning rate, decays, schedule, clipping.
        total_steps: steps of the whole run, for the schedule.
    """

    def __init__(
        self,
        model: Mapping[str, nn.Parameter],
        projections: Mapping[str, nn.Parameter],
        config: TrainConfig,
        total_steps: int,
    ):
        self._config = config
        self._total = total_steps
        self._targets = dict(model)
        self.weights: dict[str, Tensor] = {name: _master(parameter) for name, parameter in model.items()}
        self.weights |= {f"projections.{name}": parameter for name, parameter in projections.items()}
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [weight],
                    "peak": max(config.learning_rate, PROJECTION_RATE)
                    if name.startswith("projections.")
                    else config.learning_rate,
                    "weight_decay": config.weight_decay if weight.ndim >= 2 else 0.0,
                }
                for name, weight in self.weights.items()
            ],
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            fused=True,
        )

    def step(self, step: int) -> tuple[float, float]:
        """Clips the gradients and takes one step; leaves no gradients behind.

        Args:
            step: from 0; it decides the learning rate.

        Returns:
            The gradient norm before clipping (not finite: nothing was changed), and the learning rate.
        """
        factor = learning_rate_factor(step, self._total, self._config)
        kinds = [group for group in (self.replicated, self.sharded) if any(one.grad is not None for one in group)]
        norm = _joined([_norm(group) for group in kinds])
        if bool(torch.isfinite(norm)):
            if self._config.grad_clip > 0:
                for group in kinds:
                    torch.nn.utils.clip_grads_with_norm_(group, self._config.grad_clip, norm)
            for group in self._adamw.param_groups:
                group["lr"] = group["peak"] * factor
            self._adamw.step()
            self.publish()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm), self._config.learning_rate * factor

    def discard(self) -> None:
        """Drops the gradients that a step which failed left behind."""
        self._adamw.zero_grad(set_to_none=True)
        for parameter in self._targets.values():
            parameter.grad = None

    @property
    def sharded(self) -> list[Tensor]:
        """Weights of which each rank holds a share."""
        return [weight for weight in self.weights.values() if isinstance(weight, DTensor)]

    @property
    def replicated(self) -> list[Tensor]:
        """Weights that are whole on every rank."""
        return [weight for weight in self.weights.values() if not isinstance(weight, DTensor)]

    def tensors(self) -> dict[str, Tensor]:
        """All that decides how training goes on: `weights/<weight>`, and AdamW's `optimizer/<weight>/<moment>`."""
        held = {f"weights/{name}": weight.detach() for name, weight in self.weights.items()}
        held |= {
            f"optimizer/{name}/{moment}": value
            for name, weight in self.weights.items()
            for moment, value in sorted(self._adamw.state.get(weight, {}).items())
        }
        return held

    @torch.no_grad()
    def prepare(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Makes room for a checkpoint's tensors, and gives them to be filled in place; `publish` comes after.

        Args:
            names: what the checkpoint has, as `tensors` names it; all weights are given whether there or not.

        Raises:
            KeyError: it has moments of a weight that is not trained.
        """
        self._adamw.state.clear()
        for key in names:
            kind, rest = key.split("/", 1)
            if kind == "optimizer":
                name, moment = rest.rsplit("/", 1)
                weight = self.weights[name]
                room = torch.zeros((), device=weight.device) if moment == "step" else torch.zeros_like(weight)
                self._adamw.state[weight][moment] = room
        return self.tensors()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the float32 copies into the model's parameters."""
        for name, parameter in self._targets.items():
            if parameter is not self.weights[name]:
                parameter.copy_(self.weights[name])


def _norm(weights: list[Tensor]) -> Tensor:
    """Norm of all gradients together, of all ranks; a scalar."""
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _joined(norms: list[Tensor]) -> Tensor:
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float()

    def gather(low: Tensor) -> None:
        assert low.grad is not None
        master.grad = low.grad.float() if master.grad is None else master.grad.add_(low.grad)
        low.grad = None

    parameter.register_post_accumulate_grad_hook(gather)
    return master
