"""A model's folder, read without loading the model: family, sizes, digests.

Supported students and acoustic teachers: Qwen2-Audio and Qwen2.5-Omni (its thinker). Supported textual teachers:
any decoder-only model of transformers (`...ForCausalLM`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdpipe.data.errors import ModelError
from kdpipe.data.hashing import Fingerprints, digest
from kdpipe.stages.config import ModelConfig

AUDIO_FAMILIES = {"qwen2_audio": "qwen2_audio", "qwen2_5_omni": "qwen2_5_omni"}
"""`model_type` of a checkpoint's config.json to family name."""

_CONTENT = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
)


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint on disk.

    Attributes:
        path: the folder with config.json.
        name: as the user wrote it, for messages and model cards.
        family: `qwen2_audio`, `qwen2_5_omni`, or `text`.
        config: the parsed config.json.
        text: the part of it that describes the language model.
        commit: resolved commit of a hub model, None for a plain folder.
        settings: the user's settings (dtype, trust_remote_code).
    """

    path: Path
    name: str
    family: str
    config: Mapping[str, Any]
    text: Mapping[str, Any]
    commit: str | None
    settings: ModelConfig

    @property
    def hears(self) -> bool:
        """Whether the model takes audio."""
        return self.family != "text"

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.text["num_hidden_layers"])

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.text["hidden_size"])

    @property
    def head_rows(self) -> int:
        """Rows of the output head, padding included."""
        return int(self.text["vocab_size"])

    def digest(self, prints: Fingerprints) -> str:
        """Digest of everything that can change the model's outputs: files, revision, precision, remote code."""
        suffixes = (*_CONTENT, ".py") if self.settings.trust_remote_code else _CONTENT
        files = self.commit or prints.folder(self.path, suffixes)
        return digest([files, self.settings.dtype, self.settings.trust_remote_code])

    def tokenizer_digest(self, prints: Fingerprints) -> str:
        """Digest of the tokenizer, processor and chat template files."""
        return self.commit or prints.folder(self.path, _TOKENIZER)


def resolve(model: ModelConfig, base: Path, *, download: bool = False) -> ModelFolder:
    """Finds a model and reads its config.json.

    Args:
        model: what the user wrote.
        base: folder that relative paths start from.
        download: fetch a hub model that is not in the local cache (weights as safetensors only).

    Raises:
        ModelError: no such folder or hub model, no config.json, or an unsupported family.
    """
    return _resolve(model, base, download)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a checkpoint by its published name, from the headers alone; PyTorch is not imported.

    Raises:
        ModelError: a file cannot be read; names it.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards(folder):
        try:
            with safe_open(shard, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{shard}: cannot be read as safetensors ({error}). Restore the file.") from None
    return shapes


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
        ModelError: their index cannot be read, or names files that are not in the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if name != os.path.basename(name) or not name.endswith(".safetensors")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: cannot be read ({error!r}). Restore the file.") from None
    if outside:
        raise ModelError(f"{index}: names {outside[0]!a}, which is no safetensors file beside it. Restore the file.")
    return [folder / name for name in names]


@lru_cache(maxsize=64)
def _resolve(model: ModelConfig, base: Path, download: bool) -> ModelFolder:
    folder, commit = Path(os.path.normpath(base / os.path.expanduser(model.path))), None
    if not folder.is_dir():
        folder, commit = _from_hub(model, folder, download)
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: has no config.json. Name a folder saved by `save_pretrained`.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error}). Restore the file.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds no JSON object. Restore the file.")
    family, text = _family(model.path, config)
    bad = [name for name in ("num_hidden_layers", "hidden_size", "vocab_size") if not _is_size(text.get(name))]
    if bad:
        raise ModelError(f"{file}: lacks {', '.join(bad)} for the language model. Restore the file.")
    return ModelFolder(folder.resolve(), model.path, family, config, text, commit, model)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _below(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _family(name: str, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in AUDIO_FAMILIES:
        inner = _below(config, "thinker_config") if kind == "qwen2_5_omni" else config
        return AUDIO_FAMILIES[kind], _below(inner, "text_config")
    architectures = config.get("architectures")
    architectures = [one for one in architectures if isinstance(one, str)] if isinstance(architectures, list) else []
    if any(architecture.endswith("ForCausalLM") for architecture in architectures):
        return "text", config
    raise ModelError(
        f"{name}: model_type {kind!r} with architectures {architectures} is not supported. Audio models: "
        f"{', '.join(sorted(AUDIO_FAMILIES))}; text models: any ...ForCausalLM of transformers."
    )


def _from_hub(model: ModelConfig, folder: Path, download: bool) -> tuple[Path, str]:
    if model.path.count("/") != 1 or model.path.startswith((".", "/", "~")):
        raise ModelError(
            f"{model.path}: there is no folder {folder}. Name a model folder, or a hub name like Qwen/Qwen3-8B."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in (*_CONTENT, ".py")]
    try:
        path = snapshot_download(
            model.path, revision=model.revision, allow_patterns=patterns, local_files_only=not download
        )
    except (LocalEntryNotFoundError, FileNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        remedy = (
            "Check the name, the revision and the network."
            if download
            else f"`kdpipe run` downloads it, or run `hf download {model.path}`."
        )
        raise ModelError(
            f"{model.path}: neither a folder ({folder}) nor in the local hub cache ({type(error).__name__}). {remedy}"
        ) from None
    return Path(path), Path(path).name
