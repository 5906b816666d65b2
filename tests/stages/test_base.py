"""What a context takes over from another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kdpipe.data import manifest
from kdpipe.stages.base import Context
from kdpipe.stages.config import Config, DataConfig, ModelConfig, StudentConfig, TeachersConfig, TextualTeacherConfig


def write(base: Path, *ids: str) -> None:
    rows = ({"id": name, "audio": f"{name}.wav", "question": "How many?"} for name in ids)
    (base / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_manifest_is_taken_over_while_its_file_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig("model")
    config = Config(DataConfig("manifest.jsonl"), StudentConfig(model), TeachersConfig(TextualTeacherConfig(model)))
    write(tmp_path, "a")

    def taking(earlier: Context, config: Config = config) -> Context:
        ctx = Context(config, tmp_path)
        ctx.take_manifest(earlier)
        return ctx

    first = Context(config, tmp_path)
    assert first.manifest.stat is None, "it was written a moment ago, and may be again within one time stamp"
    assert taking(first).manifest is not first.manifest
    monkeypatch.setattr(manifest, "RACY_NS", -1)
    first = Context(config, tmp_path)
    assert len(first.manifest.samples) == 1
    assert taking(first).manifest is first.manifest
    other = replace(config, data=replace(config.data, allow_outside=True))
    assert taking(first, other).manifest is not first.manifest
    write(tmp_path, "a", "b")
    assert [sample.id for sample in taking(first).manifest.samples] == ["a", "b"]
