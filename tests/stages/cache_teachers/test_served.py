"""A teacher that vLLM runs: its arithmetic against float64, and vLLM against transformers on the same weights."""

import dataclasses
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.stages.cache_teachers.head import distribution
from kdpipe.stages.cache_teachers.served import Keep, ServedTeacher, distil, serve
from kdpipe.stages.config import LaunchConfig, ModelConfig, TeachersConfig, TextualTeacherConfig
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.inputs import Encoder, Example
from kdpipe.stages.models.loaded import load_model
from kdpipe.stages.models.vocabulary import Alignment, align, load_vocabulary

QWEN = Alignment(151_660, tuple(range(151_644, 151_658)))
QWEN_ROWS = 151_936
FLOOR = 1e-4
"""What a float32 log-softmax over that many rows is off by at most: in nats, and in mass."""
LENGTHS = (
    (1, 1),
    (300, 60),
    (1, 40),
    (50, 1),
    (5, 0),
    (17, 16),
    (15, 17),
    (2, 2),
    *((9 * n % 70 + 1, n) for n in range(20)),
)
"""Tokens of prompt and response."""


def returned(logits, count):
    """What vLLM gives: the likeliest of all ids, by a float32 log-softmax."""
    top = logits.float().log_softmax(1).topk(count, 1)
    return top.indices.numpy(), top.values.double().numpy()


def distilled(logits, keep, count):
    """What is made of the likeliest `count` entries, which must be enough."""
    made = distil(*returned(logits, count), keep)
    assert made is not None
    return made


def truth(logits, alignment, ids):
    """log-probabilities [T, V] over the shared ids and tails [T] beside `ids`, in float64."""
    logits = logits.double().clone()
    logits[:, alignment.valid :] = -torch.inf
    logits[:, list(alignment.masked)] = -torch.inf
    logp = logits.log_softmax(1)
    return logp, logp.scatter(1, torch.from_numpy(ids), -torch.inf).logsumexp(1)


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 12.0])
def test_kept_entries_and_tails_over_a_published_vocabulary(sharpness):
    logits = sharpness * torch.randn(40, QWEN_ROWS, generator=torch.Generator().manual_seed(0))
    keep = Keep.of(QWEN_ROWS, QWEN, 64)
    made = distilled(logits, keep, keep.most)
    logp, log_tail = truth(logits, QWEN, made["ids"])
    assert np.array_equal(made["ids"], logp.topk(64, 1).indices.numpy())
    # Masked ids that are not returned stay in the tail.
    logits[:, QWEN.valid :] = logits[:, list(QWEN.masked)] = -torch.inf
    unmasked = distilled(logits, keep, keep.first)
    np.testing.assert_allclose(unmasked["logprob"], logp.topk(64, 1).values.numpy(), rtol=0, atol=FLOOR)
    np.testing.assert_allclose(np.exp(unmasked["log_tail"][:, 0, 0]), log_tail.exp().numpy(), rtol=0, atol=FLOOR)
    mass = np.exp(made["logprob"].astype(np.float64)).sum(1) + np.exp(made["log_tail"][:, 0, 0].astype(np.float64))
    np.testing.assert_allclose(mass, 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("left", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("k", [1, 16])
def test_the_tail_of_a_sure_teacher_is_known_to_its_floor_and_never_nothing(k, left):
    logits = torch.randn(64, QWEN_ROWS, generator=torch.Generator().manual_seed(1))
    logits[:, 1000 : 1000 + k] = -torch.inf
    others = logits.double().logsumexp(1)
    spread = torch.linspace(0, 2, k).double()
    logits[:, 1000 : 1000 + k] = ((others - np.log(left))[:, None] + spread - spread.logsumexp(0)).float()
    alignment = Alignment(QWEN_ROWS, ())
    keep = Keep.of(QWEN_ROWS, alignment, k)
    made = distilled(logits, keep, keep.first)
    logp, log_tail = truth(logits, alignment, made["ids"])
    tail = np.exp(made["log_tail"][:, 0, 0].astype(np.float64))
    np.testing.assert_allclose(tail, log_tail.exp().numpy(), rtol=0, atol=FLOOR)
    following = logp.topk(k + 1, 1).values[:, -1].exp().numpy()
    assert (tail >= following * (1 - 1e-5)).all()


def test_masked_ids_are_taken_out_on_both_sides():
    logits = torch.randn(9, 100, generator=torch.Generator().manual_seed(2))
    alignment = Alignment(90, (3, 40))
    logits[:, [3, 95]] += 8
    keep = Keep.of(100, alignment, 5)
    made = distilled(logits, keep, 100)
    logp, log_tail = truth(logits, alignment, made["ids"])
    assert not {3, 40} & set(made["ids"].ravel().tolist()) and made["ids"].max() < 90
    assert np.array_equal(made["ids"], logp.topk(5, 1).indices.numpy())
    np.testing.assert_allclose(made["logprob"], logp.topk(5, 1).values.numpy(), atol=1e-5)
    np.testing.assert_allclose(made["log_tail"][:, 0, 0], log_tail.numpy(), atol=1e-5)
    # The two loud ones take two of six places: four shared entries are too few.
    assert distil(*returned(logits, 6), keep) is None
    # With eight they are enough, but the ten masked ids that are not seen could be as likely as the last of them.
    assert distil(*returned(logits, 8), keep) is None
    assert (keep.first, keep.most) == (5 + 1 + 16, 5 + 1 + 16 + 12)
    assert distil(*returned(logits, keep.most), keep) is not None


def test_all_shared_ids_leave_no_tail():
    logits = torch.randn(4, 30)
    keep = Keep.of(30, Alignment(28, (7,)), 1000)
    assert (keep.k, keep.first, keep.most) == (27, 30, 30)
    made = distilled(logits, keep, 30)
    assert (made["log_tail"] == -np.inf).all() and made["ids"].shape == (4, 27)
    np.testing.assert_allclose(np.exp(made["logprob"]).sum(1), 1, atol=1e-6)


def test_only_the_engine_that_is_not_the_default_is_in_the_key(made):
    textual = dataclasses.replace(made.ctx.config.teachers.textual, engine="vllm")
    served = made.again(teachers=made.teachers(textual=textual, serve=LaunchConfig(max_num_seqs=3)))
    assert {source for _, source in served.stale()} == {"textual"}
    serve_alone = made.again(teachers=made.teachers(serve=LaunchConfig(enforce_eager=True, max_num_seqs=3)))
    assert serve_alone.stale() == []


@pytest.fixture(scope="module")
def teacher(family, tmp_path_factory):
    """The miniature Qwen3 with logits far apart and masked ids that are all loud or all quiet, and its alignment."""
    path = tmp_path_factory.mktemp("served") / "teacher"
    shutil.copytree(family.teacher, path)
    rows = resolve(ModelConfig(str(path)), Path("/")).head_rows
    student = load_vocabulary(family.qwen2_5_omni, "student")
    alignment = align(student, load_vocabulary(path, "teacher"), rows, rows)
    weights = load_file(path / "model.safetensors")
    head = 40 * weights["lm_head.weight"]
    head[[*alignment.masked, *range(alignment.valid, rows)]] = 5 * head[0]
    save_file(weights | {"lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
    return resolve(ModelConfig(str(path), dtype="float32"), Path("/")), alignment


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [
        Example(f"x{place}", rng.integers(0, 480, prompt).astype(np.int32), rng.integers(0, 480, response))
        for place, (prompt, response) in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def config(teacher):
    # Sequences longer than `head_chunk` are taken through the model in several steps.
    return TeachersConfig(
        TextualTeacherConfig(teacher[0].settings, engine="vllm"),
        max_length=400,
        head_chunk=32,
        serve=LaunchConfig(max_num_seqs=4, enforce_eager=True, cpu_kv_cache_gib=1),
    )


@pytest.fixture(scope="module")
def reference(teacher, examples):
    """What transformers and `head.distribution` say of each example for any k, and all logits of its positions."""
    folder, alignment = teacher
    encoder, loaded = Encoder(folder), load_model(folder, device="cpu")
    batch = encoder.collate(examples)
    with torch.inference_mode():
        states = loaded.hidden(batch).flatten(0, 1)[batch.response_rows]
        logits = (states @ loaded.head_weight.T).double().numpy()

    def distributions(k):
        settings = {"temperatures": [1.0], "bounds": (0, alignment.valid), "alignment": alignment, "chunk": 1000}
        made = distribution(states, loaded.head_weight.detach(), k=k, **settings)
        arrays = {name: value.numpy() for name, value in made.items()} | {"logits": logits}
        return [{name: v[a:b] for name, v in arrays.items()} for a, b in pairwise(batch.response_offsets)]

    return distributions


def check(given, theirs, keep):
    """Equality within what two float32 forward passes, and a float32 log-softmax, differ by.

    Where masked ids are just too quiet to be seen, they are in the tail, and take as much from the kept ones. Where
    they have nearly all mass, what they leave is known to the rounding of the whole.
    """
    worst, clear, count = {"logprob": 0.0, "tail": 0.0, "other": 0.0}, 0, 0
    for (example, ours), reference in zip(given, theirs, strict=True):
        rows = len(example.target_ids)
        assert {name: (array.dtype, array.shape) for name, array in ours.items()} == {
            "ids": (np.int64, (rows, keep.k)),
            "logprob": (np.float32, (rows, keep.k)),
            "log_z": (np.float32, (rows, 1)),
            "log_tail": (np.float32, (rows, 1, 1)),
        }
        assert not ours["log_z"].any()
        logits = reference["logits"]
        shared = np.logaddexp.reduce(logits[:, keep.is_shared], axis=1)[:, None]
        loud = logits[:, ~keep.is_shared].max(1, keepdims=True)
        masked = keep.masked * np.exp(loud - shared)
        rank = (logits[:, keep.is_shared] > loud).sum(1, keepdims=True)
        is_clear = (masked < 1e-6) | ((rank < keep.first - 8) & (masked > 0.1)) | (keep.first == len(keep.is_shared))
        floor = 5e-7 * (1 + masked)
        # Ids whose logits are closer than the tolerance may have changed places.
        by_id = ours["logprob"] - (np.take_along_axis(logits, ours["ids"], 1) - shared)
        in_order = ours["logprob"] - reference["logprob"]
        tail = np.exp(ours["log_tail"][:, 0]) - np.exp(reference["log_tail"][:, 0])
        logprob = np.maximum(np.abs(by_id), np.abs(in_order))
        worst["logprob"] = max(worst["logprob"], np.where(is_clear, logprob - floor, 0).max(initial=0))
        worst["tail"] = max(worst["tail"], np.where(is_clear, np.abs(tail) - floor, 0).max(initial=0))
        beyond = np.maximum(in_order, -in_order - np.log1p(masked))
        worst["other"] = max(worst["other"], np.where(is_clear, 0, beyond).max(initial=0))
        clear, count = clear + int(is_clear.sum()), count + rows
    print(f"k {keep.k}, {clear} of {count} positions clear, {worst}")
    assert clear > 0.7 * count
    assert worst["logprob"] < 1e-4 and worst["other"] < 1e-4 and worst["tail"] < 5e-6


@pytest.mark.vllm
def test_vllm_says_what_transformers_says(teacher, config, examples, reference, kill_engines):
    (folder, alignment), said = teacher, []
    shared = alignment.valid - len(alignment.masked)
    with serve(folder, config, alignment, k=10**6, say=said.append) as served:
        everything: Any = list(served(iter(examples)))
        assert everything[1][1]["ids"].shape == (60, shared)
        assert all((arrays["log_tail"] == -np.inf).all() for _, arrays in everything)
        masked = set(alignment.masked)
        assert not any(masked & set(arrays["ids"].ravel().tolist()) for _, arrays in everything)
        assert [example.id for example, _ in everything] == [example.id for example in examples]
        check(everything, reference(shared), served.keep)

        few = ServedTeacher(served.engine, Keep.of(folder.head_rows, alignment, 8))
        asked, taken = [], []
        ask = served.engine.ask
        served.engine.ask = lambda prompt, params: (asked.append(params.prompt_logprobs), ask(prompt, params))[1]
        check(list(few(examples)), reference(8), few.keep)
        assert set(asked) == {few.keep.first, few.keep.most}, "some positions have more masked ids than spare entries"

        # Left early: what is in the engine is ended, and at most `capacity` samples were taken ahead.
        begun = few(taken.append(e) or e for e in examples)
        assert [next(begun)[0].id for _ in range(3)] == ["x0", "x1", "x2"]
        begun.close()
        assert len(taken) <= 3 + 1 + served.engine.capacity
        check(list(few(examples[:3])), reference(8)[:3], few.keep)
        assert not said

        # Killed with requests in it: what was given stays given, and the rest follows.
        begun = few(examples)
        first = next(begun)
        kill_engines()
        check([first, *begun], reference(8), few.keep)
        assert re.search(r"died \(signal 9\) with \d samples in it, .* Starting it again \(1 of 16\)", said[0]), said

        with pytest.raises(KdpipeError, match=r"sample long: .*401 tokens"):
            list(few([Example("long", [1] * 300, [1] * 102)]))


@pytest.mark.vllm
def test_an_engine_that_may_not_be_started_again_says_so(teacher, config, examples, kill_engines):
    folder, alignment = teacher
    config = dataclasses.replace(config, serve=dataclasses.replace(config.serve, max_restarts=0))
    # In the dtype of published models, whose output head is widened.
    folder = dataclasses.replace(folder, settings=dataclasses.replace(folder.settings, dtype="bfloat16"))
    with serve(folder, config, alignment, k=8) as served:
        given: Any = served(examples * 3)
        example, arrays = next(given)
        assert example.id == "x0" and np.isfinite(arrays["logprob"]).all()
        kill_engines()
        with pytest.raises(KdpipeError, match=r"the vLLM engine died.*max_restarts is 0.*teachers.serve.max_num_seqs"):
            list(given)


def test_an_example_that_the_engine_dies_of_is_given_back_in_its_place(examples):
    """With an engine that answers in any order; what it refuses is an error."""

    class Backwards:
        capacity, encoder = 3, SimpleNamespace(folder=SimpleNamespace(name="teacher"))

        def __init__(self, reason):
            self.reason, self.asked = reason, []

        def ask(self, prompt, params):
            self.asked.append(str(len(prompt["prompt_token_ids"])))
            return self.asked[-1]

        def finished(self):
            name = self.asked.pop()
            if name == "33":
                return [(name, Rejected(self.reason, "of all reasons"))]
            flat = SimpleNamespace(start_indices=[0] * 400, token_ids=[0, 0, 1, 2], logprobs=[0.0, -0.1, -3.0, -4.0])
            return [(name, SimpleNamespace(prompt_logprobs=flat))]

        def forget(self, names):
            self.asked = [name for name in self.asked if name not in names]

    keep = Keep.of(3, Alignment(3, ()), 3)
    taken = [dataclasses.replace(example, target_ids=np.zeros(1, int)) for example in examples[5:8]]
    taken = [dataclasses.replace(e, prompt_ids=np.zeros(n, int)) for e, n in zip(taken, (5, 32, 9), strict=True)]
    given = list(ServedTeacher(Backwards("engine_died"), keep)(taken))
    assert [example for example, _ in given] == taken
    assert [isinstance(arrays, Rejected) for _, arrays in given] == [False, True, False]
    refusing = Backwards("engine_refused")
    with pytest.raises(KdpipeError, match="sample x6: of all reasons"):
        list(ServedTeacher(refusing, keep)(taken))
    assert refusing.asked == []
