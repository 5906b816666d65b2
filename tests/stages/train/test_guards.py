"""Steps that cannot be done: what is said of them, what may be skipped, and what is kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from kdpipe.stages.train import loop
from kdpipe.stages.train.data import GlobalBatch
from kdpipe.stages.train.guards import DoesNotFit, NotFinite, StepFailed, out_of_memory
from kdpipe.stages.train.losses import Distribution, Divergence, TeacherRows, head_terms
from kdpipe.stages.train.objective import MicroBatch, Objective, Sums

ALL = "all + acoustic + SFT"
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.set_num_threads(2)


def _poison(patch: pytest.MonkeyPatch, calls: set[int], what: Any) -> list[tuple[str, ...]]:
    """Lets `what` spoil the sums of chosen forward passes, counted from 1; returns the samples of every pass."""
    true = Objective.__call__
    seen: list[tuple[str, ...]] = []

    def poisoned(self: Objective, micro: MicroBatch, factors: dict[str, float]) -> Sums:
        sums = true(self, micro, factors)
        seen.append(micro.batch.ids)
        return what(sums) if len(seen) in calls else sums

    patch.setattr(Objective, "__call__", poisoned)
    return seen


def _nan_loss(sums: Sums) -> Sums:
    return dataclasses.replace(sums, loss=sums.loss * float("nan"))


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        return given[0] * float("inf")


def _infinite_gradient(sums: Sums) -> Sums:
    return dataclasses.replace(sums, loss=_InfiniteGradient.apply(sums.loss))


ONE_PASS = {"micro_batch_tokens": 100_000, "checkpoint_steps": 100, "epochs": 3}


@pytest.mark.parametrize(("spoil", "said"), [(_nan_loss, "the loss is nan"), (_infinite_gradient, "the gradient norm")])
def test_a_step_within_the_budget_is_skipped_and_written_down(cached: Any, spoil: Any, said: str) -> None:
    run = cached("SFT only").elsewhere(f"skip-{spoil.__name__}", skip_nonfinite=2)
    before: list[dict[str, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        seen = _poison(patch, {3}, spoil)
        true = loop.train_step

        def watched(objective: Any, weights: Any, optimizer: Any, batch: Any, number: int, world: Any) -> Any:
            before.append({name: weight.detach().clone() for name, weight in optimizer.weights.items()})
            return true(objective, weights, optimizer, batch, number, world)

        patch.setattr(loop, "train_step", watched)
        metrics = run.train(**ONE_PASS)
    line = metrics[2]
    assert [entry["step"] for entry in metrics] == list(range(1, len(metrics) + 1)) and len(metrics) >= 4
    assert line["loss"] is None and line["skipped"].startswith(said) and line["samples"] == list(seen[2])
    assert line["epoch"] in (1, 2)
    assert all(torch.equal(value, before[3][name]) for name, value in before[2].items()), "no optimizer step"
    assert any(not torch.equal(value, before[4][name]) for name, value in before[3].items())
    assert any(
        text.startswith(f"train: step 3 skipped: {said}") and "(1 of train.skip_nonfinite = 2)" in text
        for text in run.said
    )
    unspoiled = cached("SFT only").elsewhere(f"whole-{spoil.__name__}").train(**ONE_PASS)
    assert [e["learning_rate"] for e in metrics[3:]] == [e["learning_rate"] for e in unspoiled[3:]], (
        "the schedule goes on"
    )
    card = (run.student / "README.md").read_text()
    assert "1 of them skipped because loss or gradient was not finite (step 3)" in card


def test_beyond_the_budget_the_run_stops_keeps_its_steps_and_remembers_what_was_skipped(cached: Any) -> None:
    run = cached("SFT only").elsewhere("budget", skip_nonfinite=1)
    with pytest.MonkeyPatch.context() as patch:
        seen = _poison(patch, {2, 4}, _nan_loss)
        with pytest.raises(NotFinite, match="the loss is nan in step 4") as caught:
            run.train(**ONE_PASS)
    assert f"samples {', '.join(seen[3])}." in str(caught.value) and "train.skip_nonfinite" in str(caught.value)
    kept = [path.name for path in (run.ctx.folder("train") / "checkpoints").iterdir()]
    assert kept == ["step-000003"], "the steps before are kept, though no checkpoint was due"
    with pytest.MonkeyPatch.context() as patch:
        _poison(patch, {1}, _nan_loss)
        with pytest.raises(NotFinite, match="in step 4"):
            run.train()
    assert "train: goes on after step 3" in run.said, "the budget of step 2 was used before the resume"
    metrics = run.train(skip_nonfinite=2)
    assert [entry["step"] for entry in metrics if "skipped" in entry] == [2], "a larger budget makes nothing stale"
    assert run.student.exists()


def test_a_failed_step_is_as_if_never_tried(cached: Any) -> None:
    whole, broken = (cached(ALL).elsewhere(name) for name in ("untried", "tried"))
    whole.train(**ONE_PASS)

    def drawing(sums: Sums) -> Sums:
        torch.rand(7)
        return _nan_loss(sums)

    with pytest.MonkeyPatch.context() as patch:
        _poison(patch, {3}, drawing)
        with pytest.raises(NotFinite):
            broken.train(**ONE_PASS)
    broken.train()
    assert (broken.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def _starve(patch: pytest.MonkeyPatch, calls: set[int], error: Exception) -> None:
    """Lets the allocation of chosen MLPs' outputs fail, as it would within the forward pass."""
    true, count = torch.nn.functional.silu, [0]

    def starved(*args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] in calls:
            raise error
        return true(*args, **kwargs)

    patch.setattr(torch.nn.functional, "silu", starved)


@pytest.mark.parametrize("error", [RuntimeError(CPU_SAYS), torch.OutOfMemoryError("CUDA out of memory. Tried to")])
def test_a_micro_batch_without_memory_is_described_and_nothing_is_lost(cached: Any, error: Exception) -> None:
    name = type(error).__name__
    whole, broken = (cached(ALL).elsewhere(f"{label}-{name}", checkpoint_steps=100) for label in ("fits", "starves"))
    whole.train()
    with pytest.MonkeyPatch.context() as patch:
        seen: list[MicroBatch] = []
        true = Objective.__call__

        def watched(self: Objective, micro: MicroBatch, factors: dict[str, float]) -> Sums:
            seen.append(micro)
            return true(self, micro, factors)

        patch.setattr(Objective, "__call__", watched)
        _starve(patch, {27}, error)  # four layers: in the seventh micro-batch
        with pytest.raises(DoesNotFit) as caught:
            broken.train()
    text, batch = str(caught.value), seen[-1].batch
    assert len(seen) == 7
    rows, longest = batch.input_ids.shape
    assert f"{rows} sequences padded to {longest} tokens, {rows * longest} tokens in all" in text
    for sample, length in zip(batch.ids, batch.attention_mask.sum(1).tolist(), strict=True):
        assert f"{sample} ({length} tokens, " in text
    assert str(error).splitlines()[0].rstrip(".") in text and "Peak " in text and " GB" in text
    for remedy in ("micro_batch_tokens", "train.gradient_checkpointing", "train.freeze"):
        assert remedy in text
    trace = caught.value.__context__.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    assert trace.tb_frame.f_code.co_name == "starved" and not trace.tb_frame.f_locals, "tensors of the pass are let go"
    step = int(text.split(" in step ")[1].split(":")[0])
    kept = [path.name for path in (broken.ctx.folder("train") / "checkpoints").iterdir()]
    assert step > 1 and kept == [f"step-{step - 1:06d}"]
    broken.train(micro_batch_tokens=300)
    assert f"train: goes on after step {step - 1}" in broken.said
    assert (broken.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()


def test_a_sample_alone_gets_another_remedy(cached: Any) -> None:
    run = cached("SFT only").elsewhere("alone", micro_batch_tokens=1)
    with pytest.MonkeyPatch.context() as patch:
        _starve(patch, {1}, MemoryError())
        with pytest.raises(DoesNotFit, match="It is one sample alone, so a lower train"):
            run.train()
    assert not (run.ctx.folder("train") / "checkpoints").exists(), "there was no step to keep"


def test_other_errors_pass_as_they_are(cached: Any) -> None:
    run = cached("SFT only").elsewhere("other")
    with pytest.MonkeyPatch.context() as patch:
        _starve(patch, {1}, RuntimeError("size mismatch"))
        with pytest.raises(RuntimeError, match="size mismatch") as caught:
            run.train()
    assert not isinstance(caught.value, StepFailed)


def test_what_torch_says_today_when_the_cpu_has_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shape mismatch")) and out_of_memory(MemoryError())


class _Recorder:
    """An optimizer that only looks."""

    def __init__(self) -> None:
        self.replicated: list[Any] = []

    def step(self, number: int) -> tuple[float, float]:
        return 1.0, 0.0


def _silent(micro: MicroBatch) -> MicroBatch:
    """The same sequences without any response token."""
    none = torch.zeros(0, dtype=torch.int64)
    batch = dataclasses.replace(
        micro.batch, targets=none, response_rows=none, response_offsets=(0,) * len(micro.batch.response_offsets)
    )
    empty = {layer: _rows(given, 0) for layer, given in micro.textual.items()}
    top = None if micro.acoustic_top is None else _rows(micro.acoustic_top, 0)
    states = {layer: _no_states(given) for layer, given in micro.textual_states.items()}
    return dataclasses.replace(micro, batch=batch, textual=empty, acoustic_top=top, textual_states=states)


def _rows(given: Distribution, count: int) -> Distribution:
    return given.of_rows(slice(0, count))


def _no_states(given: Any) -> Any:
    cut = {
        field.name: value[:0]
        for field in dataclasses.fields(given)
        if field.name in ("codes", "scale") and isinstance(value := getattr(given, field.name), torch.Tensor)
    }
    return dataclasses.replace(given, **cut)


@pytest.mark.parametrize("setting", [ALL, "hidden + acoustic top + SFT"])
@pytest.mark.parametrize("form", ["reference", "chunked", "in_forward"])
def test_a_micro_batch_without_response_tokens_adds_nothing(cached: Any, setting: str, form: str) -> None:
    run = cached(setting).elsewhere(f"silent-{form}", head_form=form, micro_batch_tokens=100_000)
    done: list[bool] = []

    def compare(objective: Any, weights: Any, optimizer: Any, batch: GlobalBatch, number: int, world: Any) -> Any:
        micro = batch.micros[0]
        factors = {name: weight / batch.response_tokens for name, weight in weights.of(micro.batch.ids[0]).items()}
        factors.pop("acoustic", None)
        model = objective._student.model
        made = objective(_silent(micro), factors)
        assert float(made.loss.detach()) == 0 and all(float(made.terms[name]) == 0 for name in factors)
        made.loss.backward()
        gradients = [p.grad for p in (*model.parameters(), *objective.projections.parameters()) if p.grad is not None]
        assert gradients and all(float(grad.abs().max()) == 0 for grad in gradients)
        alone = true(objective, weights, _Recorder(), batch, number, world)
        silent = dataclasses.replace(batch, micros=(_silent(micro), micro), audio_tokens=2 * batch.audio_tokens)
        both = true(objective, weights, _Recorder(), silent, number, world)
        assert both.loss == pytest.approx(alone.loss, rel=1e-6) and math.isfinite(both.loss)
        nothing = dataclasses.replace(batch, micros=(_silent(micro),), response_tokens=0)
        assert math.isfinite(true(objective, weights, _Recorder(), nothing, number, world).loss)
        done.append(True)
        raise NotFinite("enough", number, [])

    true = loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", compare)
        with pytest.raises(NotFinite, match="enough"):
            run.train()
    assert done


@pytest.mark.parametrize("form", ["reference", "chunked", "in_forward"])
@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl", "tvd"])
def test_tokens_that_are_masked_or_of_weight_zero_add_nothing(form: Any, kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, generator=generator, requires_grad=True)
    weight = torch.randn(40, 8, generator=generator, requires_grad=True)
    teacher = Distribution(
        torch.tensor([[1, 5, 7]] * 3),
        torch.log(torch.tensor([[0.5, 0.3, 0.1]] * 3)),
        torch.zeros(3, 1),
        torch.log(torch.full((3, 1, 1), 0.1)),
        (1.0,),
    )
    zero = torch.zeros(3)
    for labels in (torch.tensor([-1, -1, -1]), torch.tensor([2, 39, 3])):
        # 39 is a masked id: its cross-entropy is infinite, and a weight of zero must take it out.
        made = head_terms(
            hidden,
            weight,
            labels,
            [TeacherRows(slice(0, 3), teacher, 1.0, zero)],
            divergence=Divergence(kind),
            label_weight=1.0,
            label_token_weights=None if bool((labels < 0).all()) else zero,
            masked_ids=(39,),
            form=form,
        )
        assert float(made.loss.detach()) == 0
        hidden.grad = weight.grad = None
        made.loss.backward()
        for leaf in (hidden, weight):
            assert leaf.grad is not None and float(leaf.grad.abs().max()) == 0
