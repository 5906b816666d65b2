"""Where nothing is left out (K = V), our losses are those of PyTorch, Liger, TRL, torchtune and axolotl.

Losses and gradients of hidden states and weight agree to 1e-5 in float32, the gradients relative to their largest
entry. And with bfloat16 inputs ours are no further from the truth than the naive form.

Shape suffixes: N rows, H width, V vocabulary, K kept entries.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdpipe.stages.train.losses import Distribution, Divergence, HeadTerms, TeacherRows, head_terms

_spec = importlib.util.spec_from_file_location("peers", Path(__file__).with_name("peers.py"))
peers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peers)

N, H, V = 37, 24, 601
FORMS = {"reference": None, "chunked": 1, "in_forward": 2 * 5 * V * 4}
"""Forms that run on a CPU, with tile sizes that cut this vocabulary and these rows in several."""

forms = pytest.mark.parametrize("form", FORMS)
betas = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])


def peer(load):
    """What `load` gives; skips where it is not installed."""
    try:
        return load()
    except peers.PeerMissing as missing:
        pytest.skip(str(missing))


@dataclass(frozen=True)
class World:
    """A student, a dense teacher of another width, and labels, some of them absent (-100)."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    teacher_NH: torch.Tensor
    teacher_VH: torch.Tensor
    labels_N: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden_NH, self.weight_VH

    @property
    def student_NV(self) -> torch.Tensor:
        return self.hidden_NH @ self.weight_VH.T

    @property
    def teacher_NV(self) -> torch.Tensor:
        return self.teacher_NH @ self.teacher_VH.T

    @property
    def valid_N(self) -> torch.Tensor:
        return self.labels_N >= 0


@pytest.fixture
def world() -> World:
    return make_world()


def make_world(dtype=torch.float32) -> World:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels_N = torch.randint(V, (N,), generator=generator)
    labels_N[::6] = -100
    return World(
        hidden_NH=normal(N, H).requires_grad_(),
        weight_VH=(0.4 * normal(V, H)).requires_grad_(),
        teacher_NH=normal(N, 16),
        teacher_VH=0.5 * normal(V, 16),
        labels_N=labels_N,
    )


def cached(logits_NV: torch.Tensor, k: int = V) -> Distribution:
    """What a store keeps of a teacher, at temperatures 1 and 2."""
    logits_NV = logits_NV.detach().double()
    top_NK, ids_NK = logits_NV.topk(k)
    rest_NV = logits_NV.scatter(1, ids_NK, -torch.inf)
    log_z_NT = torch.stack([logits_NV.logsumexp(1), (logits_NV / 2).logsumexp(1)], 1)
    tail_NT = torch.stack([rest_NV.logsumexp(1), (rest_NV / 2).logsumexp(1)], 1) - log_z_NT
    return Distribution(
        ids_NK, (top_NK - log_z_NT[:, :1]).float(), log_z_NT.float(), tail_NT[:, :, None].float(), (1.0, 2.0)
    )


def ours(
    world: World,
    divergence: Divergence,
    form: str,
    temperature: float = 1.0,
    soft: float = 1.0,
    hard: float = 0.0,
    masked: bool = False,
    t_squared: bool = False,
) -> HeadTerms:
    """Our terms: means over all rows, or with `masked` over those that have labels."""
    count = int(world.valid_N.sum()) if masked else N
    weights_N = world.valid_N.float() if masked else None
    teacher = TeacherRows(slice(0, N), cached(world.teacher_NV), soft / count, weights_N)
    return head_terms(
        world.hidden_NH,
        world.weight_VH,
        world.labels_N.clamp_min(-1),
        [teacher],
        divergence=divergence,
        temperature=temperature,
        label_weight=hard / count,
        form=form,
        chunk_bytes=FORMS[form],
        t_squared=t_squared,
    )


def generalized_jsd(beta: float) -> Divergence:
    return Divergence("jsd", beta=beta)


def assert_equal(world: World, mine: torch.Tensor, theirs: torch.Tensor, constant: torch.Tensor | float = 0.0) -> None:
    """Loss (but for a `constant` that theirs adds) and gradients to 1e-5."""
    torch.testing.assert_close(mine.detach() + constant, theirs.detach(), rtol=1e-5, atol=1e-5)
    assert_equal_gradients(world, mine, theirs)


def assert_equal_gradients(world: World, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    for got, want in zip(*(torch.autograd.grad(loss, world.leaves) for loss in (mine, theirs)), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-5 * float(want.abs().max()))


@forms
@temperatures
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_torch_kl_div(world, kind, temperature, form):
    terms = ours(world, Divergence(kind), form, temperature)
    log_q, log_p = ((z / temperature).log_softmax(1) for z in (world.student_NV, world.teacher_NV))
    log_a, log_b = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
    assert_equal(world, terms.loss, F.kl_div(log_b, log_a, reduction="batchmean", log_target=True))


@forms
@temperatures
@betas
def test_liger_jsd(world, beta, temperature, form):
    loss = peer(peers.liger_jsd)(0.0, 1.0, beta, temperature=temperature, compiled=False, chunk_size=9)
    theirs = loss(
        world.hidden_NH, world.weight_VH, world.teacher_NH, world.teacher_VH, torch.zeros(N, dtype=torch.long)
    )
    assert_equal(world, ours(world, generalized_jsd(beta), form, temperature).loss, theirs)


@forms
def test_liger_jsd_with_labels_some_of_them_ignored(world, form):
    loss = peer(peers.liger_jsd)(0.3, 0.7, 0.5, compiled=False, chunk_size=9)
    theirs = loss(world.hidden_NH, world.weight_VH, world.teacher_NH, world.teacher_VH, world.labels_N)
    assert_equal(world, ours(world, Divergence("jsd"), form, soft=0.7, hard=0.3, masked=True).loss, theirs)


@forms
@temperatures
@betas
def test_trl_chunked_divergence(world, beta, temperature, form):
    function = peer(peers.trl_divergence)
    theirs_N, entropy_N = function.apply(
        world.hidden_NH, world.weight_VH, None, world.teacher_NH, world.teacher_VH, None, beta, temperature
    )
    terms = ours(world, generalized_jsd(beta), form, temperature)
    torch.testing.assert_close(terms.divergence[0], theirs_N.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.diagnostics[0].student_entropy, entropy_N, rtol=1e-5, atol=1e-5)
    assert_equal(world, terms.loss, theirs_N.mean())


@forms
@pytest.mark.parametrize("kind", ["Forward", "Reverse", "Symmetric"])
def test_torchtune(world, kind, form):
    """Its forward KL leaves out the teacher's entropy, a constant; its gradients are the divergence's."""
    module = peer(peers.torchtune_divergences)
    loss = getattr(module, f"{kind}KLWithChunkedOutputLoss")(num_output_chunks=4)
    student, teacher = (list(z[None].chunk(4, dim=1)) for z in (world.student_NV, world.teacher_NV))
    theirs = loss(student, teacher, torch.zeros(1, N, dtype=torch.long))
    forward, reverse = (ours(world, Divergence(name), form) for name in ("forward_kl", "reverse_kl"))
    entropy = forward.diagnostics[0].teacher_entropy.mean()
    mine, constant = {
        "Forward": (forward.loss, entropy),
        "Reverse": (reverse.loss, 0.0),
        "Symmetric": (0.5 * forward.loss + 0.5 * reverse.loss, 0.5 * entropy),
    }[kind]
    assert_equal(world, mine, theirs, constant)


def axolotl(world: World, beta: float, temperature: float, hard: float, soft: float) -> torch.Tensor:
    """Its fused loss, a sum over tokens; it takes labels before the shift to the next token."""
    loss = peer(peers.axolotl_topk)(hard, soft, temperature, beta, compiled=False, chunk_size=9)
    log_p_NK, ids_NK = (world.teacher_NV / temperature).log_softmax(1).topk(V)
    before = F.pad(world.labels_N, (1, 0))[None, :-1].contiguous()
    assert world.labels_N[-1] == -100, "the shift drops the last label"
    return loss(
        world.weight_VH, world.hidden_NH[None], ids_NK[None], log_p_NK[None], torch.ones_like(ids_NK)[None], before
    )


@forms
@betas
def test_axolotl_topk(world, beta, form):
    theirs = axolotl(world, beta, 1.0, hard=0.4, soft=0.6) / N
    assert_equal(world, ours(world, generalized_jsd(beta), form, soft=0.6, hard=0.4).loss, theirs)


def test_axolotl_at_temperature_2(world):
    """Its loss is multiplied by T^2, its gradients are not; ours takes either, for both."""
    theirs = axolotl(world, 0.0, 2.0, hard=0.0, soft=1.0) / N
    scaled, plain = (ours(world, Divergence("forward_kl"), "chunked", 2.0, t_squared=t) for t in (True, False))
    torch.testing.assert_close(scaled.loss.detach(), theirs.detach(), rtol=1e-5, atol=1e-5)
    assert_equal_gradients(world, plain.loss, theirs)


def joint(world: World, teacher: Distribution, form: str) -> torch.Tensor:
    return head_terms(
        world.hidden_NH,
        world.weight_VH,
        world.labels_N.clamp_min(-1),
        [TeacherRows(slice(0, N), teacher)],
        divergence=Divergence("forward_kl"),
        form=form,
        chunk_bytes=FORMS[form],
    ).loss


def materialized(logits_NV: torch.Tensor, labels_N: torch.Tensor, teacher: Distribution, wide: torch.dtype):
    """Label and forward KL (one tail where entries are missing) from logits at hand, the softmax in `wide`."""
    log_q_NV = logits_NV.log_softmax(1, dtype=wide)
    log_p_NM, log_q_NM = teacher.logprob, log_q_NV.gather(1, teacher.ids)
    if teacher.ids.shape[1] < V:
        rest_N1 = log_q_NV.scatter(1, teacher.ids, -torch.inf).logsumexp(1, keepdim=True)
        log_q_NM = torch.cat([log_q_NM, rest_N1], 1)
        log_p_NM = torch.cat([log_p_NM, teacher.log_tail[:, 0]], 1)
    soft = F.kl_div(log_q_NM, log_p_NM.to(wide), reduction="sum", log_target=True)
    return F.nll_loss(log_q_NV, labels_N, reduction="sum") + soft


@forms
@pytest.mark.parametrize("k", [V, 16])
@pytest.mark.parametrize("softmax", [torch.bfloat16, torch.float32], ids=["softmax_bf16", "softmax_float32"])
def test_bfloat16_is_no_further_from_the_truth_than_the_naive_form(softmax, k, form):
    """As apple/ml-cross-entropy tests its kernels: errors against float64 of the same bfloat16 inputs.

    The naive form rounds logits to bfloat16; its softmax is bfloat16 too, or float32 as under autocast.
    """
    world = make_world(torch.bfloat16)
    teacher = cached(world.teacher_NV.float(), k)
    exact = [leaf.detach().double().requires_grad_() for leaf in world.leaves]
    truth = materialized(exact[0] @ exact[1].T, world.labels_N, teacher, torch.float64)
    naive = materialized(world.student_NV, world.labels_N, teacher, softmax)
    mine = joint(world, teacher, form)

    assert abs(mine.double() - truth) <= abs(naive.double() - truth)
    wants = torch.autograd.grad(truth, exact)
    for want, got, plain in zip(wants, *(torch.autograd.grad(x, world.leaves) for x in (mine, naive)), strict=True):
        assert got.dtype == torch.bfloat16
        errors, errors_naive = (got.double() - want).abs(), (plain.double() - want).abs()
        assert errors.mean() <= errors_naive.mean()
        assert errors.max() <= errors_naive.max()
