"""The fidelity benchmark on a vocabulary so small that it takes seconds."""

import importlib
import json
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
VOCABULARY = 400


@pytest.fixture(scope="module")
def bench():
    """`bench_fidelity.py`, which finds its neighbours as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield importlib.import_module("bench_fidelity")


@pytest.fixture(scope="module")
def teacher(bench):
    return bench.zipf_teacher(VOCABULARY, rows=24, width=16, spread=3.0)


def _cosine(bench, teacher, student, form, k, divergence):
    truth_VH, _ = bench.full_gradient(teacher, student, divergence)
    return bench.cosine(bench.weight_gradient(teacher, student, form, k, divergence), truth_VH)


@pytest.mark.parametrize("name", ["forward KL", "JSD"])
@pytest.mark.parametrize("kind", ["renormalized", "renormalized_both", "renormalized_zero", "outcomes", "threshold"])
def test_all_entries_give_the_full_gradient(bench, teacher, name, kind):
    form = bench.Form("", kind, blocks=4 if kind in ("outcomes", "threshold") else 0)
    for student in teacher.students:
        cosine = _cosine(bench, teacher, student, form, VOCABULARY, bench.DIVERGENCES[name])
        # What is left is the rounding of log-probabilities to float16.
        assert cosine == pytest.approx(1, abs=1e-6 if student.name == "far" else 2e-5)


@pytest.mark.parametrize("name", ["forward KL", "JSD"])
def test_tails_beat_renormalizing(bench, teacher, name):
    forms = {form.name: form for form in bench.FORMS}
    for student in teacher.students:
        ours, theirs, both = (
            _cosine(bench, teacher, student, forms[form], 12, bench.DIVERGENCES[name])
            for form in ("top-k + tail", "top-k renormalized", "top-k renormalized, both sides")
        )
        assert ours > max(theirs, both)


def test_narrowed_and_direct_caches_agree(bench, teacher):
    """Entries that are dropped from a deep cache go to the tail that a shallow one has."""
    form = bench.Form("", "outcomes", blocks=4)
    narrow, direct = teacher.cached(form, 8), teacher.distribution(8, teacher.bounds(form))
    assert torch.equal(narrow.ids, direct.ids)
    torch.testing.assert_close(narrow.log_tail, direct.log_tail, rtol=0, atol=5e-3)


def test_bytes():
    """Of 64 entries at V = 151,936, as the design page counts them: 18 bits an id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        forms = importlib.import_module("fidelity_forms")
    form = forms.Form("", "outcomes", blocks=16)
    assert form.packed_bytes(64, 151_936) == 64 * 4.25 + 4 + 32
    assert form.stored_bytes(64) == 64 * 6 + 4 + 64
    assert form.fitting(64 * 4.25 + 36, 151_936) == 64
    assert form.fitting(30, 151_936) == 0


def test_command(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tiny = ["--vocabulary", str(VOCABULARY), "--rows", "16"]
    bench.main([*tiny, "--json", str(tmp_path / "points.json"), "--plot", str(tmp_path / "plot.svg")])
    measured = capsys.readouterr().out
    assert "| top-k + tail |" in measured and "entropy" in measured
    points = json.loads((tmp_path / "points.json").read_text())["points"]
    assert {point["student"] for point in points} == {"far", "near"}
    assert all(point["packed"] <= point["budget"] for point in points if point["form"].startswith("top-k"))
    first = (tmp_path / "plot.svg").read_bytes()
    bench.main(["--load", str(tmp_path / "points.json"), "--plot", str(tmp_path / "plot.svg")])
    assert capsys.readouterr().out == measured
    assert (tmp_path / "plot.svg").read_bytes() == first
