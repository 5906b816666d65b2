"""Loss curves of the paper's settings as they were: a change of the arithmetic anywhere in training shows here.

After a change that is meant to change them: `KDPIPE_GOLDEN=write pytest tests/stages/train/test_golden.py`, and look at
the difference in `golden.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .conftest import SETTINGS

GOLDEN = Path(__file__).with_name("golden.json")
REL = 2e-4
"""Other processors sum in another order, and four steps of AdamW make more of it."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_curve(cached: Any, setting: str) -> None:
    metrics = cached(setting).elsewhere("golden").train()
    found = [{"loss": line["loss"], "grad_norm": line["grad_norm"], **line["terms"]} for line in metrics]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("KDPIPE_GOLDEN") == "write":
        rounded = [{name: float(f"{value:.7g}") for name, value in step.items()} for step in found]
        GOLDEN.write_text(json.dumps({**golden, setting: rounded}, indent=1) + "\n")
        return
    assert len(found) == len(golden[setting]) >= 3
    for ours, theirs in zip(found, golden[setting], strict=True):
        assert ours == pytest.approx(theirs, rel=REL, abs=1e-6)
