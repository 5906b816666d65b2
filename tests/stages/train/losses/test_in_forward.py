"""Gradients made in the forward pass: those of the materialized form, and no more memory than was said."""

from __future__ import annotations

import pytest
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses import choose_form, linear_loss

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

SETTINGS = {
    "plain": {},
    "temperatures": {"temperatures": (1.0, 2.0)},
    "blocks": {"blocks": (0, 3, 11)},
    "masked": {"valid_vocab": 19, "masked_ids": (0, 7, 21)},
    "a masked block": {"blocks": (0, 3, 9), "masked_ids": (0, 1, 2)},
    "everything": {
        "temperatures": (2.0, 0.7, 1.0),
        "blocks": (0, 1, 5, 6, 17),
        "valid_vocab": 21,
        "masked_ids": (5, 20),
        "logit_scale": 1.7,
        "softcap": 3.0,
    },
}


def make(n=7, h=6, v=23, s=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, h), (v, h), (v,))]
    ids = torch.randint(-1, v, (n, s), generator=generator)
    if n and s > 3:
        ids[:, 1] = ids[:, 0] = 4
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], ids


def curved(seed=1):
    """A loss of all outputs that is not linear in them, and some outputs of its own."""

    def loss(lse, picked, rows):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(1000, *lse.shape[1:], generator=generator, dtype=torch.float64)[rows]
        lse = torch.where(lse > -torch.inf, lse, 0.0)
        picked = torch.where(picked > -torch.inf, picked, 0.0).double()
        per_row = (weights * lse.square()).flatten(1).sum(1) + (lse.flatten(1).sum(1)) * picked.tanh().sum(1)
        return per_row.sum(), (per_row, torch.arange(1000)[rows])

    return loss


def run(leaves, ids, form="in_forward", **settings):
    return linear_loss(leaves[0], leaves[1], ids, curved(), bias=leaves[2], form=form, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("n", "v", "s"), [(7, 23, 6), (1, 22, 1), (33, 64, 9), (3, 24, 0)])
@pytest.mark.parametrize("tile", [1, 3 * 23 * 8 * 4, None])
def test_equals_reference(settings, n, v, s, tile):
    leaves, ids = make(n, v=v, s=s)
    want, (rows_want, _) = run(leaves, ids, "reference", **settings)
    for form in ("in_forward", "chunked"):
        got, (rows_got, numbers) = run(leaves, ids, form, chunk_bytes=tile, **settings)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(rows_got, rows_want)
        assert numbers.tolist() == list(range(n)) and not rows_got.requires_grad
        wanted = torch.autograd.grad(2 * want, leaves, retain_graph=True)
        for a, b in zip(torch.autograd.grad(2 * got, leaves), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_gradcheck(settings):
    leaves, ids = make(5)

    def value(*given):
        return run(given, ids, chunk_bytes=2 * 23 * 8 * 4, **settings)[0]

    assert torch.autograd.gradcheck(value, leaves)


def test_no_rows_and_nothing_to_differentiate():
    leaves, ids = make(0)
    value, (rows, _) = run(leaves, ids, temperatures=(1.0, 2.0), blocks=(0, 5))
    assert float(value.detach()) == 0 and rows.shape == (0,)
    gradients = torch.autograd.grad(value, leaves)
    assert gradients[0].shape == (0, 6) and all((g == 0).all() for g in gradients)
    leaves, ids = make()
    with torch.no_grad():
        value, _ = run(leaves, ids)
    assert not value.requires_grad
    torch.testing.assert_close(value, run(leaves, ids, "reference")[0].detach())


def test_without_gradients_none_are_made(recorder):
    leaves, ids = make()
    with torch.no_grad(), recorder() as seen:
        run(leaves, ids)
    assert seen.products == 1


def test_a_factor_is_not_rounded_to_the_gradient():
    """(loss / 3).backward() in bfloat16: as exact as the other forms, within one rounding more."""
    leaves, ids = make(dtype=torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = torch.autograd.grad(run(exact, ids, "reference")[0] / 3, exact)
    got = torch.autograd.grad(run(leaves, ids)[0] / 3, leaves)
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 4e-3


def test_a_loss_that_is_constant_has_gradient_zero():
    leaves, ids = make()
    value, _ = linear_loss(
        leaves[0], leaves[1], ids, lambda lse, picked, rows: (torch.zeros(()), ()), form="in_forward"
    )
    assert all((g == 0).all() for g in torch.autograd.grad(value, leaves[:2]))


def test_far_blocks_do_not_underflow():
    """A block e^-300 below the rest keeps a finite log-sum-exp and its own softmax as gradient."""
    weight = torch.tensor([[0.0], [1.0], [-300.0], [-301.0]], requires_grad=True)
    ids = torch.full((1, 1), -1)
    seen = []

    def loss(lse, picked, rows):
        seen.append(lse.detach())
        return lse[0, 0, 1], ()

    value, _ = linear_loss(torch.tensor([[1.0]]), weight, ids, loss, blocks=(0, 2), form="in_forward")
    assert float(seen[0][0, 0, 1]) == pytest.approx(-300 + 0.313262, abs=1e-4)
    (gradient,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.0, 0.0, 0.731059, 0.268941]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_no_worse_than_naive(dtype):
    leaves, ids = make(33, 64, 301, 5, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def loss(lse, picked, rows):
        return (lse[:, 0, 0] - picked[:, 0].double()).sum() + picked[:, 1].double().sum(), ()

    def whole(form, given):
        return linear_loss(given[0], given[1], ids, loss, bias=given[2], form=form, chunk_bytes=8 * 301 * 4)[0]

    truth, ours = whole("reference", exact), whole("in_forward", leaves)
    naive = torch.nn.functional.linear(*leaves)
    there = ids >= 0
    taken = naive.gather(1, ids.clamp_min(0)) * there
    plain = (naive.logsumexp(1) - taken[:, 0]).sum() + taken[:, 1].sum()
    assert abs(float((ours - truth).detach())) <= 1e-3 < abs(float((plain - truth).detach()))
    each = ((truth, exact), (ours, leaves), (plain, leaves))
    for want, got, other in zip(*(torch.autograd.grad(x, y[:2]) for x, y in each), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= (other.double() - want).norm()


def test_weight_gradient_is_accumulated_in_float32():
    """Many rows of equal sign, a tile a row: a bfloat16 accumulator would stall at 256."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(8, 1, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((4096, 0), -1)
    value, _ = linear_loss(hidden, weight, ids, lambda lse, p, rows: (lse.sum(), ()), form="in_forward", chunk_bytes=1)
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.dtype == torch.bfloat16 and (gradient == 512).all()


def test_never_holds_more_than_the_stated_tile(recorder):
    n, h, v = 64, 8, 4096
    leaves, ids = make(n, h, v, dtype=torch.float32)
    rows = 5
    with recorder() as seen:
        value, _ = run(leaves, ids, chunk_bytes=rows * v * 4 * 2, temperatures=(1.0, 2.0), blocks=(0, 999))
        torch.autograd.grad(value, leaves)
    assert v * h < n * v and seen.largest <= max(rows * v, v * h)


def test_three_products_and_two_with_a_frozen_weight(recorder):
    leaves, ids = make(4, v=16)
    for frozen, products in ((False, 3), (True, 2)):
        weight = leaves[1].detach().requires_grad_(not frozen)
        with recorder() as seen:
            linear_loss(leaves[0], weight, ids, curved(), form="in_forward")[0].backward()
        assert seen.products == products and (weight.grad is None) == frozen


def test_the_automatic_choice():
    def choice(weight, with_loss=True, form="auto"):
        return choose_form(form, weight, weight, with_loss=with_loss)

    wide, narrow = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    assert choice(wide) == "in_forward" and choice(wide, with_loss=False) == "chunked"
    assert choice(narrow) == "chunked" and choice(narrow.detach()) == "in_forward"
    assert choice(wide, form="reference") == "reference"
    with pytest.raises(KdpipeError, match="not one of auto"):
        choice(wide, form="fast")
