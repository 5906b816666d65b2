"""One run with a real teacher store, and copies of it to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.pipeline.report.page import write_report
from kdpipe.pipeline.runner import Request

from .world import build

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures


@pytest.fixture(scope="package")
def original(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run; read only."""
    base = tmp_path_factory.mktemp("report") / "run"
    build(base, family)
    return base


@pytest.fixture(scope="package")
def page(original: Path) -> Path:
    """The page of it."""
    target = original.parent / "page.html"
    assert write_report(Request(original / "kdpipe.yaml"), target) == []
    return target


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"
