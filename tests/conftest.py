"""What several rooms' tests share: one family of miniatures, and the real recordings where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "audio"


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Miniatures:
    """Untaught miniature checkpoints of all supported families; read only."""
    from kdpipe.stages.miniature.models import make_family

    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder of real recordings (`fsdd/`, `esc10/`)."""
    if not RECORDINGS.is_dir():
        pytest.skip("the folder of real recordings, shared/audio, does not lie beside this checkout")
    return RECORDINGS


@pytest.fixture(scope="session")
def kill_engines() -> Callable[[], None]:
    """Kills the engine cores of vLLM that this process has started, as the system does where memory is short."""

    def kill() -> None:
        children = psutil.Process().children(recursive=True)
        killed = [child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
        assert killed
        for child in killed:
            child.kill()

    return kill
