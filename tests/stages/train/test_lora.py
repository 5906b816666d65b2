"""LoRA: adapters alone are trained, and what is exported computes what was trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdpipe.data.errors import ConfigError, ModelError
from kdpipe.stages.config import LoraConfig, ModelConfig
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel, load_model
from kdpipe.stages.train.export import published_names, write_student
from kdpipe.stages.train.lora import Adapter, add_adapter
from kdpipe.stages.train.lora_targets import adapted_layers, describe, linear_layers
from kdpipe.stages.train.metrics import MetricsFile

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures
from .conftest import last_checkpoint

FAMILIES = ("qwen2_audio", "qwen2_5_omni")
ALL = "all + acoustic + SFT"
DECODER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _folder(path: Path, dtype: str = "float32") -> ModelFolder:
    return resolve(ModelConfig(str(path), dtype=dtype), path.parent)  # type: ignore[arg-type]


def _batch(base: ModelFolder) -> Batch:
    encoder = Encoder(base)
    clip = np.sin(np.arange(int(0.6 * encoder.rate)) * 0.1).astype(np.float32)
    prompt = encoder.prompt_ids(encoder.prompt_text("How many tones?", clips=1), [len(clip)])
    return encoder.collate([Example("a", prompt, encoder.target_ids("three"), encoder.features([clip]))])


@torch.no_grad()
def _logits(model: Any, batch: Batch) -> torch.Tensor:
    model.eval()
    return model(**batch.forward, use_cache=False).logits.float()


def _with_adapter(base: ModelFolder, config: LoraConfig, size: float = 0.1) -> tuple[LoadedModel, Adapter]:
    """A model with an adapter that changes what it computes."""
    loaded = load_model(base, device="cpu", train=True)
    adapter = add_adapter(loaded.model, base, published_names(loaded.model, base), config, seed=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(size * torch.randn_like(parameter))
    return loaded, adapter


def _story(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clocked = {"seconds", "tokens_per_second", "data_wait"}
    return [{name: value for name, value in line.items() if name not in clocked} for line in metrics]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_the_stage_trains_adapters_alone_and_exports_them_twice(
    cached: Any, family: Miniatures, family_name: str
) -> None:
    cache = cached(ALL, student=family_name, samples=4 if family_name == "qwen2_audio" else 8)
    run = cache.elsewhere("lora", epochs=3, lora=LoraConfig(rank=4, alpha=8))
    metrics = run.train()
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    base = _folder(getattr(family, family_name))
    layers = adapted_layers(base, LoraConfig(rank=4))
    weights = sum(4 * sum(layer.shape) for layer in layers)
    assert {layer.kind for layer in layers} == DECODER and len(layers) == 7 * 4
    assert any(f"train: {weights:,} weights trained" in line for line in run.said)

    saved = {name: value for name, value in last_checkpoint(run).items() if name.startswith("weights/")}
    assert len(saved) == 2 * len(layers) and sum(value.numel() for value in saved.values()) == weights
    assert all(".lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
    before, after = load_file(base.path / "model.safetensors"), load_file(run.student / "model.safetensors")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{layer.name}.weight" for layer in layers}

    folder = run.ctx.folder("train") / "adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    rows = list(run.ctx.ledger("train").rows())
    assert any(file.startswith("../adapter/adapter_model.safetensors:") for file in rows[0].cover["files"])
    assert (
        f"- LoRA, merged into these weights: {describe(LoraConfig(rank=4, alpha=8), layers)}"
        in (run.student / "README.md").read_text()
    )
    plain = _merged_by_hand(base, folder, scaling=2.0)
    for name, value in plain.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def _merged_by_hand(base: ModelFolder, adapter: Path, *, scaling: float) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors with the adapter's added, by the equation."""
    tensors = load_file(base.path / "model.safetensors")
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in pairs if name.endswith(".lora_A.weight")]:
        stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if base.family == "qwen2_audio":
            stem = stem.replace("model.language_model.", "language_model.model.", 1)
        other = pairs[name.replace(".lora_A.", ".lora_B.")]
        tensors[f"{stem}.weight"] = tensors[f"{stem}.weight"] + scaling * other @ pairs[name]
    return tensors


def test_a_run_that_was_stopped_goes_on_bit_for_bit(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraConfig(rank=4, dropout=0.1, use_rslora=True)
    setting = "hidden + acoustic top + SFT"
    whole, broken = (cached(setting).elsewhere(f"lora-{name}", lora=lora) for name in ("whole", "cut"))
    whole.train()
    append = MetricsFile.append

    def stopping(self: MetricsFile, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", stopping)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
            broken.train()
    broken.train()
    assert "train: goes on after step 2" in broken.said and len(whole.metrics) > 2
    assert _story(broken.metrics) == _story(whole.metrics)
    for file in ("student/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        ours, theirs = (run.ctx.folder("train") / file for run in (broken, whole))
        assert ours.read_bytes() == theirs.read_bytes()
    names = [name for name in last_checkpoint(whole) if ".lora_" not in name]
    assert {name.split("/")[1].split(".")[0] for name in names} == {"projections"}


def test_gradient_checkpointing_changes_nothing(cached: Any) -> None:
    lora = LoraConfig(rank=4, targets=("layers.2.mlp.up_proj", "layers.3.self_attn.q_proj"))
    plain, thrifty = (cached(ALL).elsewhere(f"lora-gc-{flag}", max_steps=2, lora=lora) for flag in (False, True))
    ours, theirs = plain.train(), thrifty.train(gradient_checkpointing=True)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5)
    assert ours[0]["grad_norm"] > 0


def test_a_missing_adapter_is_noticed_and_one_that_no_longer_belongs_is_removed(cached: Any) -> None:
    run = cached("SFT only").elsewhere("lora-lost")
    run.train(max_steps=1, lora=LoraConfig(rank=2))
    folder = run.ctx.folder("train") / "adapter"
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert not run.plans()["train"].todo
    (folder / "adapter_model.safetensors").unlink()
    assert len(run.plans()["train"].todo) == 8
    run.bring_up_to_date()
    assert (folder / "adapter_model.safetensors").read_bytes() == weights and not run.plans()["train"].todo
    shutil.rmtree(folder)
    assert len(run.plans()["train"].todo) == 8
    run.train(lora=None)
    assert not folder.exists() and not run.plans()["train"].todo


def test_without_lora_the_key_is_what_it_was_and_with_it_another(cached: Any) -> None:
    run = cached("SFT only").elsewhere("lora-key")
    keys = []
    for lora in (None, LoraConfig(), LoraConfig(rank=8), LoraConfig(targets=("q_proj",))):
        config = replace(run.config, train=replace(run.config.train, lora=lora))
        keys.append(replace(run, config=config).plans()["train"].wanted[0].fields["optimization"])
    assert len(set(keys)) == 4


@pytest.mark.parametrize("family_name", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_does_not_depend_on_what_was_drawn_before(
    family: Miniatures, family_name: str
) -> None:
    base = _folder(getattr(family, family_name))
    batch, states = _batch(base), []
    for draws in (0, 5):
        loaded = load_model(base, device="cpu", train=True)
        expected = _logits(loaded.model, batch)
        torch.rand(draws)
        before = torch.get_rng_state()
        add_adapter(loaded.model, base, published_names(loaded.model, base), LoraConfig(rank=2), seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(_logits(loaded.model, batch), expected)
        states.append({name: value for name, value in loaded.model.state_dict().items() if ".lora_A." in name})
    assert all(torch.equal(value, states[1][name]) and bool(value.any()) for name, value in states[0].items())


@pytest.mark.parametrize("family_name", FAMILIES)
def test_capture_and_hidden_see_the_adapters(family: Miniatures, family_name: str) -> None:
    base = _folder(getattr(family, family_name))
    loaded, _ = _with_adapter(base, LoraConfig(rank=2))
    batch = _batch(base)
    loaded.model.eval()
    with loaded.capture([2]) as states:
        hidden = loaded.hidden(batch)
    assert states[2].requires_grad and hidden.requires_grad
    torch.testing.assert_close(hidden @ loaded.head_weight.T, _logits(loaded.model, batch), rtol=1e-5, atol=1e-5)
    plain = load_model(base, device="cpu")
    with torch.no_grad(), plain.capture([2]) as before:
        plain.hidden(batch)
    assert not torch.allclose(states[2], before[2], atol=1e-3)
    (hidden.square().sum() + states[2].sum()).backward()
    grown = {name for name, parameter in loaded.model.named_parameters() if parameter.grad is not None}
    assert grown and all(".lora_" in name for name in grown)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_peft_loads_the_adapter_and_gives_what_was_trained_and_what_was_merged(
    family: Miniatures, family_name: str, tmp_path: Path
) -> None:
    """Logits within 1e-5 of each other in float32; the model itself changed by more than 1e-2."""
    import peft
    from transformers import Qwen2_5OmniForConditionalGeneration, Qwen2AudioForConditionalGeneration

    shutil.copytree(getattr(family, family_name), tmp_path / "base")
    torch.save({}, tmp_path / "base" / "spk_dict.pt")  # the voices, which transformers' whole Omni model asks for
    base = _folder(tmp_path / "base")
    targets = ("decoder", "audio_tower.fc1", "projector")
    loaded, adapter = _with_adapter(base, LoraConfig(rank=4, alpha=4, targets=targets))
    batch = _batch(base)
    trained = _logits(loaded.model, batch)
    untrained = _logits(load_model(base, device="cpu").model, batch)
    assert float((trained - untrained).abs().max()) > 1e-2

    adapter.write(tmp_path / "adapter")
    adapter.merge()
    assert not any("lora" in name or "base_layer" in name for name in loaded.model.state_dict())
    write_student(tmp_path / "student", base, loaded.model, "# card\n")
    merged = _logits(load_model(_folder(tmp_path / "student"), device="cpu").model, batch)
    torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-5)

    kinds = {"qwen2_audio": Qwen2AudioForConditionalGeneration, "qwen2_5_omni": Qwen2_5OmniForConditionalGeneration}
    whole: Any = kinds[family_name].from_pretrained(base.path, dtype=torch.float32)
    again: Any = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter"))
    inner = again.base_model.model.thinker if family_name == "qwen2_5_omni" else again
    torch.testing.assert_close(_logits(inner, batch), trained, rtol=1e-5, atol=1e-5)
    if family_name == "qwen2_5_omni":
        again = peft.PeftModel.from_pretrained(
            load_model(base, device="cpu").model,
            str(tmp_path / "adapter"),
            key_mapping={r"^thinker\.": ""},
        )
        torch.testing.assert_close(_logits(again, batch), trained, rtol=1e-5, atol=1e-5)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.path) and settings["r"] == 4


def test_a_bfloat16_student_keeps_its_precision_and_is_rounded_once(family: Miniatures, tmp_path: Path) -> None:
    base = _folder(family.qwen2_5_omni, "bfloat16")
    loaded, adapter = _with_adapter(base, LoraConfig(rank=4))
    kinds = {".lora_" in name: parameter.dtype for name, parameter in loaded.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    adapter.write(tmp_path / "adapter")
    adapter.merge()
    write_student(tmp_path / "student", base, loaded.model, "# card\n")
    low = {name: value.bfloat16() for name, value in load_file(base.path / "model.safetensors").items()}
    (tmp_path / "low").mkdir()
    save_file({name: value.float() for name, value in low.items()}, tmp_path / "low" / "model.safetensors")
    expected = _merged_by_hand(replace(base, path=tmp_path / "low"), tmp_path / "adapter", scaling=8.0)
    written = load_file(tmp_path / "student" / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(written[name], value.bfloat16()), name


def test_targets_are_parts_or_ends_of_names(family: Miniatures) -> None:
    omni, audio = _folder(family.qwen2_5_omni), _folder(family.qwen2_audio)

    def names(base: ModelFolder, *targets: str) -> set[str]:
        return {layer.name for layer in adapted_layers(base, LoraConfig(rank=1, targets=targets))}

    assert names(omni, "layers.3.mlp.up_proj") == {"thinker.model.layers.3.mlp.up_proj"}
    assert names(omni, "decoder.q_proj") == names(omni, "q_proj") == names(omni, "self_attn.q_proj")
    assert names(audio, "layers.0.self_attn.q_proj") == {"language_model.model.layers.0.self_attn.q_proj"}
    assert names(omni, "projector") == {"thinker.audio_tower.proj"}
    assert names(audio, "projector") == {"multi_modal_projector.linear"}
    assert names(audio, "audio_tower.fc1") == {f"audio_tower.layers.{layer}.fc1" for layer in (0, 1)}
    tower = {layer.kind for layer in linear_layers(omni) if layer.part == "audio_tower"}
    assert tower == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert not any("visual" in layer.name for layer in linear_layers(omni))


def test_mistakes_say_what_there_is(family: Miniatures) -> None:
    base = _folder(family.qwen2_5_omni)
    with pytest.raises(ConfigError) as caught:
        adapted_layers(base, LoraConfig(rank=33, targets=("qproj", "decoder", "fc1", "up")))
    unknown, encoder, partial, rank = caught.value.problems
    assert "'qproj' fits no linear layer" in unknown and "did you mean q_proj?" in unknown
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj in the decoder" in unknown
    assert "'fc1' fits" in encoder and "audio_tower.fc1" in encoder and "'up' fits" in partial
    assert "33 is more than the smaller side of thinker.model.layers.0.self_attn.k_proj (32 x 96)" in rank
    assert "lower it to 32" in rank


def test_damaged_weights_are_named(tmp_path: Path, family: Miniatures) -> None:
    shutil.copytree(family.qwen2_5_omni, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ModelError, match=r"base/model.safetensors: cannot be read as safetensors .* Restore the file"):
        linear_layers(_folder(tmp_path / "base"))
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        linear_layers(_folder(tmp_path / "base"))


@torch.no_grad()
def _greedy(model: Any, encoder: Encoder, prompt: str, clips: list[np.ndarray]) -> list[list[int]]:
    model.eval()
    written = []
    for clip in clips:
        ids = encoder.prompt_ids(prompt, [len(clip)])
        batch = encoder.collate([Example("a", ids, (), encoder.features([clip]))])
        out = model.generate(**batch.forward, max_new_tokens=8, do_sample=False)
        written.append(out[0, len(ids) :].tolist())
    return written


@pytest.mark.vllm
def test_vllm_serves_the_merged_student_and_the_adapter(family: Miniatures, tmp_path: Path) -> None:
    """One engine for both: the merged student with the adapter taken away again must answer as the base model does."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base = _folder(family.qwen2_5_omni)
    loaded, adapter = _with_adapter(base, LoraConfig(rank=8, alpha=16, use_rslora=True))
    encoder = Encoder(base)
    prompt = encoder.prompt_text("How many tones?", clips=1)
    clips = [np.sin(np.arange(int(s * encoder.rate)) * 0.2).astype(np.float32) * 0.3 for s in (0.5, 1.2)]
    trained = _greedy(loaded.model, encoder, prompt, clips)
    untrained = _greedy(load_model(base, device="cpu").model, encoder, prompt, clips)
    assert all(ours != theirs for ours, theirs in zip(trained, untrained, strict=True))

    adapter.write(tmp_path / "adapter")
    adapter.merge()
    write_student(tmp_path / "student", base, loaded.model, "# card\n")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: -value if ".lora_B." in name else value for name, value in load_file(file).items()}, file)
    llm = LLM(
        str(tmp_path / "student"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 28,
        limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0},
        enable_lora=True,
        max_lora_rank=8,
    )
    try:
        requests = [{"prompt": prompt, "multi_modal_data": {"audio": (clip, encoder.rate)}} for clip in clips]
        sampling = SamplingParams(temperature=0, max_tokens=8)
        merged = llm.generate(requests, sampling, use_tqdm=False)
        taken = LoRARequest("negative", 1, str(tmp_path / "adapter"))
        restored = llm.generate(requests, sampling, use_tqdm=False, lora_request=taken)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert [list(output.outputs[0].token_ids) for output in merged] == trained
    assert [list(output.outputs[0].token_ids) for output in restored] == untrained
