"""`kdpipe init`: the commented starter configuration, with the weights and layers of one row of the paper's table."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kdpipe.data.errors import ConfigError

RECIPES = {
    "sft": ({"top": "0.0", "layer": "0.0", "acoustic": "0.0", "sft": "1.0"}, "top"),
    "top": ({"top": "1.0", "layer": "0.0", "acoustic": "0.0", "sft": "0.5"}, "top"),
    "skip": ({"top": "1.0", "layer": "0.05", "acoustic": "0.0", "sft": "0.5"}, "skip"),
    "all": ({"top": "1.0", "layer": "0.05", "acoustic": "0.0", "sft": "0.5"}, "all"),
    "acoustic": ({"top": "1.0", "layer": "0.05", "acoustic": "0.05", "sft": "0.5"}, "all"),
    "ours": ({"top": "1.0", "layer": "0.05", "acoustic": "0.05", "sft": "0.5"}, "all"),
}
"""Recipe name to (train.weights, layers.mode). The paper's first row, the untouched base, needs no training:
`kdpipe evaluate` scores it beside every student."""

_BY_TASK = "{ser: {acoustic_top: 1.0, sft: 0.25}}"


def starter_text(recipe: str) -> str:
    """The starter configuration.

    Raises:
        ConfigError: no such recipe.
    """
    if recipe not in RECIPES:
        raise ConfigError([f"--recipe {recipe}: choose one of {', '.join(RECIPES)}"])
    weights, mode = RECIPES[recipe]
    text = files("kdpipe.pipeline").joinpath("starter.yaml").read_text(encoding="utf-8")
    for name, value in {**weights, "mode": mode, "by_task": _BY_TASK if recipe == "ours" else "{}"}.items():
        text = text.replace(f"@{name}@", value)
    return text


def write_starter(file: Path, recipe: str, *, force: bool) -> None:
    """Writes the starter to `file`.

    Raises:
        ConfigError: no such recipe, the file exists, or it cannot be written.
    """
    text = starter_text(recipe)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ConfigError([f"{file}: exists already. Choose another name, or replace it with --force."]) from None
    except OSError as error:
        raise ConfigError([f"{file}: cannot be written ({error.strerror})."]) from None
