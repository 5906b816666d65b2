"""The estimate of training's memory against what autograd keeps and what a process takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import LoraConfig, ModelConfig, TrainConfig
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel, load_model
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.train.cost import Load, activations, estimate, parameters
from kdpipe.stages.train.export import published_names
from kdpipe.stages.train.launch import Launch
from kdpipe.stages.train.lora import add_adapter
from kdpipe.stages.train.names import NEVER_TRAINED
from kdpipe.stages.train.optimizer import freeze
from kdpipe.stages.train.terms import resolve_terms

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures


def _batch(folder: ModelFolder) -> Batch:
    encoder, rng = Encoder(folder), np.random.default_rng(0)
    examples = []
    for name, response in (("a", 400), ("b", 250)):
        clip = rng.normal(size=int(2.5 * encoder.rate)).astype(np.float32) * 0.1
        prompt = encoder.prompt_ids(encoder.prompt_text("How many?", clips=1), [len(clip)])
        examples.append(Example(name, prompt, list(range(5, 5 + response)), encoder.features([clip])))
    return encoder.collate(examples)


def _load(batch: Batch, family: str) -> Load:
    audio = len(batch.audio_rows)
    positions = 2 * audio if family == "qwen2_5_omni" else 1500 * len(batch.ids)
    return Load(batch.input_ids.numel(), batch.input_ids.shape[1], len(batch.targets), audio, positions)


def _kept_by_autograd(model: LoadedModel, batch: Batch) -> int:
    """Bytes of all tensors saved for the backward pass that are no weights."""
    tensors = [*model.model.parameters(), *model.model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    seen: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(batch)
    return sum(seen.values())


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen2_audio"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefixes", [(), ("audio_tower",), ("embeddings", "audio_tower", "projector")])
def test_weights_are_counted_exactly_and_activations_within_a_tenth(
    family: Miniatures, name: str, dtype: Any, prefixes: tuple[str, ...]
) -> None:
    folder = resolve(ModelConfig(str(getattr(family, name)), dtype=dtype), family.teacher.parent)
    model = load_model(folder, device="cpu", train=True)
    names = published_names(model.model, folder)
    freeze(model.model, names, NEVER_TRAINED[name], name)
    freeze(model.model, names, prefixes, name)
    counts = parameters(folder, prefixes)
    assert counts.all == sum(parameter.numel() for parameter in model.model.parameters())
    assert counts.trained == sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    batch = _batch(folder)
    expected = activations(folder, TrainConfig(), counts, _load(batch, name), 4 if dtype == "float32" else 2)
    assert expected == pytest.approx(_kept_by_autograd(model, batch), rel=0.1)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen2_audio"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_counted_exactly_and_activations_no_lower_than_they_are(
    family: Miniatures, name: str, dtype: Any
) -> None:
    """Autograd keeps less around weights that are frozen; how much less is not counted."""
    folder = resolve(ModelConfig(str(getattr(family, name)), dtype=dtype), family.teacher.parent)
    model = load_model(folder, device="cpu", train=True)
    lora = LoraConfig(rank=8)
    add_adapter(model.model, folder, published_names(model.model, folder), lora, seed=0)
    counts = parameters(folder, (), lora)
    trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    assert counts.adapters == sum(p.numel() for p in trained.values()) and counts.trained == 0
    assert counts.all + counts.adapters == sum(p.numel() for p in model.model.parameters())
    batch = _batch(folder)
    expected = activations(folder, TrainConfig(lora=lora), counts, _load(batch, name), 4 if dtype == "float32" else 2)
    kept = _kept_by_autograd(model, batch)
    print(name, dtype, expected / kept)
    assert kept < expected < 1.6 * kept


def test_a_student_that_fits_with_lora_alone_is_not_refused(cached: Any) -> None:
    run = cached("SFT only")
    needs = requirements(run.ctx)

    def need(lora: LoraConfig | None) -> dict[str, int]:
        config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, lora=lora))
        ctx = dataclasses.replace(run.ctx, config=config)
        found = estimate(ctx, needs, resolve_terms(config, needs), ctx.ledger("cache-teachers"))
        return {line.name: line.bytes for line in found.lines if line.exact}

    whole, adapters = need(None), need(LoraConfig(rank=4))
    beside = parameters(needs.student, (), LoraConfig(rank=4)).adapters
    assert adapters["weights"] == whole["weights"] + 4 * beside
    assert adapters["gradients (float32)"] == 4 * beside and adapters["AdamW moments"] == 8 * beside
    assert sum(adapters.values()) < 0.5 * sum(whole.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sharded_is_a_share_of_each_process(cached: Any, dtype: Any) -> None:
    run = cached("SFT only")
    model = dataclasses.replace(run.config.student.model, dtype=dtype)
    config = dataclasses.replace(run.config, student=dataclasses.replace(run.config.student, model=model))

    def lines(fsdp: bool, ranks: int) -> tuple[dict[str, int], int | None]:
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, fsdp=fsdp))
        ctx = dataclasses.replace(run.ctx, config=changed)
        needs = requirements(ctx)
        launch = Launch(0, ranks, 0, "localhost", 1, ranks)
        found = estimate(ctx, needs, resolve_terms(changed, needs), ctx.ledger("cache-teachers"), launch)
        return {line.name: line.bytes for line in found.lines}, found.total

    (whole, all_of_it), (replicated, half), (sharded, _) = lines(True, 1), lines(False, 2), lines(True, 2)
    assert replicated == whole and all_of_it is not None and half == all_of_it // 2
    for name in ("gradients (float32)", "AdamW moments"):
        assert sharded[name] == -(-whole[name] // 2)
    wide = whole.get("float32 copies", 0)  # trained weights are held in float32 alone, the others as they are
    assert sharded["weights"] == -(-(whole["weights"] + wide // 2) // 2)
    counts = parameters(resolve(config.student.model, run.base), ())
    assert 0 < counts.layer < counts.outside < counts.all


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_keeps_the_inputs_of_layers_and_one_layer(family: Miniatures, dtype: Any) -> None:
    folder = resolve(ModelConfig(str(family.qwen2_5_omni), dtype=dtype), family.teacher.parent)
    model = load_model(folder, device="cpu", train=True)
    freeze(model.model, published_names(model.model, folder), ["audio_tower"], folder.family)
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch, size = _batch(folder), 4 if dtype == "float32" else 2
    counts, load = parameters(folder, ["audio_tower"]), _load(batch, folder.family)
    plain = activations(folder, TrainConfig(), counts, load, size)
    thrifty = activations(folder, TrainConfig(gradient_checkpointing=True), counts, load, size)
    layers, inputs = folder.layers, folder.layers * load.tokens * folder.width * size
    one = (plain - thrifty + inputs) // (layers - 1)
    assert thrifty - one == pytest.approx(_kept_by_autograd(model, batch), rel=0.25)


_TRAINED = """
import re, torch
from pathlib import Path
from kdpipe.stages.config import *
from kdpipe.stages.base import Context
from kdpipe.stages.train.stage import STAGE
torch.set_num_threads(1)
STAGE.run(Context({config!r}, Path({base!r}), lambda text: None), [])
# Of this program alone: ru_maxrss is at least what the process had that started it.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in KiB on Linux alone")
@pytest.mark.parametrize(
    ("gradient_checkpointing", "dtype"), [(False, "float32"), (True, "float32"), (False, "bfloat16")]
)
def test_a_process_takes_about_what_was_estimated(
    cached: Any, wide_student: Path, gradient_checkpointing: bool, dtype: Any
) -> None:
    """On a student of 30 million weights, so that libraries are not most of it."""
    run = cached("SFT only", samples=7)
    model = ModelConfig(str(wide_student), dtype=dtype)
    run.config = dataclasses.replace(run.config, student=dataclasses.replace(run.config.student, model=model))
    run.bring_up_to_date(TEXTUALIZE, CACHE_TEACHERS)
    run = run.elsewhere(
        f"rss-{gradient_checkpointing}-{dtype}",
        gradient_checkpointing=gradient_checkpointing,
        micro_batch_tokens=4000,
        global_batch_tokens=4000,
        max_steps=2,
    )
    needs = requirements(run.ctx)
    need = estimate(run.ctx, needs, resolve_terms(run.config, needs), run.ctx.ledger("cache-teachers"))
    code = _TRAINED.format(config=run.config, base=str(run.base))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1]) * 1024
    print(json.dumps({"peak": peak, "estimate": need.bytes} | {line.name: line.bytes for line in need.lines}))
    assert 0.7 * peak < need.bytes < 1.4 * peak


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kdpipe.stages.miniature.models import make_qwen2_5_omni, make_tokenizers

    folder = tmp_path_factory.mktemp("wide") / "student"
    return make_qwen2_5_omni(folder, tokenizer=make_tokenizers()[1], hidden=768, layers=6, seed=3)
