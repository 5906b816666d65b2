"""A model with its weights: its decoder layers, final norm and output head, and hidden states without any logits.

Dimension key: B sequences, L tokens, H width of the residual stream, V rows of the output head, N chosen rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)
from transformers.distributed import DistributedConfig

from kdpipe.data.errors import KdpipeError, ModelError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Batch
from kdpipe.stages.models.placement import meet_at_head, refuse_offloaded, refuse_unshared, shares, spread

_CLASSES: dict[str, Any] = {
    "qwen2_audio": Qwen2AudioForConditionalGeneration,
    "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
    "text": AutoModelForCausalLM,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _alone(inputs: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model and the places in it that distillation needs.

    Its layers may lie on several devices. Whatever is asked of it is given on the device of its output head: hidden
    states, captured states, and what the final norm makes of them.

    Attributes:
        folder: where it came from.
        model: the transformers model.
        layers: decoder layers of its language model.
        final_norm: the norm between the last layer and the output head.
        around: entered around each forward pass of `hidden` with its inputs; tensor parallelism tells the other ranks.
    """

    folder: ModelFolder
    model: PreTrainedModel
    layers: nn.ModuleList
    final_norm: nn.Module
    around: Callable[[Mapping[str, torch.Tensor]], AbstractContextManager[None]] = _alone

    @property
    def head_weight(self) -> nn.Parameter:
        """Output head, [V, H]; the embedding itself where the two are tied."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight  # type: ignore[return-value]

    @property
    def width(self) -> int:
        """Width H of the residual stream."""
        return self.head_weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the output head lies."""
        return self.head_weight.device

    @property
    def entrance(self) -> torch.device:
        """Where the input embedding lies, and so the inputs of a forward pass must."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Runs the model up to the output head, which is not applied: no tensor over the vocabulary is made.

        Works under autograd, with tied embeddings too.

        Args:
            batch: on any device.

        Returns:
            [B, L, H], after the final norm, on `device`; rows of padding are meaningless.

        Raises:
            ModelError: another rank of a tensor-parallel model is gone.
        """
        place, entrance = self.device, self.entrance
        inputs = {name: _sent(value, entrance) for name, value in batch.forward.items()}
        with _without_head(self.model), self.around(inputs):
            return self.model(**inputs, use_cache=False, return_dict=True).logits.to(place)

    @contextmanager
    def capture(self, layers: Sequence[int], rows: torch.Tensor | None = None) -> Iterator[dict[int, torch.Tensor]]:
        """Keeps the outputs of chosen decoder layers, before the final norm, of the forward pass run inside.

        Blocks can be nested, each with rows of its own. Under autograd the states carry gradients.

        Args:
            layers: counted from 1.
            rows: [N] int64 into the states flattened to [B * L, H], on any device; None keeps them whole.

        Yields:
            Layer to states, [N, H] or [B, L, H], on `device`, complete when the block ends.

        Raises:
            KdpipeError: there is no such layer.
        """
        count = len(self.layers)
        for layer in layers:
            if not 1 <= layer <= count:
                raise KdpipeError(f"{self.folder.name} has no layer {layer}: its layers are 1 to {count}.")
        states: dict[int, torch.Tensor] = {}
        place = self.device

        def select(output: torch.Tensor) -> torch.Tensor:
            if rows is not None:
                output = output.reshape(-1, output.shape[-1])[rows.to(output.device)]
            return output.to(place)

        def keep(layer: int, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            # Under gradient checkpointing this runs inside the recomputed part, where an operation that is not
            # repeated in the recomputation is an error: there, rows are chosen at the end instead.
            states[layer] = state if torch.is_grad_enabled() else select(state)

        def hook(layer: int) -> Any:
            return lambda module, args, output: keep(layer, output)

        handles = [self.layers[layer - 1].register_forward_hook(hook(layer)) for layer in dict.fromkeys(layers)]
        grad = torch.is_grad_enabled()
        try:
            yield states
            if grad:
                states.update({layer: select(state) for layer, state in states.items()})
        finally:
            for handle in handles:
                handle.remove()


def _sent(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On a GPU from pinned memory, so that nobody waits for what the GPU does before."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def pick_device(device: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        KdpipeError: CUDA is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise KdpipeError("device: cuda is asked for, but torch sees no GPU. Say `device: auto` or `cpu`.")
    return torch.device(device)


def load_model(
    folder: ModelFolder,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
    train: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    tensor_parallel: int = 1,
) -> LoadedModel:
    """Loads a model with the real transformers class of its family, from safetensors only.

    The way over several GPUs has not run on a machine that has several: tests prove with stand-ins for two GPUs,
    which carry no values, that every operation finds its operands on one device. Layers for which the GPUs have no
    room are refused, not run from the CPU or the disk.

    Args:
        folder: the model.
        device: `auto`, `cpu`, `cuda`, or a torch device.
        dtype: precision of the weights; None: the one its configuration asks for.
        train: leave it in training mode with gradients; else it is frozen and in evaluation mode.
        device_map: spread whole layers over the GPUs of this machine: `auto`, `balanced`, `sequential`, or a map of
            module names to devices. Not for training.
        tensor_parallel: ranks that share every layer, this process being one; see `kdpipe.stages.models.parallel`,
            which starts the others.

    Raises:
        ModelError: weights are missing or do not fit, the output head is not a plain matrix, GPUs are too small for
            the layers, or the model cannot be shared out.
    """
    place = pick_device(device) if isinstance(device, str) else device
    assert not (train and device_map) and not (tensor_parallel > 1 and (train or device_map))
    where: dict[str, Any] = {}
    if tensor_parallel > 1:
        plan = shares(folder.name, _skeleton(folder), tensor_parallel)
        where["distributed_config"] = DistributedConfig(tp_size=tensor_parallel, tp_plan=plan)
    elif device_map is not None:
        where = spread(device_map, place)
    try:
        model, info = _CLASSES[folder.family].from_pretrained(
            folder.path,
            dtype=dtype or _DTYPES[folder.settings.dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=folder.settings.trust_remote_code,
            output_loading_info=True,
            **where,
        )
    except Exception as error:  # of damaged files transformers raises whatever its parts do
        why = " ".join(str(error).split())
        raise ModelError(
            f"{folder.name}: the weights in {folder.path} cannot be loaded ({why}). Restore the checkpoint."
        ) from None
    lost = sorted(str(name) for name in (*info["missing_keys"], *info["mismatched_keys"]))
    if lost:
        raise ModelError(
            f"{folder.name}: {folder.path} lacks {len(lost)} weights or has them in another shape, "
            f"first {lost[0]}. Restore the checkpoint."
        )
    if where:
        refuse_offloaded(folder.name, model)
    else:
        model = model.to(place)
    model.train(train)
    if not train:
        model.requires_grad_(False)
    elif folder.family == "qwen2_audio":
        # The class fixes these sinusoids when it is made; loading a checkpoint undoes that.
        model.model.audio_tower.embed_positions.requires_grad_(False)
    decoder = model.model.language_model if folder.family == "qwen2_audio" else model.get_decoder()
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise ModelError(f"{folder.name}: {type(decoder).__name__} has no `layers` and `norm`; not supported.")
    loaded = LoadedModel(folder, model, layers, norm)
    if tensor_parallel > 1:
        refuse_unshared(folder.name, layers)
    meet_at_head(norm, model.get_output_embeddings())
    _check_head(loaded)
    return loaded


def _skeleton(folder: ModelFolder) -> PreTrainedModel:
    """The model without weights."""
    trust = {"trust_remote_code": folder.settings.trust_remote_code}
    kind = _CLASSES[folder.family]
    if folder.family == "text":
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, **trust)
        with torch.device("meta"):
            return kind.from_config(config, **trust)
    config = kind.config_class.from_pretrained(folder.path, local_files_only=True)
    with torch.device("meta"):
        return kind(config)


@contextmanager
def _without_head(model: PreTrainedModel) -> Iterator[None]:
    head = model.get_output_embeddings()
    model.set_output_embeddings(nn.Identity())
    try:
        yield
    finally:
        model.set_output_embeddings(head)


@torch.no_grad()
def _check_head(loaded: LoadedModel) -> None:
    """Refuses models that do more than `hidden @ weight.T` after the final norm: a bias, a scale, a soft cap."""
    head = loaded.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"{loaded.folder.name}: its output head is not a plain matrix; not supported.")
    if loaded.folder.family != "text":
        return
    ids = torch.arange(4, device=loaded.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    training = loaded.model.training
    loaded.model.eval()
    logits = loaded.model(**inputs).logits.float()
    with _without_head(loaded.model):
        plain = head(loaded.model(**inputs).logits).float()
    loaded.model.train(training)
    if not torch.allclose(logits, plain, rtol=1e-2, atol=1e-2):
        raise ModelError(f"{loaded.folder.name}: scales or caps its logits after the output head; not supported.")
