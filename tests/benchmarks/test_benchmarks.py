"""The benchmarks of losses and store run, and measure what they say; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("bench_losses.py")
SIZES = ["--rows", "24", "--width", "16", "--vocab", "700", "--k", "4", "--repeats", "2", "--threads", "1"]
NEEDS_CUDA = {"ce-triton", "joint-t1-triton", "joint-t2-triton", "liger-ce"}
ALONE = {f"ce-{form}" for form in ("chunked", "in_forward", "triton")}
JOINT = {f"joint-t{t}-{form}" for t in (1, 2) for form in ("chunked", "in_forward", "triton", "reference")}
OTHERS = {"ce-materialized", "liger-ce", "liger-jsd", "trl-jsd", "torchtune-kl", "axolotl-topk", "products"}


def bench(*arguments: str, **environment: str) -> str:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def test_every_case_has_its_row(tmp_path):
    shown = bench(*SIZES, "--device", "cpu", "--json", str(tmp_path / "numbers.json"))
    content = json.loads((tmp_path / "numbers.json").read_text())
    rows = {row["case"]: row for row in content["rows"]}
    assert rows.keys() == ALONE | JOINT | OTHERS
    assert shown.count("\n| ") == 1 + len(rows), "one line of the table each, and its head"
    assert content["settings"]["rows"] == 24 and content["machine"]["torch"] == torch.__version__

    assert {case: row["failure"] for case, row in rows.items() if row["failure"]} == dict.fromkeys(
        NEEDS_CUDA, "needs CUDA"
    )
    ran = {case: row for case, row in rows.items() if case not in NEEDS_CUDA}
    for row in ran.values():
        assert 0 < row["fastest_seconds"] <= row["seconds"] <= row["slowest_seconds"]
        assert row["ratio_to_fastest"] > 0 and row["share_of_limit"] > 0
    assert min(ran[case]["ratio_to_fastest"] for case in ALONE - NEEDS_CUDA) == 1.0
    assert all(ran[case]["ratio_to_form"] == 1.0 for case in ALONE - NEEDS_CUDA)

    losses = defaultdict(list)
    for case, row in ran.items():
        losses["ce" if case.startswith("ce-") else case.rpartition("-")[0]].append(row["loss"])
    assert {group: len(losses[group]) for group in ("ce", "joint-t1", "joint-t2")} == {
        "ce": 3,
        "joint-t1": 3,
        "joint-t2": 3,
    }
    for group in ("ce", "joint-t1", "joint-t2"):
        assert max(losses[group]) == pytest.approx(min(losses[group]), rel=1e-5), "the same work in every form"


@pytest.fixture
def peak_memory(monkeypatch):
    """The function of the script, which imports what lies beside it."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from bench_losses import peak_memory

    return peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_peak_memory_is_what_a_pass_needs_beyond_its_inputs(peak_memory):
    kept = torch.ones(2**23)

    def step() -> float:
        held = kept + 1
        return float(held.sum())

    step()
    needed = 4 * 2**23
    for _ in range(2):
        assert 0.95 * needed < peak_memory(step, "cpu") < 1.25 * needed, "but for the kernel's rounding"


def test_bad_sizes():
    with pytest.raises(subprocess.CalledProcessError) as failed:
        bench(*SIZES, "--k", "700")
    assert "--k must be below --vocab" in failed.value.stderr


def test_a_case_that_fails_says_why(tmp_path):
    """Peers that cannot be imported, and a process that ends by itself."""
    for module, content in {
        "liger_kernel/__init__.py": "raise ImportError('broken | for\\ngood')",
        "trl/kernels/chunked_divergence.py": "import os; os._exit(9)",
    }.items():
        (tmp_path / module).parent.mkdir(parents=True)
        (tmp_path / module).write_text(content)
    (tmp_path / "trl" / "__init__.py").touch()
    lines = bench(*SIZES, "--repeats", "1", PYTHONPATH=str(tmp_path)).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert "cannot be imported (broken \\| for good)" in rows["Liger fused linear JSD"]
    assert "cannot be imported (broken" in rows["axolotl fused top-k KL"]
    assert "the process ended with code 9" in rows["TRL chunked divergence"]
    assert "100%" in rows["torch.mm"], "the others go on"


STORE = SCRIPT.with_name("bench_store.py")
THREADS = {"memmap": (0, 2), "kdpipe-crc": (0, 1, 2), "kdpipe-verified": (0, 2), "tensorstore": (0, 3)}
STORE_READERS = {f"{name}-{count}" for name, counts in THREADS.items() for count in counts}
STORE_READERS |= {"memmap-anew-0", "zarr", "safetensors-numpy", "safetensors-torch"}
STORE_WRITERS = {f"write-{name}" for name in ("plain", "plain-shards", "store", "zarr", "tensorstore", "safetensors")}
STORE_ROWS = {"fixed-decoded", "fixed-read", "mass-decoded", "mass-read", "zarr-read"}


@pytest.mark.skipif(sys.platform != "linux", reason="drops files from Linux's page cache")
def test_everyone_reads_the_same_bytes_of_a_store(tmp_path):
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(STORE), "--quick", "--folder", str(tmp_path), "--json", str(numbers)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    content = json.loads(numbers.read_text())
    assert list(tmp_path.iterdir()) == [numbers], "what was written is removed"

    absent = {row["case"] for row in content["rows"] if row["failure"]}
    assert absent == {"webdataset", "webdataset-shuffle", "mosaicml", "write-tar", "write-mds"}
    assert {row["failure"] for row in content["rows"] if row["failure"]} == {"needs --peers"}
    ran = defaultdict(dict)
    for row in content["rows"]:
        if not row["failure"]:
            ran[row["phase"], row["order"]][row["case"]] = row
    orders = ("sequential", "shuffled")
    assert ran.keys() == {("write", None), *((phase, order) for phase in ("cold", "read") for order in orders)}
    for (phase, order), rows in ran.items():
        assert all(row["same"] is (None if phase == "write" else True) for row in rows.values())
        assert all(0 < row["median"] <= row["best"] and len(row["seconds"]) == 2 for row in rows.values())
        assert all(rows[row["base"]]["ratio"] == 1.0 and row["ratio"] > 0 for row in rows.values() if phase != "cold")
        if phase == "read":
            assert rows.keys() == STORE_READERS
        elif phase == "write":
            assert rows.keys() == STORE_WRITERS
        else:
            files = {"files-0", "files-2"} if order == "sequential" else set()
            assert rows.keys() == files | {"preadv-0", "preadv-2", "memmap-0", "kdpipe-crc-0", "kdpipe-crc-2"}
    assert {row["case"] for row in content["small"]} == STORE_ROWS
    assert all(row["same"] and min(row["micros"]) > 0 for row in content["small"])
    assert shown.count(": met |") + shown.count(": short |") == 14, "a verdict for each goal"


def test_capture_is_measured_beside_the_bare_pass(tmp_path):
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(STORE), "--quick", "--phase", "capture", "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--json", str(numbers)], capture_output=True, text=True, check=True)
    content = json.loads(numbers.read_text())
    assert list(tmp_path.iterdir()) == [numbers], "what was written is removed"
    (row,) = content["capture"]["speed"]
    assert row["taken"].keys() == {"stage", "bare", "limit"}
    assert all(len(times) == 2 and min(map(min, times)) > 0 for times in row["taken"].values())
    assert 0 <= row["padding"] < 1 and row["responses"] < row["tokens"]
    assert 0 < row["spent"]["forward"] + row["spent"]["head"] < row["whole"][0]
    fewer, more = content["capture"]["memory"]
    assert (fewer["units"], more["units"]) == (4 * 20, 4 * 40)
    assert 0 < fewer["imported"] <= fewer["planned"] <= fewer["peak"]
    assert done.stdout.count(": met |") + done.stdout.count(": short |") == 1, "a verdict for the case"


def test_a_step_is_measured_beside_plain_fine_tuning():
    script = Path(__file__).with_name("bench_step.py")
    sizes = ["--samples", "4", "--hidden", "64", "--layers", "1", "--repeats", "1"]
    shown = subprocess.run([sys.executable, str(script), *sizes], capture_output=True, text=True, check=True).stdout
    rows = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["kdpipe, two teachers", "plain fine-tuning"]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows) and float(rows[0][2]) > 0


def test_the_run_of_the_benchmark_of_status_is_one_with_nothing_to_do(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_status

    from kdpipe.data.ledger_files import is_as_written
    from kdpipe.pipeline.plan import make_plans
    from kdpipe.pipeline.runner import Request

    monkeypatch.setattr(bench_status, "PART_SAMPLES", 8)
    ctx = Request(bench_status.make(tmp_path, 20)).context()
    plans = make_plans(ctx)
    assert {name: len(plan.fresh) for name, plan in plans.items()} == {
        "textualize": 20,
        "cache-teachers": 80,
        "train": 20,
        "evaluate": 40,
    }
    assert not any(plan.todo or plan.removed or plan.made_with for plan in plans.values())
    for plan in plans.values():
        assert is_as_written(plan.ledger.folder / "manifests" / f"{plan.ledger.digest}.parquet")
        assert not plan.ledger.unreferenced_parts()
