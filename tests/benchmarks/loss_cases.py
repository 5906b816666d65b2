"""What bench_losses.py measures: inputs, our losses, and those of other projects.

Every case makes the gradients of hidden states and weight of a mean over rows. Where a teacher is `dense`, the product
of its hidden states with its own output head is part of the case, as it is in training with a live teacher.

Shape suffixes: N rows, H width, V vocabulary, K kept entries of a cached teacher.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from kdpipe.stages.train.losses import Distribution, Divergence, Form, TeacherRows, head_terms

TEMPERATURES = (1.0, 2.0)
# Rows of a teacher's logits that are at hand while what a cache keeps of them is picked.
TEACHER_ROWS = 256


@dataclass(frozen=True)
class Settings:
    """Sizes and circumstances of a run; `k` kept entries of a cached teacher, `clock` by which time is taken."""

    rows: int
    width: int
    vocab: int
    k: int
    dtype: str
    device: str
    clock: str
    threads: int
    repeats: int


class Inputs:
    """Seeded tensors, the same in every process; teachers only where asked for."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.hidden_NH = self._normal(settings.rows, seed=0).requires_grad_()
        self.weight_VH = self._normal(settings.vocab, seed=1, scale=3 * settings.width**-0.5).requires_grad_()
        generator = torch.Generator(settings.device).manual_seed(2)
        shape = (settings.rows,)
        self.labels_N = torch.randint(settings.vocab, shape, generator=generator, device=settings.device)

    def _normal(self, rows: int, *, seed: int, scale: float = 1.0) -> torch.Tensor:
        settings = self.settings
        generator = torch.Generator(settings.device).manual_seed(seed)
        shape, dtype = (rows, settings.width), getattr(torch, settings.dtype)
        return torch.randn(shape, generator=generator, device=settings.device, dtype=dtype).mul_(scale)

    def dense_teacher(self, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, H] and output head [V, H] of a teacher of the student's size."""
        seed = 10 + 2 * number
        scale = 3 * self.settings.width**-0.5
        return self._normal(self.settings.rows, seed=seed), self._normal(
            self.settings.vocab, seed=seed + 1, scale=scale
        )

    def cached_teacher(self, number: int = 0) -> Distribution:
        """The k largest entries of that teacher, and its tail, at temperatures 1 and 2."""
        hidden_NH, weight_VH = self.dense_teacher(number)
        parts: list[tuple[torch.Tensor, ...]] = []
        for hidden_nH in hidden_NH.split(TEACHER_ROWS):
            logits_nV = (hidden_nH @ weight_VH.T).float()
            top_nK, ids_nK = logits_nV.topk(self.settings.k)
            log_z_nT = torch.stack([torch.logsumexp(logits_nV / t, 1) for t in TEMPERATURES], 1)
            logits_nV.scatter_(1, ids_nK, -torch.inf)
            left_nT = torch.stack([torch.logsumexp(logits_nV / t, 1) for t in TEMPERATURES], 1)
            parts.append((ids_nK, top_nK - log_z_nT[:, :1], log_z_nT, (left_nT - log_z_nT)[:, :, None]))
        return Distribution(*(torch.cat(column) for column in zip(*parts, strict=True)), temperatures=TEMPERATURES)


Step = Callable[[], float]
"""Forward and backward pass, once; gives the loss."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        key: its name on the command line and in JSON.
        title: whose it is.
        terms: what its loss is made of.
        build: from inputs, the step to be measured.
        form: our form of the output head, None for others.
        cuda: it runs on CUDA only.
    """

    key: str
    title: str
    terms: str
    build: Callable[[Inputs], Step]
    form: Form | None = None
    cuda: bool = False


def _step(inputs: Inputs, loss: Callable[[], torch.Tensor]) -> Step:
    def step() -> float:
        value = loss()
        gradients = torch.autograd.grad(value, (inputs.hidden_NH, inputs.weight_VH))
        assert gradients[1].shape == inputs.weight_VH.shape
        return float(value.detach())

    return step


def _ours(inputs: Inputs, *, form: Form, teachers: int, temperature: float = 1.0) -> Step:
    rows = inputs.settings.rows
    given = [TeacherRows(slice(0, rows), inputs.cached_teacher(n), 1 / rows) for n in range(teachers)]

    def loss() -> torch.Tensor:
        return head_terms(
            inputs.hidden_NH,
            inputs.weight_VH,
            inputs.labels_N,
            given,
            divergence=Divergence("jsd"),
            temperature=temperature,
            label_weight=1 / rows,
            form=form,
        ).loss

    return _step(inputs, loss)


def _materialized_cross_entropy(inputs: Inputs) -> Step:
    return _step(inputs, lambda: F.cross_entropy((inputs.hidden_NH @ inputs.weight_VH.T).float(), inputs.labels_N))


def _products(inputs: Inputs) -> Step:
    """Logits, and the gradients of hidden states and weight from something of their shape; 6 N H V operations."""
    hidden_NH, weight_VH = inputs.hidden_NH.detach(), inputs.weight_VH.detach()
    logits_NV = hidden_NH.new_empty(len(hidden_NH), len(weight_VH))
    grad_hidden_NH, grad_weight_VH = torch.empty_like(hidden_NH), torch.empty_like(weight_VH)

    def step() -> float:
        torch.mm(hidden_NH, weight_VH.T, out=logits_NV)
        torch.mm(logits_NV, weight_VH, out=grad_hidden_NH)
        torch.mm(logits_NV.T, hidden_NH, out=grad_weight_VH)
        return float("nan")

    return step


def _peers() -> ModuleType:
    path = Path(__file__).parents[1] / "stages" / "train" / "losses" / "peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _liger_cross_entropy(inputs: Inputs) -> Step:
    loss = _peers().liger_cross_entropy()()
    return _step(inputs, lambda: loss(inputs.weight_VH, inputs.hidden_NH, inputs.labels_N))


def _liger_jsd(inputs: Inputs) -> Step:
    teacher = inputs.dense_teacher()
    loss = _peers().liger_jsd()(0.5, 0.5, 0.5, compiled=inputs.settings.device == "cuda")
    return _step(inputs, lambda: loss(inputs.hidden_NH, inputs.weight_VH, *teacher, inputs.labels_N))


def _trl_jsd(inputs: Inputs) -> Step:
    hidden_NH, weight_VH = inputs.dense_teacher()
    apply = _peers().trl_divergence().apply
    leaves = (inputs.hidden_NH, inputs.weight_VH)
    return _step(inputs, lambda: apply(*leaves, None, hidden_NH, weight_VH, None, 0.5)[0].mean())


def _torchtune_kl(inputs: Inputs) -> Step:
    hidden_NH, weight_VH = inputs.dense_teacher()
    peers, chunks = _peers(), 8
    divergence = peers.torchtune_divergences().ForwardKLWithChunkedOutputLoss(chunks)
    cross_entropy = peers.torchtune_cross_entropy()(chunks)
    labels_1N = inputs.labels_N[None]

    def loss() -> torch.Tensor:
        student = [part @ inputs.weight_VH.T for part in inputs.hidden_NH[None].chunk(chunks, 1)]
        with torch.no_grad():
            teacher = [part @ weight_VH.T for part in hidden_NH[None].chunk(chunks, 1)]
        return 0.5 * cross_entropy(student, labels_1N) + 0.5 * divergence(student, teacher, labels_1N)

    return _step(inputs, loss)


def _axolotl_topk(inputs: Inputs) -> Step:
    teacher = inputs.cached_teacher()
    log_p_NK = teacher.logprob.log_softmax(1)[None]
    ids_NK, mask_NK = teacher.ids[None], torch.ones_like(teacher.ids)[None]
    loss = _peers().axolotl_topk()(0.5, 0.5, 1.0, 0.5, compiled=inputs.settings.device == "cuda")
    rows, labels_1N = inputs.settings.rows, inputs.labels_N[None]
    leaves = (inputs.weight_VH, inputs.hidden_NH)
    return _step(inputs, lambda: loss(leaves[0], leaves[1][None], ids_NK, log_p_NK, mask_NK, labels_1N) / rows)


_ALONE: tuple[Form, ...] = ("chunked", "in_forward", "triton")
_JOINT: tuple[Form, ...] = (*_ALONE, "reference")

LIMIT = Case("products", "torch.mm", "three products alone", _products)
CASES = (
    *(
        Case(f"ce-{form}", f"kdpipe, {form}", "label", partial(_ours, form=form, teachers=0), form, form == "triton")
        for form in _ALONE
    ),
    *(
        Case(
            f"joint-t{temperature:g}-{form}",
            f"kdpipe, {form}",
            f"label + 2 cached teachers, JSD with tail, T = {temperature:g}",
            partial(_ours, form=form, teachers=2, temperature=temperature),
            form,
            form == "triton",
        )
        for temperature in TEMPERATURES
        for form in _JOINT
    ),
    Case("ce-materialized", "F.cross_entropy", "label, logits in memory", _materialized_cross_entropy),
    Case("liger-ce", "Liger fused linear cross-entropy", "label", _liger_cross_entropy, cuda=True),
    Case("liger-jsd", "Liger fused linear JSD", "label + 1 dense teacher, JSD", _liger_jsd),
    Case("trl-jsd", "TRL chunked divergence", "1 dense teacher, JSD", _trl_jsd),
    Case("torchtune-kl", "torchtune chunked CE + forward KL", "label + 1 dense teacher, KL", _torchtune_kl),
    Case("axolotl-topk", "axolotl fused top-k KL", "label + 1 renormalized top-k, JSD", _axolotl_topk),
    LIMIT,
)
