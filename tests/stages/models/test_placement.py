"""Layers over several devices: maps on the CPU, and stand-ins for two GPUs that know their device but no values."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import dispatch_model, hooks
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoConfig, AutoModelForCausalLM

from kdpipe.data.errors import ModelError
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models import placement
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel, load_model

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

FIRST = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.layers.2")
LAST = ("model.layers.3", "model.layers.4", "model.layers.5", "model.norm", "lm_head")


@pytest.fixture
def folder(family: Miniatures) -> ModelFolder:
    return resolve(ModelConfig(str(family.teacher), dtype="float32"), family.teacher)


def batch_of(folder: ModelFolder) -> Batch:
    encoder = Encoder(folder)
    asked = ((f"Question number {place}?", answer) for place, answer in enumerate(("yes", "no, not at all")))
    return encoder.collate(
        [
            Example(text, encoder.prompt_ids(encoder.prompt_text(text)), encoder.target_ids(answer))
            for text, answer in asked
        ]
    )


def said(loaded: LoadedModel, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad(), loaded.capture([1, 4], batch.response_rows) as states:
        hidden = loaded.hidden(batch)
    return [hidden, states[1], states[4], loaded.final_norm(states[1]), loaded.final_norm(states[4])]


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "sequential", {"": "cpu"}, dict.fromkeys(FIRST + LAST, "cpu")]
)
def test_a_map_on_the_cpu_changes_nothing(device_map: Any, folder: ModelFolder) -> None:
    batch = batch_of(folder)
    spread = load_model(folder, device="cpu", device_map=device_map)
    for found, expected in zip(said(spread, batch), said(load_model(folder, device="cpu"), batch), strict=True):
        assert torch.equal(found, expected)


def test_accelerates_hooks_change_nothing(folder: ModelFolder) -> None:
    batch = batch_of(folder)
    loaded = load_model(folder, device="cpu")
    expected = said(loaded, batch)
    dispatch_model(loaded.model, dict.fromkeys(FIRST + LAST, "cpu"), force_hooks=True)
    for found, before in zip(said(loaded, batch), expected, strict=True):
        assert torch.equal(found, before)


def test_layers_without_room_are_refused(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder.path / "model.safetensors").stat().st_size
    monkeypatch.setattr(placement, "get_max_memory", lambda: {"cpu": size // 2})
    with pytest.raises(ModelError, match=r"does not fit: .* would lie on the CPU or on disk"):
        load_model(folder, device="cpu", device_map="sequential")


def test_gpus_keep_room_for_activations_and_the_cpu_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "get_max_memory", lambda: {0: 1000, 1: 2000, "cpu": 5000})
    assert placement.spread("auto", torch.device("cuda")) == {
        "device_map": "auto",
        "max_memory": {0: 900, 1: 1800, "cpu": 0},
    }


def test_two_devices_as_far_as_stand_ins_show(folder: ModelFolder) -> None:
    """Fake tensors compute shapes and devices alone, and raise where operands lie on different devices.

    In a process of its own, since a made-up kind of device is for ever.
    """
    command = [sys.executable, __file__, str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ok"] * 8


class IndicesLieWithWhatTheyIndex(TorchFunctionMode):
    """Fake tensors overlook this one rule of real devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            assert args[1].device.type == "cpu" or args[1].device == args[0].device
        return func(*args, **(kwargs or {}))


def main(path: Path) -> None:
    """Runs a model on two made-up devices: all places of norm and head, inputs on the CPU and beside the head."""

    def move(module: torch.nn.Module, name: str, device: Any, **others: Any) -> None:
        owner, _, leaf = name.rpartition(".")
        inner = module.get_submodule(owner)
        store = inner._parameters if leaf in inner._parameters else inner._buffers
        store[leaf] = store[leaf].detach().to(device)

    # Accelerate's own makes a parameter of the tensor's class anew, which the class of fake tensors does not let it.
    hooks.set_module_tensor_to_device = move
    _setup_privateuseone_for_python_backend("standin")
    first, second = torch.device("standin:1"), torch.device("standin:2")
    folder = resolve(ModelConfig(str(path), dtype="float32"), path)
    config, batch = AutoConfig.from_pretrained(path), batch_of(folder)
    for norm, head, beside_head in itertools.product((first, second), (first, second), (False, True)):
        device_map = dict.fromkeys(FIRST, first) | dict.fromkeys(LAST, second) | {"model.norm": norm, "lm_head": head}
        with FakeTensorMode() as fake, IndicesLieWithWhatTheyIndex():
            tensors = {name: fake.from_tensor(v) for name, v in vars(batch).items() if isinstance(v, torch.Tensor)}
            asked = dataclasses.replace(batch, **tensors)
            model: Any = dispatch_model(AutoModelForCausalLM.from_config(config), device_map)
            placement.meet_at_head(model.model.norm, model.lm_head)
            loaded = LoadedModel(folder, model, model.model.layers, model.model.norm)
            assert loaded.entrance == first and loaded.device == head
            assert model.model.layers[3].mlp.up_proj.weight.device == second
            for state in said(loaded, asked.to(head if beside_head else "cpu")):
                assert state.device == head and (state @ loaded.head_weight.T).device == head
        print("ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
