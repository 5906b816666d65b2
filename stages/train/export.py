"""The student's folder: the base checkpoint's files with the trained weights in the place of the old ones.

Weight names and shards are those of the base checkpoint, whatever transformers calls its modules today: vLLM and
older releases of transformers know the published names only. Weights that training does not touch are carried
through unchanged (of a Qwen2.5-Omni checkpoint: talker, vocoder, vision).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdpipe.data.errors import ModelError
from kdpipe.stages.models.folder import ModelFolder, shards
from kdpipe.stages.train.names import canonical

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf", ".h5", ".msgpack")


def published_names(model: nn.Module, base: ModelFolder) -> dict[str, str]:
    """Name of each of the model's tensors in the base checkpoint, by its name in the model.

    A tensor that is tied to another, and so is not stored, is left out.

    Raises:
        ModelError: the checkpoint lacks a tensor of the model.
    """
    stored = {canonical(base.family, name): name for shard in shards(base.path) for name in _names(shard)}
    tensors = model.state_dict(keep_vars=True)
    names = {name: stored[own] for name in tensors if (own := canonical(base.family, name)) in stored}
    held = {tensors[name].data_ptr() for name in names}
    missing = [name for name, tensor in tensors.items() if name not in names and tensor.data_ptr() not in held]
    if missing:
        raise ModelError(
            f"{base.name}: its safetensors files lack {missing[0]} ({len(missing)} in all), so the student cannot be "
            "written under the published names. Restore the checkpoint."
        )
    return names


def write_student(folder: Path, base: ModelFolder, model: nn.Module, card: str) -> None:
    """Writes a folder that transformers and vLLM load as they load the base checkpoint.

    Configuration, tokenizer, processor, chat template and generation config are the base's files, byte for byte,
    but for the precision in config.json where training changed it.

    Args:
        folder: does not exist yet.
        base: checkpoint that training started from.
        model: the trained model.
        card: text of README.md.

    Raises:
        ModelError: the base checkpoint lacks tensors of the model.
    """
    trained = {stored: model.state_dict()[name] for name, stored in published_names(model, base).items()}
    folder.mkdir(parents=True)
    for path in sorted(base.path.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in ("README.md", ".gitattributes"):
            shutil.copyfile(path, folder / path.name)
    _write_weights(folder, base.path, trained)
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    cast = _with_dtype(config, base.settings.dtype)
    if cast != config:
        (folder / "config.json").write_text(json.dumps(cast, indent=2) + "\n", encoding="utf-8")
    if not (folder / "preprocessor_config.json").exists():
        from transformers import AutoFeatureExtractor

        trust = base.settings.trust_remote_code
        found = AutoFeatureExtractor.from_pretrained(base.path, trust_remote_code=trust, local_files_only=True)
        found.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_weights(folder: Path, base: Path, trained: Mapping[str, Tensor]) -> None:
    """Rewrites the base's shards one by one, so that no more than one is in memory beside the model."""
    places: dict[str, str] = {}
    total = 0
    for shard in shards(base):
        with safe_open(shard, framework="pt") as file:
            tensors = {
                name: trained[name].detach().cpu().contiguous() if name in trained else file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
            }
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / shard.name)  # safetensors' own lets its owner alone read it
        places |= dict.fromkeys(tensors, shard.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if set(places.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names(shard: Path) -> Iterable[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def _with_dtype(config: Any, dtype: str) -> Any:
    """The configuration with every precision it names replaced."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }
