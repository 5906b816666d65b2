"""Divergences on outcomes: values, zeros, gradients, the bound, and the accuracy of the student's tail."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses import (
    Divergence,
    cross_entropy,
    forward_kl,
    jsd,
    linear_loss,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    student_outcomes,
    teacher_at_temperature,
    tvd,
)

KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd"),
    Divergence("jsd", 0.1),
    Divergence("jsd", 0.9),
    Divergence("tvd"),
    Divergence("skew_kl"),
    Divergence("skew_reverse_kl", alpha=0.3),
]


def log_probabilities(rows=40, outcomes=9, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, outcomes, generator=generator, dtype=torch.float64)).log_softmax(1)


def kl(log_a, log_b):
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(1)


def test_values_equal_their_definitions():
    log_p, log_q = log_probabilities(), log_probabilities(seed=1)
    torch.testing.assert_close(forward_kl(log_p, log_q), kl(log_p, log_q))
    torch.testing.assert_close(reverse_kl(log_p, log_q), kl(log_q, log_p))
    for beta in (0.1, 0.5, 0.9):
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        want = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        torch.testing.assert_close(jsd(log_p, log_q, beta), want)
    torch.testing.assert_close(tvd(log_p, log_q), (log_p.exp() - log_q.exp()).abs().sum(1) / 2)
    for alpha in (0.0, 0.1, 0.7):
        mixed = (alpha * log_p.exp() + (1 - alpha) * log_q.exp()).log()
        torch.testing.assert_close(skew_kl(log_p, log_q, alpha), kl(log_p, mixed))
        torch.testing.assert_close(skew_reverse_kl(log_q, log_p, alpha), kl(log_p, mixed))


def test_skew_kl_is_bounded_where_the_supports_are_disjoint():
    log_p, log_q = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert float(skew_kl(log_p, log_q, 0.1)) == pytest.approx(-math.log(0.1))
    assert float(skew_reverse_kl(log_p, log_q, 0.1)) == pytest.approx(-math.log(0.1))


def test_jsd_ends_are_the_kl_divergences():
    log_p, log_q = log_probabilities(), log_probabilities(seed=1)
    assert torch.equal(jsd(log_p, log_q, 0.0), forward_kl(log_p, log_q))
    assert torch.equal(jsd(log_p, log_q, 1.0), reverse_kl(log_p, log_q))
    torch.testing.assert_close(jsd(log_p, log_q, 1e-6) / 1e-6, forward_kl(log_p, log_q), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(jsd(log_p, log_q, 1 - 1e-6) / 1e-6, reverse_kl(log_p, log_q), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_gradcheck(divergence):
    log_p = log_probabilities(4)
    logits = log_probabilities(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(log_p, z.log_softmax(1)), logits)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_absent_outcomes_count_for_nothing(divergence):
    """Columns of -inf on both sides change neither value nor gradient."""
    log_p, log_q = log_probabilities(), log_probabilities(seed=1).requires_grad_()
    absent = torch.full((40, 2), -torch.inf, dtype=torch.float64)
    padding = absent.clone().requires_grad_()
    plain = divergence(log_p, log_q)
    padded = divergence(torch.cat([log_p, absent], 1), torch.cat([log_q, padding], 1))
    torch.testing.assert_close(padded, plain)
    got_q, got_padding = torch.autograd.grad(padded.sum(), (log_q, padding))
    torch.testing.assert_close(got_q, torch.autograd.grad(plain.sum(), log_q)[0])
    assert (got_padding == 0).all()


def test_teacher_zeros_that_the_student_has():
    """p = 0 < q, by hand: p = (1/2, 1/2, 0), q = (1/4, 1/4, 1/2)."""
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.25, 0.5]]).log().requires_grad_()
    ln2 = math.log(2)
    m = (0.375, 0.375, 0.25)
    want_jsd = 0.5 * math.log(0.5 / m[0]) + 0.5 * (0.5 * math.log(0.25 / m[0]) + 0.5 * ln2)
    for divergence, want in [(KINDS[0], ln2), (KINDS[2], want_jsd), (KINDS[5], 0.5)]:
        value = divergence(log_p, log_q)
        assert float(value.detach()) == pytest.approx(want, abs=1e-6)
        (gradient,) = torch.autograd.grad(value.sum(), log_q)
        assert gradient.isfinite().all()
    assert float(reverse_kl(log_p, log_q).detach()) == math.inf


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_nothing_left_at_all(divergence):
    log_q = torch.full((3, 4), -torch.inf, requires_grad=True)
    value = divergence(torch.full((3, 4), -torch.inf), log_q)
    (gradient,) = torch.autograd.grad(value.sum(), log_q)
    assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_merging_outcomes_never_raises_a_divergence(divergence):
    """Data processing: k kept entries and the sum of the rest, against all outcomes."""
    log_p, log_q = log_probabilities(200, 50), log_probabilities(200, 50, seed=1)
    full = divergence(log_p, log_q)
    order = log_p.argsort(1, descending=True)
    log_p, log_q = log_p.gather(1, order), log_q.gather(1, order)
    previous = torch.zeros(200, dtype=torch.float64)
    for k in (1, 5, 20, 49):
        merged = [torch.cat([x[:, :k], x[:, k:].logsumexp(1, keepdim=True)], 1) for x in (log_p, log_q)]
        value = divergence(*merged)
        assert (value <= full + 1e-12).all()
        assert (value >= previous - 1e-12).all(), "more entries, a better bound"
        previous = value
    torch.testing.assert_close(previous, full), "a rest of one id is that id"


def test_cross_entropy_and_z_loss():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    label = torch.arange(6)
    lse, picked = logits.logsumexp(1), logits.gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(cross_entropy(picked, lse), F.cross_entropy(logits, label, reduction="none"))
    torch.testing.assert_close(cross_entropy(picked, lse, 0.1), cross_entropy(picked, lse) + 0.1 * lse**2)


def test_teacher_at_temperature():
    logits = 8 * torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    temperatures = (2.0, 1.0, 0.5)
    log_z = torch.stack([(logits / t).logsumexp(1) for t in temperatures], 1)
    logprob = logits.log_softmax(1)[:, :7].clone()
    logprob[0, 3] = -torch.inf
    for t in temperatures:
        got = teacher_at_temperature(logprob, log_z, temperatures, t)
        want = (logits / t).log_softmax(1)[:, :7].clone()
        want[0, 3] = -torch.inf
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(KdpipeError, match=r"temperature 3 is not in the teacher cache, which was made for 2, 1, 0\.5"):
        teacher_at_temperature(logprob, log_z, temperatures, 3.0)


def test_bad_divergence():
    with pytest.raises(KdpipeError, match="'l2' is not one of"):
        Divergence("l2")  # type: ignore[arg-type]
    with pytest.raises(KdpipeError, match="beta 2"):
        Divergence("jsd", 2.0)
    with pytest.raises(KdpipeError, match="alpha 1 "):
        Divergence("skew_kl", alpha=1.0)
    with pytest.raises(KdpipeError, match="call sampled_cross_entropy"):
        Divergence("sampled_ce")(torch.zeros(1, 1), torch.zeros(1, 1))


def student_with_tail(tail, entries, vocabulary=5000, width=16, seed=0):
    """Hidden state and head whose softmax keeps all but about `tail` on ids 0 .. entries - 1; logits around 30."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, :entries] += logits[:, entries:].logsumexp(1) - logits[:, :entries].logsumexp(1)
    logits[:, :entries] += math.log((1 - tail) / tail)
    logits += 30 - logits.max()
    hidden = torch.randn(1, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    weight += (logits - hidden @ weight.T).T * hidden / hidden.square().sum()
    return hidden.float().requires_grad_(), weight.float().requires_grad_()


def outcomes(hidden, weight, entries, form="chunked", value_of=lambda log_q_NM: log_q_NM.sum() * 0):
    """What `value_of` makes of the student's outcomes, with gradients, and the logarithm of its tail."""
    ids = torch.arange(entries)[None]
    there = torch.ones(1, entries, dtype=torch.bool)

    def loss(lse, picked, rows):
        log_q, log_tail = student_outcomes(picked, lse[:, 0], torch.zeros_like(ids), there, there[:, :1], 1.0)
        return value_of(torch.cat([log_q, log_tail], 1)), (log_tail,)

    value, (log_tail,) = linear_loss(hidden, weight, ids, loss, form=form)
    return value, log_tail


@pytest.mark.parametrize("form", ["chunked", "reference", "in_forward"])
@pytest.mark.parametrize("entries", [1, 2, 64])
@pytest.mark.parametrize("tail", [0.5, 1e-2, 1e-4])
def test_student_tail_is_right_to_a_thousandth(tail, entries, form):
    for seed in range(5):
        hidden, weight = student_with_tail(tail, entries, seed=seed)
        logits = hidden.detach().double() @ weight.detach().double().T
        want = logits[:, entries:].logsumexp(1) - logits.logsumexp(1)
        _, log_tail = outcomes(hidden, weight, entries, form)
        assert float((log_tail[:, 0].detach().double() - want).abs()) < 1e-3


@pytest.mark.parametrize("form", ["chunked", "in_forward"])
@pytest.mark.parametrize("teacher_tail", [1e-7, 0.3])
@pytest.mark.parametrize("student_tail", [1e-4, 1e-7, 1e-12])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_small_student_tails_stay_finite(divergence, student_tail, teacher_tail, form):
    """The tail's part of the gradient is bounded: for forward KL by the teacher's tail mass, everywhere."""
    hidden, weight = student_with_tail(student_tail, 64)
    log_p = torch.cat([torch.full((1, 64), (1 - teacher_tail) / 64), torch.tensor([[teacher_tail]])], 1).log()
    value, _ = outcomes(hidden, weight, 64, form, lambda log_q: divergence(log_p, log_q).sum())
    value.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert value.isfinite().all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    # dL/dW = dL/dz h^T, so that dL/dz can be read off.
    logits = (weight.grad @ hidden.detach().T / hidden.detach().square().sum()).T
    if divergence.kind == "forward_kl":
        kept_part = (1 - teacher_tail) * (hidden.detach().double() @ weight.detach().double().T).softmax(1)
        kept_part[:, :64] -= log_p[:, :64].exp()
        tail_part = logits - kept_part
        assert float(tail_part[:, :64].abs().max()) <= teacher_tail + 1e-6
        assert float(tail_part[:, 64:].abs().sum()) <= teacher_tail + 1e-6
        if teacher_tail > 0.1:
            assert (logits[:, 64:] <= 0).all(), "descent raises what the teacher has more of"
    else:
        assert float(logits.abs().max()) <= 50
