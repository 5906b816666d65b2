"""LoRA: frozen weights in their own precision, float32 adapters beside them, and what is exported of both.

A layer computes W x + s B A x, where s = alpha / rank (rsLoRA: alpha / sqrt(rank)); A is drawn at random and B starts
at zero, so training starts from the base model (Hu et al., 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora import Linear as Adapted
from safetensors.torch import save_file
from torch import nn

from kdpipe.stages.config import LoraConfig
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.train.card import fenced, plain
from kdpipe.stages.train.lora_targets import Linear, adapted_layers

_NAME = "default"  # of the adapter in peft
_OUTER = {"qwen2_audio": "", "qwen2_5_omni": "thinker."}
"""Where the trained model stands in the model of the whole checkpoint, whose names the adapter's files have."""
_LOADING = {
    "qwen2_audio": """\
from transformers import Qwen2AudioForConditionalGeneration

model = Qwen2AudioForConditionalGeneration.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "this folder")""",
    "qwen2_5_omni": """\
from transformers import Qwen2_5OmniForConditionalGeneration

model = Qwen2_5OmniForConditionalGeneration.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "this folder")
# Over Qwen2_5OmniThinkerForConditionalGeneration alone, also: key_mapping={{r"^thinker\\.": ""}}""",
}


@dataclass(frozen=True)
class Adapter:
    """Adapters in a model.

    Attributes:
        model: the model; its layers that are adapted are peft's.
        base: the checkpoint it was loaded from.
        config: rank and the like.
        layers: the layers that are adapted.
        settings: the same for peft.
    """

    model: nn.Module
    base: ModelFolder
    config: LoraConfig
    layers: tuple[Linear, ...]
    settings: peft.LoraConfig

    def write(self, folder: Path) -> None:
        """Writes a folder that peft loads over transformers' model of the whole checkpoint, and vLLM where it can.

        Args:
            folder: does not exist yet.
        """
        folder.mkdir(parents=True)
        self.settings.save_pretrained(str(folder))
        outer = _OUTER[self.base.family]
        tensors = {}
        for name, layer in _adapted(self.model):
            for side, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                weight = matrices.get_parameter(f"{_NAME}.weight").detach().cpu().contiguous()
                tensors[f"base_model.model.{outer}{name}.{side}.weight"] = weight
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # safetensors' own mode lets its owner alone read it.
        shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")
        (folder / "README.md").write_text(_card(self.base), encoding="utf-8")

    @torch.no_grad()
    def merge(self) -> None:
        """Adds each adapter to its weight, in float32 and rounded once, and leaves a plain model behind."""
        for name, layer in list(_adapted(self.model)):
            plain = layer.get_base_layer()
            weight = plain.get_parameter("weight")
            weight.copy_(weight.float() + layer.get_delta_weight(_NAME))
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, plain)


def add_adapter(
    model: nn.Module, base: ModelFolder, names: Mapping[str, str], config: LoraConfig, *, seed: int
) -> Adapter:
    """Puts adapters into a model, which is frozen but for them.

    Args:
        model: changed in place; it computes what it computed before.
        base: the checkpoint it was loaded from.
        names: name of each of its tensors to that in the checkpoint (`export.published_names`).
        config: rank and the like.
        seed: of the adapters' initial values, whatever was drawn before.

    Raises:
        ConfigError: a target fits no layer, or the rank is too high.
    """
    layers = adapted_layers(base, config)
    inside = {stored: name for name, stored in names.items()}
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=_pattern(
            (inside[f"{layer.name}.weight"].removesuffix(".weight") for layer in layers), _OUTER[base.family]
        ),
        base_model_name_or_path=str(base.path) if base.commit is None else base.name,
        revision=base.commit,
        inference_mode=False,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, wherever the model lies
        torch.random.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, _NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for _, layer in _adapted(model):
        layer.lora_A.float()
        layer.lora_B.float()
    assert sum(1 for _ in _adapted(model)) == len(layers)
    settings.inference_mode = True
    return Adapter(model, base, config, layers, settings)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def _pattern(names: Iterable[str], outer: str) -> str:
    """An expression that fits these modules alone, with or without the outer name.

    Not a list: peft takes its entries for ends of names, and other parts of the model have layers of the same names.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    single = []
    for name in names:
        found = re.fullmatch(r"(.+\.layers\.)(\d+)\.(.+)", name)
        if found is None:
            single.append(re.escape(name))
        else:
            numbers.setdefault((found[1], found[3]), []).append(int(found[2]))
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stack, layer), where in sorted(numbers.items()):
        groups.setdefault((stack, tuple(sorted(where))), []).append(re.escape(layer))
    several = [
        rf"{re.escape(stack)}(?:{'|'.join(map(str, where))})\.(?:{'|'.join(layers)})"
        for (stack, where), layers in groups.items()
    ]
    return f"(?:{re.escape(outer)})?(?:{'|'.join([*several, *sorted(single)])})"


def _card(base: ModelFolder) -> str:
    name = base.path.name if base.commit is None else base.name
    lines = ["---", "library_name: peft", "tags: [audio, distillation, kdpipe, lora]"]
    if base.commit is not None:
        lines.append(f"base_model: {base.name}")
    lines += ["---", "", f"# A LoRA adapter for {plain(name)}, made with kdpipe", ""]
    lines.append("The folder `student` beside this one holds the merged model, and says how it was made.")
    code = "from peft import PeftModel\n" + _LOADING[base.family].format(base=name)
    lines += ["", *fenced(code, "python"), ""]
    return "\n".join(lines)
