"""Reading a checkpoint's folder without loading it."""

import json
import shutil
import subprocess
import sys

import pytest

from kdpipe.data.errors import ModelError
from kdpipe.data.hashing import Fingerprints
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import resolve, weight_shapes


@pytest.mark.parametrize(
    ("name", "kind", "hears"),
    [("teacher", "text", False), ("qwen2_audio", "qwen2_audio", True), ("qwen2_5_omni", "qwen2_5_omni", True)],
)
def test_sizes_are_those_of_the_language_model(family, tmp_path, name, kind, hears):
    from transformers import AutoConfig

    path = getattr(family, name)
    folder = resolve(ModelConfig(str(path)), tmp_path)
    config = AutoConfig.from_pretrained(path)
    text = config.thinker_config.text_config if name == "qwen2_5_omni" else config.get_text_config()
    assert (folder.family, folder.hears, folder.commit) == (kind, hears, None)
    assert (folder.layers, folder.width, folder.head_rows) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
    )


def test_a_path_is_relative_to_the_configuration(family):
    assert resolve(ModelConfig("teacher"), family.teacher.parent).path == family.teacher.resolve()


def test_unknown_folders_and_hub_names_say_what_to_do(tmp_path):
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere"):
        resolve(ModelConfig("nowhere"), tmp_path)
    with pytest.raises(ModelError, match=r"nor in the local hub cache .*hf download someone/nothing"):
        resolve(ModelConfig("someone/nothing"), tmp_path)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(ModelConfig("empty"), tmp_path)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        resolve(ModelConfig("torn"), tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(ModelError, match="lacks num_hidden_layers, hidden_size, vocab_size"):
        resolve(ModelConfig("bare"), tmp_path)


def test_an_unsupported_family_is_named(tmp_path):
    (tmp_path / "whisper").mkdir()
    config = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    (tmp_path / "whisper" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model_type 'whisper'.* not supported"):
        resolve(ModelConfig("whisper"), tmp_path)


def test_the_digest_follows_what_changes_outputs_and_not_the_place(family, tmp_path):
    def digests(path, **settings):
        folder = resolve(ModelConfig(str(path), **settings), tmp_path)
        prints = Fingerprints()
        return folder.digest(prints), folder.tokenizer_digest(prints)

    before = digests(family.teacher)
    moved = tmp_path / "moved"
    shutil.copytree(family.teacher, moved)
    assert digests(moved) == before
    assert digests(moved, dtype="float32")[0] != before[0] and digests(moved, dtype="float32")[1] == before[1]
    (moved / "README.md").write_text("a word")
    assert digests(moved) == before
    (moved / "model.safetensors").write_bytes((moved / "model.safetensors").read_bytes()[:-1] + b"x")
    assert digests(moved)[0] != before[0] and digests(moved)[1] == before[1]
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert digests(moved)[1] != before[1]


def test_looking_at_a_model_imports_no_torch():
    code = (
        "import sys, kdpipe.stages.models.folder, kdpipe.stages.models.vocabulary, kdpipe.stages.models.prompt;"
        "import kdpipe.stages.cache_teachers.stage;"
        "print([n for n in ('torch', 'transformers', 'vllm', 'datasets', 'zarr') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"model_type": []},
        {"model_type": "qwen2_5_omni", "thinker_config": None},
        {"model_type": "qwen2_audio", "text_config": 5},
        {"architectures": [5]},
        {"architectures": ["XForCausalLM"], "num_hidden_layers": "many", "hidden_size": 1, "vocab_size": 1},
        {"architectures": ["XForCausalLM"], "num_hidden_layers": 2**70, "hidden_size": 1, "vocab_size": 1},
    ],
)
def test_a_config_of_other_types_is_an_error_of_the_model(tmp_path, config):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        resolve(ModelConfig("model"), tmp_path)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x08" + b"\0" * 7 + b"not json"])
def test_weights_that_cannot_be_read_are_named(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as safetensors"):
        weight_shapes(tmp_path)
