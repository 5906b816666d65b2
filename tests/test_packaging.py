"""What is shipped is what lies in the tree, and `kdpipe --help` is quick because it imports little."""

import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "stages", "data")


def test_wheel_holds_every_module(tmp_path):
    source = tmp_path / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(source),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("kdpipe-*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("kdpipe/")}
    tree = {f"kdpipe/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    data = {"pipeline/starter.yaml", "pipeline/report/page.html", "pipeline/report/style.css"}
    assert shipped == tree | {f"kdpipe/{name}" for name in data}


def test_light_modules_import_nothing_heavy():
    code = (
        "import sys; import kdpipe.pipeline.cli, kdpipe.pipeline.plan, kdpipe.pipeline.runner, kdpipe.pipeline.check; "
        "print([m for m in ('torch', 'vllm', 'transformers', 'datasets', 'torchaudio') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_answers_at_once():
    """The promise is 0.3 s on an idle machine; the best of five leaves room for a busy one."""
    command = [str(Path(sys.executable).parent / "kdpipe"), "--help"]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - began)
        assert "cache-teachers" in output
    assert min(seconds) < 0.3, seconds


def test_no_room_imports_upwards():
    """pipeline -> stages -> data, never the other way."""
    forbidden = {"data": ("kdpipe.stages", "kdpipe.pipeline"), "stages": ("kdpipe.pipeline",)}
    wrong = [
        f"{path.relative_to(ROOT)} mentions {name}"
        for room, names in forbidden.items()
        for path in (ROOT / room).rglob("*.py")
        for name in names
        if f"import {name}" in path.read_text() or f"from {name}" in path.read_text()
    ]
    assert wrong == []
