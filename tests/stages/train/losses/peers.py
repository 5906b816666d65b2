"""Losses of other projects, as .dev/peers.txt pins them: loaded from single files, nothing of them is copied.

The packages are installed without their dependencies, and some import half of a trainer in their `__init__`. So the
module asked for is imported under bare packages: modules with a `__path__` and nothing else. Afterwards they leave
`sys.modules`, so that nobody else meets them there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any


class PeerMissing(ImportError):
    """A peer cannot be loaded here; says why."""


def liger_jsd() -> Any:
    """`LigerFusedLinearJSDLoss`: label and generalized JSD from a dense teacher, means over tokens."""
    return _plain("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss


def liger_cross_entropy() -> Any:
    """`LigerFusedLinearCrossEntropyLoss`, Triton kernels for CUDA."""
    return _plain("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss


def trl_divergence() -> Any:
    """`ChunkedDivergenceFunction`: generalized JSD from a dense teacher, a value per token, and the entropy."""
    # Gathers weights that DeepSpeed has sharded; nothing is sharded here.
    trainer = {"trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *parameters: nullcontext()}}
    return _bare("trl.kernels.chunked_divergence", trainer).ChunkedDivergenceFunction


def torchtune_divergences() -> ModuleType:
    """The module of `ForwardKLWithChunkedOutputLoss` and its siblings: dense logits, means over tokens."""
    return _bare("torchtune.modules.loss.kd_losses")


def torchtune_cross_entropy() -> Any:
    """`CEWithChunkedOutputLoss`, which torchtune's recipes add to the divergence."""
    return _bare("torchtune.modules.loss.ce_chunked_output_loss").CEWithChunkedOutputLoss


def axolotl_topk() -> Any:
    """`LigerFusedLinearKLTopKLogprobLoss`: label and divergence from renormalized top-k, sums over tokens."""
    _plain("liger_kernel.chunked_loss")  # its base class
    return _bare("axolotl.integrations.kd.kernels.liger").LigerFusedLinearKLTopKLogprobLoss


def _missing(name: str, why: str) -> PeerMissing:
    return PeerMissing(f"{name} cannot be imported ({why}); `make setup` installs what .dev/peers.txt names")


def _plain(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name, str(error)) from error


def _bare(name: str, stand_ins: Mapping[str, Mapping[str, object]] | None = None) -> ModuleType:
    """Module `name`, without running the `__init__` of the packages above it.

    Args:
        name: dotted name.
        stand_ins: modules that are not to be imported either, and what stands in for what is taken from them.

    Raises:
        PeerMissing: it is not installed, or needs something else that is not.
    """
    top = name.partition(".")[0]
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == top}
    try:
        spec = importlib.util.find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            raise _missing(name, f"no package {top}")
        folder = Path(spec.submodule_search_locations[0])
        for inner in (name, *(stand_ins or {})):
            _lay_packages(inner.split(".")[:-1], folder)
        for inner, content in (stand_ins or {}).items():
            sys.modules[inner] = ModuleType(inner)
            sys.modules[inner].__dict__.update(content)
        return importlib.import_module(name)
    except PeerMissing:
        raise
    except ImportError as error:
        raise _missing(name, str(error)) from error
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == top]:
            del sys.modules[key]
        sys.modules.update(before)


def _lay_packages(parts: list[str], folder: Path) -> None:
    for depth in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(folder.joinpath(*parts[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
