"""Makes the audio wheels of PyPI usable beside a CPU build of torch: `python -m kdpipe.pipeline.wheels`.

PyPI's builds of torchaudio, torchvision and torchcodec are linked against CUDA. Beside a torch without CUDA
they cannot be imported, and take vLLM and transformers down with them. Each is tried in a process of its own
and touched only if it fails to import there:

* torchaudio: the shared objects in its `lib` folder are removed, which the package supports (resampling and
  mel transforms are pure torch);
* torchvision: the two operator schemas that its Python files refer to are declared;
* torchcodec: removed; vLLM and kdpipe decode with libsndfile.

On a machine whose wheels load, nothing is changed. Running it twice is harmless.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

_TORCHVISION_PATCH = """
# Added by kdpipe.pipeline.wheels: the compiled operators of this wheel cannot be loaded beside this torch.
# Python code of this package refers to these two schemas on import, so they are declared without a kernel.
if not _has_ops():
    _kdpipe_schemas = torch.library.Library("torchvision", "DEF")
    _kdpipe_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kdpipe_schemas.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
"""


def _loads(package: str) -> bool:
    """Whether `import package` succeeds in a fresh interpreter (True also when it is not installed)."""
    if importlib.util.find_spec(package) is None:
        return True
    return subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode == 0


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def repair() -> list[str]:
    """Repairs what does not load and returns one line of text for each package that was touched.

    Raises:
        RuntimeError: a package still does not import after its repair.
    """
    done = []
    if not _loads("torchaudio"):
        for shared_object in (_folder("torchaudio") / "lib").glob("*.so"):
            shared_object.unlink()
        done.append("torchaudio: removed the CUDA-linked shared objects")
    if not _loads("torchvision"):
        extension = _folder("torchvision") / "extension.py"
        text = extension.read_text()
        if _TORCHVISION_PATCH not in text:
            extension.write_text(text + _TORCHVISION_PATCH)
        done.append("torchvision: declared the operator schemas its Python files refer to")
    if not _loads("torchcodec"):
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-qy", "torchcodec"], check=True)
        done.append("torchcodec: removed (audio is decoded with libsndfile)")
        importlib.invalidate_caches()
    still = [name for name in ("torchaudio", "torchvision", "torchcodec") if not _loads(name)]
    if still:
        raise RuntimeError(
            f"{', '.join(still)}: does not import beside this torch. Try `{sys.executable} -c 'import {still[0]}'` "
            "for the cause, and install the build that matches your torch."
        )
    return done


if __name__ == "__main__":
    for line in repair():
        print(line)
