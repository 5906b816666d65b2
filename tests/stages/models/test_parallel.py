"""Models shared by two gloo ranks on the CPU, and what happens when one of them ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM, StableLmConfig

from kdpipe.data.errors import KdpipeError, ModelError
from kdpipe.stages.config import ModelConfig, TeachersConfig, TextualTeacherConfig
from kdpipe.stages.miniature.models import save_weights
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import _CLASSES, load_model
from kdpipe.stages.models.parallel import open_teacher, shared

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="transformers shares a model over GPUs where it can")
NAMES = ("teacher", "qwen2_audio", "qwen2_5_omni")


def folder_of(path: Path, dtype: str = "float32") -> ModelFolder:
    return resolve(ModelConfig(str(path), dtype=dtype), path)


def two_headed(source: Path, to: Path) -> Path:
    """A copy of a miniature audio model with two key-value heads, which two ranks can share."""
    shutil.copytree(source, to)
    config = json.loads((to / "config.json").read_text())
    text = config.get("thinker_config", config)["text_config"]
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 192}
    if "thinker_config" in config:
        config["thinker_config"]["audio_config"]["output_dim"] = 128
        config["thinker_config"]["vision_config"]["out_hidden_size"] = 128
    (to / "config.json").write_text(json.dumps(config))
    kind = _CLASSES[config["model_type"]]
    torch.manual_seed(0)
    save_weights(kind(kind.config_class.from_pretrained(to)), to)
    return to


@pytest.fixture(scope="module")
def paths(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("shared")
    tied = base / "tied"
    shutil.copytree(family.teacher, tied)
    config = Qwen3Config.from_pretrained(tied)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tied)
    return {"teacher": family.teacher, "tied": tied} | {
        name: two_headed(getattr(family, name), base / name) for name in NAMES[1:]
    }


def batch_of(folder: ModelFolder, lengths: tuple[tuple[int, str], ...] = ((4000, "yes"), (20000, "no, not at all"))):
    encoder, made = Encoder(folder), []
    for place, (frames, response) in enumerate(lengths):
        clips = [np.random.default_rng(place).normal(0, 0.1, frames).astype(np.float32)] if folder.hears else []
        prompt = encoder.prompt_text(f"Question number {place}?", clips=len(clips))
        ids = encoder.prompt_ids(prompt, [len(clip) for clip in clips])
        made.append(Example(str(place), ids, encoder.target_ids(response), encoder.features(clips)))
    return encoder.collate(made)


def said(loaded, batch: Batch) -> dict[str, torch.Tensor]:
    layers = range(1, len(loaded.layers) + 1)
    with torch.inference_mode(), loaded.capture(layers) as states:
        hidden = loaded.hidden(batch)
        with loaded.capture([2], batch.response_rows) as chosen:
            loaded.hidden(batch)
    made = {"hidden": hidden, "chosen": chosen[2], "head": loaded.head_weight.detach()}
    return made | {f"layer {layer}": state for layer, state in states.items()}


def teachers(**fields) -> TeachersConfig:
    return TeachersConfig(TextualTeacherConfig(ModelConfig("unused")), **fields)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("name", [*NAMES, "tied"])
def test_two_ranks_say_what_one_says(name: str, paths: dict[str, Path]) -> None:
    folder = folder_of(paths[name])
    batch, before = batch_of(folder), children()
    expected = said(load_model(folder, device="cpu"), batch)
    with shared(folder, 2, device="cpu") as loaded:
        assert len(children() - before) == 1
        found = said(loaded, batch)
        small = said(loaded, batch_of(folder, ((3000, "so"),)))
        held = sum(
            (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
            for weight in loaded.layers.parameters()
        )
    assert children() == before and not dist.is_initialized()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    whole = load_model(folder, device="cpu")
    torch.testing.assert_close(small["hidden"], said(whole, batch_of(folder, ((3000, "so"),)))["hidden"])
    assert held < 0.52 * sum(weight.numel() for weight in whole.layers.parameters())


def test_bfloat16_ranks_stay_near_one(paths: dict[str, Path]) -> None:
    folder = folder_of(paths["teacher"], "bfloat16")
    batch = batch_of(folder)
    expected = said(load_model(folder, device="cpu"), batch)["chosen"]
    with open_teacher(folder, teachers(device="cpu", tensor_parallel_size=2)) as loaded:
        found = said(loaded, batch)["chosen"]
    assert found.dtype == torch.bfloat16
    assert float(torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=1).min()) > 0.999


def test_a_model_that_cannot_be_shared_is_refused(family: Miniatures, paths: dict[str, Path], tmp_path: Path) -> None:
    before = children()
    heads = "num_attention_heads is 3, which 2 processes cannot share .*device_map"
    with pytest.raises(ModelError, match=heads), shared(folder_of(family.qwen2_audio), 2, device="cpu"):
        pass
    plain = tmp_path / "plain"
    shutil.copytree(paths["teacher"], plain)
    config = StableLmConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    (plain / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["StableLmForCausalLM"]}))
    no_plan = "no tensor-parallel plan for StableLmForCausalLM.*teachers.device_map: auto"
    with pytest.raises(ModelError, match=no_plan), shared(folder_of(plain), 2, device="cpu"):
        pass
    assert children() == before and not dist.is_initialized()


def test_what_all_ranks_refuse_is_said_once(paths: dict[str, Path], tmp_path: Path) -> None:
    broken, before = tmp_path / "broken", children()
    shutil.copytree(paths["teacher"], broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    told = r"broken lacks 1 weights .*first model\.layers\.3\.mlp\.up_proj\.weight\. Restore the checkpoint\.$"
    with pytest.raises(ModelError, match=told), shared(folder_of(broken), 2, device="cpu"):
        pass
    assert children() == before and not dist.is_initialized()


def test_errors_of_the_caller_end_the_ranks(paths: dict[str, Path]) -> None:
    folder, before = folder_of(paths["teacher"]), children()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with ExitStack() as stack:
        loaded = stack.enter_context(shared(folder, 2, device="cpu"))
        loaded.layers[2].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError), torch.inference_mode():
            loaded.hidden(batch_of(folder))
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert children() == before and not dist.is_initialized()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_ends_or_stalls_is_an_error(stop: signal.Signals, paths: dict[str, Path]) -> None:
    folder, before = folder_of(paths["teacher"]), children()
    batch = batch_of(folder)
    words = "rank 1 .* ended by signal 9" if stop == signal.SIGKILL else "did not answer within 25 s"
    began = time.monotonic()
    with pytest.raises(ModelError, match=words), shared(folder, 2, device="cpu", timeout=25) as loaded:
        expected = said(loaded, batch)
        (rank,) = children() - before
        # In the middle of a pass: the other rank has done the first layers when it is stopped.
        handle = loaded.layers[2].register_forward_hook(lambda *_: os.kill(rank, stop))
        with torch.inference_mode():
            loaded.hidden(batch)
        handle.remove()
        # It may have been ahead; then the next pass notices.
        said(loaded, batch)
    assert expected["hidden"].isfinite().all()
    assert time.monotonic() - began < 150
    assert children() == before and not dist.is_initialized()


SCRIPT = """
import os, sys, time, torch, psutil
from pathlib import Path
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.parallel import shared
from kdpipe.stages.models.ranks import Ranks

held = []
start = Ranks.await_start
Ranks.await_start = lambda ranks: (held.append(ranks), start(ranks))[1]
folder = resolve(ModelConfig(sys.argv[1], dtype="float32"), Path("/"))
with shared(folder, 2, device="cpu", grace=1) as loaded:
    process = held[0].processes[0]
    print(process.pid, flush=True)
    if sys.argv[2] == "hang":
        with held[0].together():
            process.kill()
            time.sleep(300)
    time.sleep(300)
"""


def run_script(path: Path, how: str, tmp_path: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    command = [sys.executable, "-c", SCRIPT, str(path), how]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None
    return running, psutil.Process(int(running.stdout.readline()))


def test_a_pass_that_hangs_for_a_rank_that_ended_ends_the_process(paths: dict[str, Path], tmp_path: Path) -> None:
    running, rank = run_script(paths["teacher"], "hang", tmp_path)
    _, errors = running.communicate(timeout=60)
    assert not list(tmp_path.iterdir())
    assert running.returncode == 2
    assert "Error: " in errors and "rank 1" in errors and "ended by signal 9" in errors
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_ranks_die_with_a_killed_parent(paths: dict[str, Path], tmp_path: Path) -> None:
    running, rank = run_script(paths["teacher"], "wait", tmp_path)
    running.kill()
    running.wait()
    psutil.wait_procs([rank], timeout=20)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_what_a_rank_died_of_is_told(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no room on this device')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = children()
    told = "rank 1 .* ended with status 1: .*no room"
    with pytest.raises(ModelError, match=told), shared(folder_of(paths["teacher"]), 2, device="cpu"):
        pass
    assert children() == before


def test_open_teacher_takes_one_device_where_nothing_else_is_said(paths: dict[str, Path]) -> None:
    before = children()
    with open_teacher(folder_of(paths["teacher"]), teachers(device="cpu")) as loaded:
        assert loaded.device.type == "cpu" and children() == before
    with open_teacher(folder_of(paths["teacher"]), teachers(device_map="auto")) as loaded:
        assert loaded.device.type == "cpu" and children() == before


def test_a_second_process_group_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with (
            pytest.raises(KdpipeError, match="without torchrun"),
            shared(folder_of(paths["teacher"]), 2, device="cpu"),
        ):
            pass
    finally:
        dist.destroy_process_group()
