"""What a killed run left of its descriptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdpipe.stages.textualize.descriptions import Description, Descriptions


@pytest.mark.parametrize("damage", [{"text": None}, {"text": " "}, {"prompt_tokens": "5"}])
def test_records_of_other_types_are_made_anew(tmp_path: Path, damage: dict[str, object]) -> None:
    good = {"key": "a", "text": "tones", "prompt_tokens": 5, "completion_tokens": 2, "finish_reason": "stop"}
    lines = [json.dumps(good), json.dumps(good | {"key": "b"} | damage), "[" * 100_000, "\ufffd"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    found = Descriptions(tmp_path / "d.jsonl")
    assert found.get("a") == Description("tones", 5, 2, "stop") and found.get("b") is None
