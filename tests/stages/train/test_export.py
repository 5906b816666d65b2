"""The student's folder loads wherever the base checkpoint does, and computes what the trained model computed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kdpipe.data.errors import ModelError
from kdpipe.stages.config import EngineConfig, ModelConfig
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import load_model
from kdpipe.stages.train.export import published_names, write_student

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

FAMILIES = ("qwen2_audio", "qwen2_5_omni")


def _folder(path: Path, dtype: str = "float32") -> ModelFolder:
    return resolve(ModelConfig(str(path), dtype=dtype), path.parent)  # type: ignore[arg-type]


def _perturbed(base: ModelFolder) -> Any:
    loaded = load_model(base, device="cpu", train=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loaded.model.eval()
    return loaded


def _batch(encoder: Encoder) -> Batch:
    clip = np.sin(np.arange(int(0.6 * encoder.rate)) * 0.1).astype(np.float32)
    prompt = encoder.prompt_ids(encoder.prompt_text("How many tones?", clips=1), [len(clip)])
    return encoder.collate([Example("a", prompt, encoder.target_ids("three"), encoder.features([clip]))])


@pytest.mark.parametrize("family_name", FAMILIES)
def test_transformers_loads_it_and_gives_the_same_logits(family: Miniatures, family_name: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor, GenerationConfig

    base = _folder(getattr(family, family_name))
    trained = _perturbed(base)
    write_student(tmp_path / "student", base, trained.model, "# card\n")
    again = load_model(_folder(tmp_path / "student"), device="cpu")
    batch = _batch(Encoder(base))
    with torch.no_grad():
        ours = trained.model(**batch.forward, use_cache=False).logits
        theirs = again.model(**batch.forward, use_cache=False).logits
        before = load_model(base, device="cpu").model(**batch.forward, use_cache=False).logits
    assert torch.equal(ours, theirs) and not torch.allclose(ours, before, atol=1e-3)
    student = tmp_path / "student"
    AutoProcessor.from_pretrained(student)
    assert GenerationConfig.from_pretrained(student).eos_token_id is not None
    assert Encoder(_folder(student)).target_ids("three") == Encoder(base).target_ids("three")


@pytest.mark.parametrize("family_name", FAMILIES)
def test_names_and_files_are_those_of_the_base(family: Miniatures, family_name: str, tmp_path: Path) -> None:
    base = _folder(getattr(family, family_name))
    write_student(tmp_path / "student", base, _perturbed(base).model, "# card\n")
    ours = {path.name for path in (tmp_path / "student").iterdir()}
    theirs = {path.name for path in base.path.iterdir()}
    assert ours == theirs | {"README.md"} and "preprocessor_config.json" in ours
    for name in theirs - {"model.safetensors"}:
        assert (tmp_path / "student" / name).read_bytes() == (base.path / name).read_bytes()
    with (
        safe_open(tmp_path / "student" / "model.safetensors", "pt") as mine,
        safe_open(base.path / "model.safetensors", "pt") as its,
    ):
        assert set(mine.keys()) == set(its.keys()) and mine.metadata() == {"format": "pt"}


def test_shards_untouched_weights_and_other_files_are_carried_through(family: Miniatures, tmp_path: Path) -> None:
    shutil.copytree(family.qwen2_5_omni, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors") | {"talker.model.norm.weight": torch.ones(3)}
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "spk_dict.pt").write_bytes(b"speakers")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"old weights")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, tmp_path / "base" / shard, metadata={"format": "pt"})
    places = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))

    base = _folder(tmp_path / "base")
    trained = _perturbed(base)
    write_student(tmp_path / "student", base, trained.model, "# card\n")
    written = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == places
    assert written["metadata"]["total_size"] == sum(value.numel() * 4 for value in weights.values())
    assert (tmp_path / "student" / "spk_dict.pt").read_bytes() == b"speakers"
    assert not (tmp_path / "student" / "pytorch_model.bin").exists()
    second = load_file(tmp_path / "student" / "model-00001-of-00002.safetensors")
    assert torch.equal(second["talker.model.norm.weight"], torch.ones(3))
    again = load_model(_folder(tmp_path / "student"), device="cpu").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in trained.model.state_dict().items())


def test_a_change_of_precision_is_written_into_the_configuration(family: Miniatures, tmp_path: Path) -> None:
    base = _folder(family.qwen2_audio, "bfloat16")
    write_student(tmp_path / "student", base, load_model(base, device="cpu").model, "# card\n")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    original = json.loads((base.path / "config.json").read_text())
    assert {name for name in config if config[name] != original[name]} <= {"dtype", "text_config", "audio_config"}
    tensors = load_file(tmp_path / "student" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_a_processor_without_preprocessor_config_gets_one(family: Miniatures, tmp_path: Path) -> None:
    shutil.copytree(family.qwen2_audio, tmp_path / "base")
    old = json.loads((tmp_path / "base" / "preprocessor_config.json").read_text())
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    nested = {"feature_extractor": old, "processor_class": "Qwen2AudioProcessor"}
    (tmp_path / "base" / "processor_config.json").write_text(json.dumps(nested))
    base = _folder(tmp_path / "base")
    write_student(tmp_path / "student", base, load_model(base, device="cpu").model, "# card\n")
    new = json.loads((tmp_path / "student" / "preprocessor_config.json").read_text())
    assert (new["feature_size"], new["sampling_rate"]) == (old["feature_size"], old["sampling_rate"])


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 2), "norm": nn.LayerNorm(2, bias=False)})
        self.lm_head = nn.Linear(2, 4, bias=False)
        self.lm_head.weight = self.model["embed_tokens"].weight  # pyright: ignore[reportAttributeAccessIssue]


def test_tied_weights_are_stored_once_and_missing_ones_are_an_error(family: Miniatures, tmp_path: Path) -> None:
    base = replace(_folder(family.qwen2_5_omni), path=tmp_path)
    stored = {"thinker.model.embed_tokens.weight": torch.ones(4, 2), "thinker.model.norm.weight": torch.ones(2)}
    save_file(stored, tmp_path / "model.safetensors")
    assert published_names(_Tied(), base) == {
        "model.embed_tokens.weight": "thinker.model.embed_tokens.weight",
        "model.norm.weight": "thinker.model.norm.weight",
    }
    save_file({"thinker.model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack model\.embed_tokens\.weight \(2 in all\)"):
        published_names(_Tied(), base)


def test_the_card_says_what_the_student_was_made_from(cached: Any) -> None:
    run = cached("all + acoustic + SFT").elsewhere("card", max_steps=2)
    run.train()
    card = (run.student / "README.md").read_text()
    for text in (
        "# qwen2_5_omni, distilled with kdpipe",
        "- textual teacher: teacher\n",
        "- acoustic teacher: qwen2_5_omni\n",
        "- data: 8 samples",
        "- training: 2 steps",
        "- versions: kdpipe ",
        "- 1 x textual teacher, last layer: jsd (beta 0.5) at temperature 1, k = 64 and exact tails",
        "- 0.05 x textual teacher, student->teacher layers 1->2, 2->3, 3->5, 4->6: jsd",
        "- 0.05 x acoustic teacher, states at the audio positions of layers 1, 2, 3, 4: cosine distance",
        "- 0.5 x cross-entropy on the response",
        "| loss | ",
        '"learning_rate": 0.002',
    ):
        assert text in card
    assert str(run.base) not in card and "base_model:" not in card
    sft = cached("SFT only").elsewhere("plain-card", max_steps=1)
    sft.train()
    assert "teacher" not in (sft.student / "README.md").read_text().split("## Settings")[0]


@pytest.mark.vllm
def test_vllm_serves_the_omni_student_as_transformers_does(family: Miniatures, tmp_path: Path) -> None:
    from kdpipe.stages.models.drive import drive
    from kdpipe.stages.models.engine import Completion, Request, Sampling, open_engine

    base = _folder(family.qwen2_5_omni)
    trained = _perturbed(base)
    write_student(tmp_path / "student", base, trained.model, "# card\n")
    student = _folder(tmp_path / "student")
    encoder = Encoder(student)
    prompt = encoder.prompt_text("How many tones?", clips=1)
    clips = [np.sin(np.arange(int(s * encoder.rate)) * 0.2).astype(np.float32) * 0.3 for s in (0.5, 1.2)]
    texts: dict[int, str] = {}

    def advance(place: int, done: Completion | None) -> Request | None:
        if done is None:
            return Request(prompt, Sampling(max_tokens=8), [clips[place]])
        texts[place] = done.outputs[0].text
        return None

    def refuse(place: int, why: Exception) -> None:
        raise AssertionError(why)

    settings = EngineConfig(max_model_len=256, max_num_seqs=2, enforce_eager=True, cpu_kv_cache_gib=1)
    with open_engine(student, settings, clips=1, seed=0) as engine:
        drive(engine, range(2), prepare=lambda place: None, advance=advance, reject=refuse)
    for place, clip in enumerate(clips):
        ids = encoder.prompt_ids(prompt, [len(clip)])
        batch = encoder.collate([Example("a", ids, (), encoder.features([clip]))])
        with torch.no_grad():
            out = trained.model.generate(**batch.forward, max_new_tokens=8, do_sample=False)
        expected = encoder.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert texts[place] == expected and expected
