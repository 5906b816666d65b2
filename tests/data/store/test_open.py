"""`open_store`: samples by id as tensors, and errors that say what there is."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.data.errors import StoreError
from kdpipe.data.store import TeacherStore, open_store

from .conftest import TEMPERATURES, WIDTH
from .small import LENGTHS, SOURCES, Small, make_small

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text(encoding="utf-8")
(EXAMPLE,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "open_store" in text)
"""The example of `docs/format.md`."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory.mktemp("open") / "run")


@pytest.fixture(scope="module")
def store(small: Small) -> TeacherStore:
    return open_store(small.folder)


def test_a_store_is_a_mapping_of_samples(store: TeacherStore, small: Small):
    assert len(store) == 3 and list(store) == sorted(LENGTHS) and "ox" in store and "cow" not in store
    assert store.sources == SOURCES and store.get("cow") is None
    assert repr(store) == f"TeacherStore({str(small.folder)!r}: 3 samples; targets, textual, acoustic, acoustic_top)"
    assert [sample.id for sample in store.values()] == list(store)
    assert repr(store["ox"]) == "Sample('ox': targets, textual, acoustic, acoustic_top)"


@pytest.mark.parametrize("of", [lambda f: f, lambda f: f.parent, lambda f: str(f.parent)])
def test_any_folder_that_leads_to_it_will_do(small: Small, of):
    assert len(open_store(of(small.folder))) == 3


def test_targets(store: TeacherStore, small: Small):
    for sample, ids in small.target_ids.items():
        found = store[sample].target_ids
        assert found.dtype == torch.int64 and found.tolist() == ids.tolist()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_distributions_are_those_of_the_logits(store: TeacherStore, small: Small, temperature: float):
    for sample, tokens in LENGTHS.items():
        knowledge = store[sample].textual
        for place, found in (("top", knowledge.top), ("lens/09", knowledge.lens[9])):
            logits = torch.from_numpy(small.logits[sample, f"textual/{place}"])
            expected = torch.log_softmax(logits / temperature, 1)
            at = found.at(temperature)
            assert at.ids.shape == (tokens, 6) and at.ids.dtype == torch.int64
            assert at.logprob.dtype == at.log_z.dtype == at.log_tail.dtype == torch.float32
            torch.testing.assert_close(at.logprob.double(), expected.gather(1, at.ids), atol=2e-2, rtol=0)
            torch.testing.assert_close(at.probs().sum(1) + at.tail().sum(1), torch.ones(tokens), atol=1e-2, rtol=0)
            rest = expected.exp().scatter(1, at.ids, 0.0)
            blocks = [rest[:, a:b].sum(1) for a, b in zip(at.block_bounds, at.block_bounds[1:], strict=False)]
            torch.testing.assert_close(at.tail().double(), torch.stack(blocks, 1), atol=1e-2, rtol=0)
            assert at.draws.shape == (tokens, 1, 2) and found.draws.shape == (tokens, 3, 2)
            torch.testing.assert_close(at.at(temperature).logprob, at.logprob)


def test_entries_of_a_mass(store: TeacherStore):
    found = store["ox"].acoustic_top
    assert (found.ids >= 0).sum(1).min() >= 1 and ((found.ids < 0) == (found.logprob == -torch.inf)).all()
    torch.testing.assert_close(found.probs().sum(1) + found.tail().sum(1), torch.ones(4), atol=3e-2, rtol=0)
    assert found.draws is None and "4 tokens" in repr(found)


def test_states_are_of_the_clip(store: TeacherStore, small: Small):
    first, second = store["dog-1"].acoustic, store["cat-2"].acoustic
    assert list(first.hidden) == [3, 28] and first.tokens == 2
    assert first.hidden[28].shape == (2, WIDTH) and first.hidden[28].dtype == torch.float32
    assert torch.equal(first.hidden[28], second.hidden[28])
    assert not torch.equal(first.hidden[28], store["ox"].acoustic.hidden[28])
    assert "2 tokens; hidden of 2 layers" in repr(first) and len(first.lens) == 0
    assert first.attributes["fidelity"]["hidden/28"]["tokens"] == 4


def test_errors_say_what_there_is(store: TeacherStore, tmp_path: Path):
    with pytest.raises(StoreError, match="no sample 'dgo-1'; did you mean 'dog-1'"):
        store["dgo-1"]
    with pytest.raises(StoreError, match="lens of layer 8 is not stored; there is layers 9"):
        store["ox"].textual.lens[8]
    with pytest.raises(StoreError, match="there is none of any layer"):
        store["ox"].textual.hidden[9]
    with pytest.raises(StoreError, match="acoustic holds no distributions, only hidden states of layers 3, 28"):
        _ = store["ox"].acoustic.top
    with pytest.raises(StoreError, match=r"temperature 3.0 is not one of 1, 2, 0.5. Add it to `teachers.temperatures`"):
        store["ox"].textual.top.at(3.0)
    with pytest.raises(StoreError, match="no teacher store here"):
        open_store(tmp_path)
    few = open_store(make_small(tmp_path / "run", sources=["targets"]).folder)
    with pytest.raises(StoreError, match="sample 'ox': textual is not stored; there is targets"):
        _ = few["ox"].textual


def test_damage_is_an_error_that_names_the_sample(tmp_path: Path):
    small = make_small(tmp_path / "run")
    store = open_store(small.folder)
    file = small.folder / "parts" / "textual.zarr" / "top" / "logprob" / "c" / "0" / "0"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(StoreError, match=r"read for sample 'ox'.*kdpipe cache verify"):
        _ = store["ox"].textual.top


def test_the_example_of_the_docs_runs(small: Small, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(small.folder.parent)
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    assert "3 samples" in capsys.readouterr().out
    torch.testing.assert_close(names["mass"], torch.ones(3), atol=1e-2, rtol=0)
    assert names["surprise"].shape == (3,) and names["soft"].temperature == 2.0


def test_opening_is_light(small: Small):
    code = (
        "import sys; import kdpipe.data.store; assert 'numpy' not in sys.modules\n"
        f"store = kdpipe.data.store.open_store({str(small.folder)!r}); list(store)\n"
        "assert not {'torch', 'zarr'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_store_and_its_samples_can_be_pickled(store: TeacherStore):
    """As data loaders that spawn their processes do."""
    again = pickle.loads(pickle.dumps(store))
    assert list(again) == list(store)
    sample = pickle.loads(pickle.dumps(store["ox"]))
    assert torch.equal(sample.target_ids, store["ox"].target_ids)
