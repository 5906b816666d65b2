"""One warm process and one small world for all tests of this folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .commands import Commands
from .world import World

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("steps are counted by a library that is preloaded, which takes Linux and a C compiler")
    with Commands(tmp_path_factory.mktemp("commands")) as made:
        yield made


@pytest.fixture(scope="session")
def world(family: Miniatures, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), family, commands)
