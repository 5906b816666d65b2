"""The primitive against autograd, its twin, and float64; and that it never holds [N, V]."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses import chunked as chunked_module
from kdpipe.stages.train.losses import linear_logsumexp_gather

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

N, H, V, S = 5, 7, 23, 6
SETTINGS = {
    "plain": {},
    "temperatures": {"temperatures": (1.0, 2.0)},
    "blocks": {"blocks": (0, 3, 11)},
    "masked": {"valid_vocab": 19, "masked_ids": (0, 7, 21)},
    "everything": {
        "temperatures": (2.0, 0.7, 1.0),
        "blocks": (0, 1, 5, 6, 17),
        "valid_vocab": 21,
        "masked_ids": (5, 20),
        "logit_scale": 1.7,
        "softcap": 3.0,
    },
}


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """Several tiles, the last one ragged, also on these small vocabularies."""
    monkeypatch.setattr(chunked_module, "MIN_COLUMNS", 4)


def make(seed=0, dtype=torch.float64, n=N, h=H, v=V, s=S):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(-1, v, (n, s), generator=generator)
    if n and s > 3:
        ids[:, 1] = ids[:, 0] = 4
        ids[0, 2] = -1
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), ids


def outputs(hidden, weight, bias, ids, form="chunked", chunk_bytes=1, **settings):
    return linear_logsumexp_gather(hidden, weight, ids, bias=bias, form=form, chunk_bytes=chunk_bytes, **settings)


def finite(x):
    return torch.where(x.isfinite(), x, 0.0)


def gradients(values, leaves, seed=1):
    """Gradients of a random combination of all finite outputs."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (finite(v) * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype)).sum() for v in values
    )
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_gradcheck(settings):
    hidden, weight, bias, ids = make()

    def run(h, w, b):
        return tuple(finite(x) for x in outputs(h, w, b, ids, **settings))

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("n", "v", "s"), [(5, 23, 6), (1, 22, 1), (33, 64, 9), (3, 24, 0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_equals_reference(settings, n, v, s, with_bias):
    hidden, weight, bias, ids = make(3, n=n, v=v, s=s)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    bias = bias if with_bias else None
    got, want = (outputs(hidden, weight, bias, ids, form, **settings) for form in ("chunked", "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_values_by_hand():
    hidden, weight, _, ids = make(dtype=torch.float32)
    lse, picked = linear_logsumexp_gather(hidden, weight, ids, temperatures=(1.0, 2.0), valid_vocab=20, masked_ids=(4,))
    logits = (hidden.double() @ weight.double().T).detach()
    logits[:, 20:] = logits[:, 4] = -torch.inf
    assert lse.dtype == picked.dtype == torch.float32
    assert lse.shape == (N, 2) and picked.shape == (N, S)
    torch.testing.assert_close(lse.double(), torch.stack([logits.logsumexp(1), (logits / 2).logsumexp(1)], 1))
    for n, s in product(range(N), range(S)):
        token = int(ids[n, s])
        want = 0.0 if token < 0 else float(logits[n, token])
        assert picked[n, s].item() == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_blocks_sum_to_the_whole():
    hidden, weight, _, ids = make()
    whole, _ = linear_logsumexp_gather(hidden, weight, ids, masked_ids=(0, 1, 2))
    blocks, _ = linear_logsumexp_gather(hidden, weight, ids, blocks=(0, 3, 9), masked_ids=(0, 1, 2))
    assert (blocks[:, 0, 0] == -torch.inf).all(), "a block whose ids are all masked is empty"
    torch.testing.assert_close(blocks.logsumexp(2), whole)


def test_left_out_ids_get_no_gradient():
    hidden, weight, bias, _ = make()
    ids = torch.tensor([[-1, 7, 21]]).expand(N, 3)
    _, picked = outputs(hidden, weight, bias, ids, valid_vocab=19, masked_ids=(7,))
    assert picked[0].tolist() == [0.0, -torch.inf, -torch.inf]
    for gradient in torch.autograd.grad(picked.sum(), (hidden, weight, bias)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_no_rows(form):
    hidden, weight, bias, ids = make(n=0)
    lse, picked = outputs(hidden, weight, bias, ids, form, temperatures=(1.0, 2.0), blocks=(0, 5))
    assert lse.shape == (0, 2, 2) and picked.shape == (0, S)
    gradient = torch.autograd.grad(lse.sum() + picked.sum(), (hidden, weight, bias))
    assert gradient[0].shape == (0, H) and (gradient[1] == 0).all() and (gradient[2] == 0).all()


def test_non_contiguous_inputs():
    hidden, weight, bias, ids = make(4)
    spread_hidden = torch.stack([hidden, hidden], 2)[..., 0]
    spread_ids = ids.T.contiguous().T
    assert not spread_hidden.is_contiguous() and not spread_ids.is_contiguous()
    got = outputs(spread_hidden, weight.T.contiguous().T, bias, spread_ids)
    want = outputs(hidden, weight, bias, ids)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    leaves = (hidden, weight, bias)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_far_blocks_do_not_underflow():
    """A block e^-300 below the rest keeps a finite log-sum-exp and its own softmax as gradient."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [1.0], [-300.0], [-301.0]], requires_grad=True)
    ids = torch.full((1, 1), -1)
    lse, _ = linear_logsumexp_gather(hidden, weight, ids, blocks=(0, 2))
    assert lse[0, 0, 1].item() == pytest.approx(-300 + 0.313262, abs=1e-4)
    (gradient,) = torch.autograd.grad(lse[0, 0, 1], weight)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.0, 0.0, 0.731059, 0.268941]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_no_worse_than_naive(dtype):
    """Against the float64 truth of the same inputs, as in apple/ml-cross-entropy's tests."""
    hidden, weight, bias, ids = make(5, dtype=dtype, n=33, h=64, v=301, s=5)
    leaves = (hidden, weight)
    exact_leaves = tuple(x.detach().double().requires_grad_() for x in leaves)

    def loss(lse, picked):
        return (lse[:, 0].double() - picked[:, 0].double()).sum() + picked[:, 1].double().sum()

    truth = outputs(*exact_leaves, bias.detach().double(), ids)
    ours = outputs(*leaves, bias, ids)
    naive_logits = torch.nn.functional.linear(*leaves, bias)
    naive = naive_logits.logsumexp(1, keepdim=True), naive_logits.gather(1, ids.clamp_min(0)) * (ids >= 0)
    for want, got, plain in zip(truth, ours, naive, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - want).abs().max() <= 1e-5
        assert (got.double() - want).abs().max() < (plain.double() - want).abs().max()
    exact = torch.autograd.grad(loss(*truth), exact_leaves)
    for want, got, plain in zip(
        exact, torch.autograd.grad(loss(*ours), leaves), torch.autograd.grad(loss(*naive), leaves), strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= (plain.double() - want).norm()


def test_weight_gradient_is_accumulated_in_float32():
    """Many rows of equal sign: a bfloat16 accumulator would stall at 256."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(8, 1, dtype=torch.bfloat16, requires_grad=True)
    lse, _ = linear_logsumexp_gather(hidden, weight, torch.full((4096, 0), -1))
    (gradient,) = torch.autograd.grad(lse.sum(), weight)
    assert gradient.dtype == torch.bfloat16 and (gradient == 512).all()


def test_autocast_does_not_lower_the_precision():
    hidden, weight, bias, ids = make(6, dtype=torch.float32)
    leaves = (hidden, weight, bias)
    want = outputs(*leaves, ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(*leaves, ids)
        got_gradients = gradients(got, leaves)
    for a, b in zip((*got, *got_gradients), (*want, *gradients(want, leaves)), strict=True):
        assert torch.equal(a, b)


def test_never_holds_rows_by_vocabulary(recorder):
    n, h, v = 64, 8, 4096
    hidden, weight, bias, ids = make(7, dtype=torch.float32, n=n, h=h, v=v)
    tile_bytes = n * 512 * 4
    for form, bound in [("chunked", max(n * 512, v * h)), ("reference", None)]:
        with recorder() as seen:
            lse, picked = outputs(hidden, weight, bias, ids, form, tile_bytes, temperatures=(1.0, 2.0), blocks=(0, 999))
            gradients((lse, picked), (hidden, weight, bias))
        assert seen.largest <= bound if bound else seen.largest >= n * v


def test_frozen_weight_costs_nothing(recorder):
    hidden, weight, _, ids = make(8, n=4, v=16)
    counts = []
    for frozen in (False, True):
        w = weight.detach().requires_grad_(not frozen)
        with recorder() as seen:
            lse, picked = outputs(hidden, w, None, ids, chunk_bytes=2**20)
            (lse.sum() + picked.sum()).backward()
        counts.append(seen.products)
        assert (w.grad is None) == frozen
    assert counts == [4, 3], "logits, logits again, gradient of hidden (, gradient of the weight)"


BAD = {
    "not \\[N, H\\]": {"hidden": torch.zeros(2, 3)},
    "not int64": {"ids": torch.zeros(2, 1, dtype=torch.int32)},
    "ids lie in -2": {"ids": torch.tensor([[0], [-2]])},
    "ids lie in 0..9": {"ids": torch.tensor([[0], [9]])},
    "bias \\(3,\\)": {"bias": torch.zeros(3)},
    "positive numbers": {"temperatures": (1.0, 0.0)},
    "at least one": {"temperatures": ()},
    "valid_vocab 10": {"valid_vocab": 10},
    "ascend from 0": {"blocks": (0, 4, 4)},
    "end below valid_vocab 6": {"blocks": (0, 6), "valid_vocab": 6},
    "masked ids": {"masked_ids": (9,)},
    "every id": {"masked_ids": range(9)},
    "form 'triton' runs on CUDA": {"form": "triton"},
    "form 'in_forward' needs the loss": {"form": "in_forward"},
    "form 'fast' of the output head": {"form": "fast"},
    "softcap 0": {"softcap": 0.0},
    "logit_scale 0": {"logit_scale": 0.0},
    "a sequence of positive": {"temperatures": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4), "ids": torch.zeros(2, 1, dtype=torch.int64)}
    arguments |= BAD[message]
    positional = [arguments.pop(name) for name in ("hidden", "weight", "ids")]
    with pytest.raises(KdpipeError, match=message):
        linear_logsumexp_gather(*positional, **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bfloat16_on_cuda():
    hidden, weight, bias, ids = make(9, dtype=torch.bfloat16, n=65, h=64, v=999)
    leaves = tuple(x.detach().cuda().requires_grad_() for x in (hidden, weight, bias))
    got, want = outputs(*leaves, ids.cuda()), outputs(hidden, weight, bias, ids)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)
    for a, b in zip(gradients([x.cpu() for x in got], leaves), gradients(want, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=2e-2)
