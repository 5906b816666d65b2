"""Miniature folders: what they hold, and that transformers and vLLM load them as they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.miniature import models, world

AUDIO_CLASSES = {
    "qwen2_audio": Qwen2AudioForConditionalGeneration,
    "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
}
COMMON = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def names_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def load(folder: Path):
    model, info = AUDIO_CLASSES[folder.name].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def prompts(processor, count: int) -> tuple[str, list[np.ndarray]]:
    content = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": world.DESCRIBE_PROMPT}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    clips = []
    for row in range(count):
        rng = np.random.default_rng([5, row])
        clips.append(world.render(world.sample_question(rng, held_out=False)[0], rng)[0])
    return text, clips


def test_folders_are_complete(family: models.Miniatures) -> None:
    for folder, others in (
        (family.teacher, {"chat_template.jinja"}),
        (family.qwen2_audio, {"chat_template.jinja", "preprocessor_config.json"}),
        (family.qwen2_5_omni, {"chat_template.jinja", "preprocessor_config.json"}),
    ):
        assert {file.name for file in folder.iterdir()} == COMMON | others


def test_teacher_and_students_differ_in_width_depth_and_padded_vocabulary(family: models.Miniatures) -> None:
    texts = [
        config_of(family.teacher),
        config_of(family.qwen2_audio)["text_config"],
        config_of(family.qwen2_5_omni)["thinker_config"]["text_config"],
    ]
    assert texts[0]["hidden_size"] > texts[1]["hidden_size"]
    assert texts[0]["num_hidden_layers"] > texts[1]["num_hidden_layers"]
    rows = [text["vocab_size"] for text in texts]
    assert len(set(rows)) == 3
    assert rows[0] > family.teacher_tokens
    assert min(rows[1:]) > family.audio_tokens


def test_weights_bear_published_names(family: models.Miniatures) -> None:
    assert "model.embed_tokens.weight" in names_of(family.teacher)
    names = names_of(family.qwen2_audio)
    prefixes = ("language_model.model.", "language_model.lm_head.", "audio_tower.", "multi_modal_projector.")
    assert all(name.startswith(prefixes) for name in names)
    assert not any(name.startswith("language_model.model.model.") for name in names)
    assert all(name.startswith("thinker.") for name in names_of(family.qwen2_5_omni))


def test_configurations_name_the_published_architectures(family: models.Miniatures) -> None:
    assert config_of(family.teacher)["architectures"] == ["Qwen3ForCausalLM"]
    assert config_of(family.qwen2_audio)["architectures"] == ["Qwen2AudioForConditionalGeneration"]
    omni = config_of(family.qwen2_5_omni)
    assert omni["architectures"] == ["Qwen2_5OmniModel"]
    assert omni["enable_audio_output"] is False
    assert omni["thinker_config"]["audio_token_index"] == family.bpe_size + 3


def test_teacher_loads_and_renders_chatml(family: models.Miniatures) -> None:
    model = AutoModelForCausalLM.from_pretrained(family.teacher)
    tokenizer = AutoTokenizer.from_pretrained(family.teacher)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert len(tokenizer) == family.teacher_tokens
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "heard"),
    [
        ("qwen2_audio", "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nDescribe"),
        ("qwen2_5_omni", "<|audio_bos|><|AUDIO|><|audio_eos|>Describe"),
    ],
)
def test_audio_models_load_and_hear(family: models.Miniatures, name: str, heard: str) -> None:
    folder = getattr(family, name)
    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    text, clips = prompts(processor, 2)
    assert heard in text
    inputs = processor(text=[text] * 2, audio=clips, sampling_rate=16_000, return_tensors="pt", padding=True)
    audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    mel = torch.tensor([-(-len(clip) // 160) for clip in clips])
    assert (inputs["input_ids"] == audio_id).sum(1).tolist() == (((mel - 1) // 2 + 1 - 2) // 2 + 1).tolist()
    with torch.no_grad():
        logits = model(**inputs).logits
        silent = model(**{**inputs, "input_features": torch.zeros_like(inputs["input_features"])}).logits
    assert logits.isfinite().all()
    assert not torch.allclose(logits[:, -1], silent[:, -1])


def test_published_names_survive_a_round_trip(family: models.Miniatures, tmp_path: Path) -> None:
    model = load(family.qwen2_audio)
    model.save_pretrained(tmp_path)
    assert names_of(tmp_path) == names_of(family.qwen2_audio)


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni"])
def test_saved_weights_are_the_ones_loaded(family: models.Miniatures, name: str, tmp_path: Path) -> None:
    folder = getattr(family, name)
    models.save_weights(load(folder), tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_same_seed_same_weights(family: models.Miniatures, tmp_path: Path) -> None:
    again = models.make_family(tmp_path / "same")
    other = models.make_family(tmp_path / "other", seed=1)
    for name in ("teacher", "qwen2_audio", "qwen2_5_omni"):
        weights = [(getattr(made, name) / "model.safetensors").read_bytes() for made in (family, again, other)]
        assert weights[0] == weights[1] != weights[2]


def test_the_omni_window_can_be_longer(tmp_path: Path) -> None:
    made = models.make_family(tmp_path, audio_seconds=10)
    preprocessor = json.loads((made.qwen2_5_omni / "preprocessor_config.json").read_text())
    assert preprocessor["nb_max_frames"] == 1000
    assert config_of(made.qwen2_5_omni)["thinker_config"]["audio_config"]["max_source_positions"] == 500


def test_too_few_rows_are_an_error_that_says_so(tmp_path: Path) -> None:
    tokenizer, _ = models.make_tokenizers()
    with pytest.raises(KdpipeError, match="100 output rows"):
        models.make_qwen3(tmp_path, tokenizer=tokenizer, rows=100)


@pytest.mark.vllm
def test_vllm_generates_what_transformers_generates(family: models.Miniatures) -> None:
    from vllm import LLM, SamplingParams

    folder = family.qwen2_5_omni
    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    text, clips = prompts(processor, 3)
    expected = []
    for clip in clips:
        inputs = processor(text=[text], audio=[clip], sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        expected.append(written[0, inputs["input_ids"].shape[1] :].tolist())
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 28,
        limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0},
    )
    try:
        requests = [{"prompt": text, "multi_modal_data": {"audio": (clip, 16_000)}} for clip in clips]
        outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
