"""`kdpipe cache` on a small real store: what it shows, proves, mends and removes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from kdpipe.data.store.reader import PartReader
from kdpipe.pipeline.cli import main
from kdpipe.pipeline.plan import STAGES, make_plans, status_of
from kdpipe.pipeline.runner import Request

if TYPE_CHECKING:
    from kdpipe.stages.base import Context
    from kdpipe.stages.miniature.models import Miniatures

TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>{n} tones, café 猫.</CAPTION><REASONING>{n}\n\ttones</REASONING>"
    "<SUMMARY>{n}</SUMMARY></THINK><RESPONSE>{n}</RESPONSE>"
)
CONFIG = """\
data: {{manifest: manifest.jsonl}}
student: {{model: {{path: {student}, dtype: float32}}}}
teachers:
  textual: {{model: {{path: {teacher}, dtype: float32}}}}
  {settings}
layers: {{mode: all}}
train: {{weights: {{top: 1, layer: 1, acoustic: 1, acoustic_top: 0.1, sft: 1}}}}
"""
SETTINGS = "{k: 8, states: int8, temperatures: [2.0], tail_blocks: 3, part_samples: 2, device: cpu}"


def write_manifest(base: Path, ids: Iterable[str]) -> None:
    rows = []
    for number, sample in enumerate(ids, 1):
        given = {"description": f"tones: {number}", "trace": TRACE.format(n=number), "choices": ["2", "3"]}
        rows.append({"id": sample, "audio": f"{number % 2}.wav", "question": f"How many {number}?", **given})
    (base / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(base: Path, family: Miniatures, ids: list[str], settings: str = SETTINGS) -> Request:
    """A run up to the teacher store, made in this process."""
    request = begin(base, family, ids, settings)
    bring_up(request)
    return request


def begin(base: Path, family: Miniatures, ids: list[str], settings: str = SETTINGS) -> Request:
    """A run of which nothing is done yet."""
    base.mkdir(parents=True, exist_ok=True)
    seconds = np.arange(12_000) / 16_000
    for number in range(2):
        soundfile.write(base / f"{number}.wav", 0.3 * np.sin(2 * np.pi * 220 * (number + 1) * seconds), 16_000)
    write_manifest(base, ids)
    text = CONFIG.format(
        student=family.qwen2_5_omni, teacher=family.teacher, settings=settings.strip("{}").replace(", ", "\n  ")
    )
    (base / "kdpipe.yaml").write_text(text)
    return Request(base / "kdpipe.yaml")


def bring_up(request: Request) -> list[tuple[str, str]]:
    """Runs the stages up to the store in this process; gives what was made of it, (sample, source)."""
    made = []
    for name in ("textualize", "cache-teachers"):
        ctx = request.context()
        plan = make_plans(ctx, name)[name]
        if plan.todo:
            STAGES[name].run(ctx, plan.todo)
        made = [(want.id, want.source) for want in plan.todo]
    assert status_of(make_plans(request.context(), "cache-teachers")["cache-teachers"]).state == "fresh"
    return made


IDS = ["dog-1", "cat-2", "ox\x1b[2J", "hen"]


@pytest.fixture(scope="module")
def original(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cache") / "run"
    build(base, family, IDS)
    return base


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def kdpipe(run: Path, *words: str, code: int = 0, columns: int = 100) -> str:
    """Output of `kdpipe cache ...`."""
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["cache", *words, "-c", str(run / "kdpipe.yaml")])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def store_of(run: Path) -> Path:
    return run / "cache-teachers"


def parts(run: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted((store_of(run) / "parts").iterdir()):
        found.setdefault(PartReader(path).source, []).append(path)
    return found


def samples_of(run: Path, part: Path) -> set[tuple[str, str]]:
    return {(row.id, row.source) for row in context(run).ledger("cache-teachers").rows() if row.part == part.name}


def context(run: Path) -> Context:
    return Request(run / "kdpipe.yaml").context()


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << position % 8
    file.write_bytes(content)


def test_inspect_says_what_there_is(run: Path):
    text = kdpipe(run, "inspect")
    assert "4 samples in 7 parts" in text and "0 B beside it that the manifest does not name" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if len(line.split()) > 6}
    assert rows["targets"][:2] == ["4", "4"] and rows["acoustic"][:2] == ["4", "2"], "samples share clips"
    assert "the last layer and the lens of layer" in text and "tails of 3 vocabulary blocks" in text
    assert "codec int8" in text and "cosine 0.99" in text and "relative error" in text


def test_inspect_shows_a_sample_beside_its_teachers(run: Path):
    text = kdpipe(run, "inspect", "dog-1")
    part, row = next((p, p.row_of("dog-1")) for p in map(PartReader, parts(run)["textual"]) if "dog-1" in p._rows)
    found = part.distribution(row, "top", temperatures=[1.0])
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("textual, last layer"))
    table = lines[start + 2 : start + 2 + len(found.ids)]
    assert [int(line.split()[0]) for line in table] == list(range(len(found.ids)))
    tail = np.exp(found.log_tail[:, 0]).sum(1)
    assert [float(line.split()[3]) for line in table] == pytest.approx(tail.tolist(), abs=6e-4)
    assert "acoustic_top, last layer" in text and "How many 1?  (2 / 3)" in text
    assert "target likeliest at" in text and "states of 4 layers (int8)" in text
    assert max(map(len, lines)) <= 100
    joined = "".join(line.split()[1] for line in table)
    assert "PLANNING" in joined and "⏎" in joined and "\\t" in joined, "what does not print is made visible"


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_inspect_keeps_to_the_width_of_the_terminal(run: Path, columns: int):
    lines = kdpipe(run, "inspect", "hen", "--tokens", "3:9", columns=columns).splitlines()
    assert max(len(line) for line in lines) <= max(columns, 45)
    shown = [len(line) for line in lines if line[:2].strip().isdigit()]
    assert len(shown) == 12 and max(shown) <= max(columns, 45)


def test_inspect_of_a_sample_cannot_disturb_a_terminal(run: Path):
    text = kdpipe(run, "inspect", IDS[2])
    assert "\x1b" not in text and "ox\\x1b[2J" in text


def test_inspect_of_a_lens(run: Path):
    text = kdpipe(run, "inspect", "cat-2", "--layer", "2", "--tokens", "5")
    assert "textual, lens of layer 2" in text and "acoustic_top," not in text
    assert sum(line.split()[:1] == ["5"] for line in text.splitlines()) == 1
    error = kdpipe(run, "inspect", "cat-2", "--layer", "77", code=2)
    assert "--layer 77: its lens is not stored; there are those of 2, 3, 5" in error


def test_inspect_refuses_what_is_not_there(run: Path, tmp_path: Path):
    assert "Did you mean dog-1?" in kdpipe(run, "inspect", "dgo-1", code=2)
    assert "'x' is not like 10:20" in kdpipe(run, "inspect", "dog-1", "--tokens", "x", code=2)
    assert "no tokens in this range" in kdpipe(run, "inspect", "dog-1", "--tokens", "900:")
    shutil.rmtree(store_of(run))
    for command in ("inspect", "verify", "gc"):
        assert "nothing is cached yet. Run `kdpipe cache-teachers`" in kdpipe(run, command, code=2)


def test_inspect_works_without_a_tokenizer(run: Path, family: Miniatures):
    file = run / "kdpipe.yaml"
    file.write_text(file.read_text().replace(str(family.qwen2_5_omni), str(run / "gone")))
    assert "[" in kdpipe(run, "inspect", "dog-1", "--tokens", "0:2")


def test_a_sound_store_verifies(run: Path):
    before = {path: path.stat().st_mtime_ns for path in store_of(run).rglob("*")}
    assert "7 parts" in (text := kdpipe(run, "verify")) and "every byte is sound" in text
    assert {path: path.stat().st_mtime_ns for path in store_of(run).rglob("*")} == before


def test_a_flip_in_any_file_is_found(run: Path):
    from kdpipe.data.store.mend import examine

    files = sorted(path for path in store_of(run).rglob("*") if path.is_file())
    assert len(files) > 100
    for number, file in enumerate(files):
        whole = file.read_bytes()
        flip(file, number * 7919 % len(whole))
        found = examine(store_of(run)).damages
        assert file in {damage.file for damage in found}, (file, number, found)
        file.write_bytes(whole)
    assert examine(store_of(run)).damages == ()


def test_a_damaged_part_is_made_anew_and_nothing_else(run: Path):
    for source, paths in parts(run).items():
        part = paths[-1]
        file = sorted(path for path in part.rglob("*") if path.parent.name == "c" or path.parent.parent.name == "c")[-1]
        whole = {path: path.read_bytes() for path in part.rglob("*") if path.is_file()}
        expected = samples_of(run, part)
        flip(file, 1)
        text = kdpipe(run, "verify", "--report-only", code=1)
        assert "Nothing was changed" in text and file.relative_to(store_of(run)).as_posix() in text and part.exists()
        text = kdpipe(run, "verify", code=1)
        assert f"Set aside: parts/{part.name} -> damaged/{part.name}" in text
        assert f"{len({sample for sample, _ in expected})} samples without something now" in text
        assert bring_up(Request(run / "kdpipe.yaml")) == sorted(expected, key=_in_order(run)), source
        assert {path: path.read_bytes() for path in part.rglob("*") if path.is_file()} == whole, "the same bytes again"
        assert "every byte is sound" in kdpipe(run, "verify")
    assert "damaged things that were set aside" in kdpipe(run, "gc")
    assert not any((store_of(run) / "damaged").iterdir()) and "nothing to remove" in kdpipe(run, "gc")


def _in_order(run: Path) -> Callable[[tuple[str, str]], int]:
    wanted = make_plans(context(run), "cache-teachers")["cache-teachers"].wanted
    places = {(want.id, want.source): place for place, want in enumerate(wanted)}
    return lambda pair: places[pair]


def test_a_damaged_ledger_is_made_anew_without_asking_a_teacher(run: Path):
    rows = {(row.id, row.source): row for row in context(run).ledger("cache-teachers").rows()}
    manifest = next((store_of(run) / "manifests").iterdir())
    for file in (store_of(run) / "HEAD", manifest):
        flip(file, 20)
        assert "Made anew: HEAD, from" in kdpipe(run, "verify", code=1)
        assert {(row.id, row.source): row for row in context(run).ledger("cache-teachers").rows()} == rows
        assert bring_up(Request(run / "kdpipe.yaml")) == []


def test_damage_is_told_by_commands_that_meet_it(run: Path):
    flip(store_of(run) / "HEAD", 3)
    assert "kdpipe cache verify" in kdpipe(run, "inspect", code=2)


def test_gc_keeps_what_is_needed_and_removes_the_rest(run: Path):
    store = store_of(run)
    left = [
        store / "parts" / "0123456789abcdef.zarr",
        store / "manifests" / f"{'0' * 32}.parquet",
        store / "damaged" / "x.zarr",
        run / "tmp" / f"{'a' * 32}.zarr",
    ]
    kept = {path for path in store.rglob("*") if path.is_file()}
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0123456789")
    text = kdpipe(run, "gc", "--dry-run")
    assert "40 B would be freed; nothing was removed" in text and all(path.exists() for path in left)
    assert "1 parts that no sample needs, 10 B: 0123456789abcdef.zarr" in text
    assert "40 B beside it that the manifest does not name" in kdpipe(run, "inspect")
    assert "40 B freed" in kdpipe(run, "gc") and not any(path.exists() for path in left)
    assert {path for path in store.rglob("*") if path.is_file()} == kept
    assert (run / "tmp" / "fingerprints.sqlite").exists()
    assert bring_up(Request(run / "kdpipe.yaml")) == []


def test_gc_forgets_samples_that_left_the_manifest_only_when_asked(run: Path):
    write_manifest(run, IDS[:2])
    bring_up(Request(run / "kdpipe.yaml"))
    assert "nothing to remove" in kdpipe(run, "gc")
    before = kdpipe(run, "gc", "--unasked", "--dry-run")
    assert "2 samples that the manifest does not name: hen, ox\\x1b[2J" in before
    assert len({row.id for row in context(run).ledger("cache-teachers").rows()}) == 4
    kdpipe(run, "gc", "--unasked")
    ledger = context(run).ledger("cache-teachers")
    assert {row.id for row in ledger.rows()} == set(IDS[:2])
    assert ledger.unreferenced_parts() == [] and ledger.lost_parts() == set()
    assert "every byte is sound" in kdpipe(run, "verify") and bring_up(Request(run / "kdpipe.yaml")) == []


def test_gc_keeps_parts_that_a_killed_run_had_no_time_to_write_down(run: Path):
    ledger = context(run).ledger("cache-teachers")
    part = parts(run)["textual"][0]
    ledger.commit(drop=samples_of(run, part))
    (stray := store_of(run) / "parts" / "0123456789abcdef.zarr").mkdir()
    assert "1 parts that no sample needs" in kdpipe(run, "gc") and part.exists() and not stray.exists()
    bring_up(Request(run / "kdpipe.yaml"))
    assert samples_of(run, part), "it was taken in"


def test_gc_does_not_take_a_store_without_head_for_garbage(run: Path):
    (store_of(run) / "HEAD").unlink()
    assert "HEAD: missing, so that nothing says which parts are needed" in kdpipe(run, "gc", code=2)
    kdpipe(run, "verify", code=1)
    assert "nothing to remove" in kdpipe(run, "gc")


def test_verify_and_gc_wait_for_no_one(run: Path):
    from kdpipe.pipeline.lock import hold

    with hold([run]):
        for command in ("verify", "gc"):
            assert "another kdpipe works here" in kdpipe(run, command, code=2)


def test_verify_against_the_live_teachers(run: Path):
    text = kdpipe(run, "verify", "--live", "2")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1]}
    for source in ("textual", "acoustic_top"):
        samples, tokens, mean, worst, _, variation = rows[source][1:7]
        assert int(samples) == 2 and int(tokens) > 50
        assert 0 < float(mean) < float(worst) < 5e-3, "float16 and nothing else"
        assert float(variation) < 1e-3
    assert rows["acoustic"][1] == "2" and 0.999 < float(rows["acoustic"][4]) < float(rows["acoustic"][3]) < 1


def test_live_comparison_finds_what_checksums_cannot(run: Path, family: Miniatures, tmp_path: Path):
    """Another teacher's answers under the same keys: here, weights that changed behind the store's back."""
    from kdpipe.pipeline.cache import compare_live
    from kdpipe.stages.cache_teachers import live

    real = live.read_job
    ctx = context(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "read_job", lambda work, encoder, want, text: real(work, encoder, want, text + " more"))
        rows = {line.split()[0]: line.split() for line in compare_live(ctx, 1) if line.split()[:1]}
    assert float(rows["textual"][4]) > 5e-3 > float(rows["acoustic_top"][4])


def test_help_is_light():
    code = (
        "import sys\nfrom kdpipe.pipeline.cli import main\n"
        "try:\n    main(['cache', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'zarr', 'pyarrow', 'numpy', 'transformers'} & sys.modules.keys()\nassert not heavy, heavy"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["inspect", "verify", "gc"]
