"""The Triton form against float64, on a CUDA device or under `TRITON_INTERPRET=1`; run by test_triton.py."""

from __future__ import annotations

import os

import pytest
import torch

from kdpipe.stages.train.losses import Distribution, Divergence, TeacherRows, head_terms, linear_logsumexp_gather
from kdpipe.stages.train.losses import chunked as chunked_module

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# bfloat16 products give garbage in Triton's interpreter; the kernels see float32 tiles whatever the operands are.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SETTINGS = {
    "plain": {},
    "temperatures": {"temperatures": (1.0, 2.0, 0.7)},
    "blocks": {"temperatures": (2.0, 1.0), "blocks": (0, 3, 11)},
    "masked": {"valid_vocab": 19, "masked_ids": (0, 7, 21)},
    "a masked block": {"blocks": (0, 3, 9), "masked_ids": (0, 1, 2)},
    "everything": {
        "temperatures": (2.0, 0.7),
        "blocks": (0, 1, 5, 6, 17),
        "valid_vocab": 20,
        "masked_ids": (5, 21),
        "logit_scale": 1.7,
        "softcap": 3.0,
    },
}


@pytest.fixture(autouse=True)
def odd_tiles(monkeypatch):
    """Several tiles on small vocabularies, and buffers that nobody wrote read as NaN."""
    monkeypatch.setattr(chunked_module, "MIN_COLUMNS", 9)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", poisoned)


def make(n, h, v, s, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, h), (v, h), (v,)))
    ids = torch.randint(-1, v, (n, s), generator=generator)
    if n and s > 3:
        ids[:, 1] = ids[:, 0] = ids[:, 3] = 4
    return [x.to(DEVICE).requires_grad_() for x in (hidden, weight, bias)], ids.to(DEVICE)


def finite(x):
    return torch.where(x.isfinite(), x, 0.0)


def gradients(values, leaves):
    generator = torch.Generator().manual_seed(1)
    loss = sum((finite(v) * torch.randn(v.shape, generator=generator).to(v)).sum() for v in values)
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("n", "v", "s"), [(5, 23, 6), (1, 22, 1), (2, 2061, 131), (2, 24, 0), (0, 23, 2)])
def test_equals_float64(settings, n, v, s, dtype):
    leaves, ids = make(n, 6, v, s, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wide = 4 * n * 1500 if v > 1500 else 1  # columns of a tile: beyond one step of a program, or fewer than the blocks'
    got = linear_logsumexp_gather(*leaves[:2], ids, bias=leaves[2], form="triton", chunk_bytes=wide, **settings)
    want = linear_logsumexp_gather(*exact[:2], ids, bias=exact[2], form="reference", **settings)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3 if dtype == torch.float16 else 3e-2
    for a, b in zip(gradients(got, leaves), gradients(want, exact), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_frozen_weight_and_non_contiguous_inputs():
    (hidden, weight, _), ids = make(5, 6, 23, 6, torch.float32)
    spread = [torch.stack([x, x], 2)[..., 0] for x in (hidden, weight.detach())]
    assert not any(x.is_contiguous() for x in spread)
    got = linear_logsumexp_gather(*spread, ids.T.contiguous().T, form="triton", chunk_bytes=1)
    want = linear_logsumexp_gather(hidden, weight.detach(), ids, form="reference")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, [hidden]), gradients(want, [hidden]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_small_tails(temperature):
    """What the kept ids leave of a confident student, to 1e-3 down to a tail of 1e-4; 0.7 is no float32 number."""
    generator = torch.Generator().manual_seed(0)
    for tail in (1e-2, 3e-3, 1e-3, 1e-4):
        logits = torch.randn(8, 400, generator=generator, dtype=torch.float64)
        logits[:, :3] += 30
        logits[:, 3:] += 30 + torch.tensor(tail / 397 * 3).log()
        hidden = torch.eye(8, device=DEVICE)
        weight = logits.T.float().contiguous().to(DEVICE)
        ids = torch.arange(3, device=DEVICE).expand(8, 3).contiguous()
        settings = {"temperatures": (temperature,), "lse_dtype": torch.float64, "form": "triton"}
        lse, picked = linear_logsumexp_gather(hidden, weight, ids, **settings)
        got = 1 - (picked.double() / temperature - lse).exp().sum(1)
        p = (weight.double().T / temperature).softmax(1)
        torch.testing.assert_close(got, p[:, 3:].sum(1), rtol=1e-3, atol=5e-8)


def test_a_bias_that_is_not_dense():
    (hidden, weight, bias), ids = make(3, 6, 23, 4, torch.float32)
    spread = torch.stack([bias.detach(), bias.detach() + 9], 1)[:, 0]
    for given in (spread, torch.tensor([1.5], device=DEVICE).expand(23)):
        assert not given.is_contiguous()
        got, want = (
            linear_logsumexp_gather(hidden, weight, ids, bias=given, form=form, chunk_bytes=1)
            for form in ("triton", "reference")
        )
        torch.testing.assert_close(got, want)


def test_backward_twice_and_ids_that_change_in_between():
    (hidden, weight, _), ids = make(3, 6, 23, 4, torch.float32)
    results = []
    for form in ("triton", "reference"):
        own = ids.clone()
        lse, picked = linear_logsumexp_gather(hidden, weight, own, form=form, chunk_bytes=1)
        if form == "triton":
            own.fill_(0)
        slope = torch.ones_like(picked)
        grads = []
        for _ in range(2):
            grads += torch.autograd.grad(
                [lse, picked], [hidden, weight], [torch.ones_like(lse), slope], retain_graph=True
            )
            slope.mul_(-3)
        results.append(grads)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_joint_loss(temperature):
    """Label and two teachers with tails in blocks: as the materialized form in float64."""
    (hidden, weight, _), _ = make(6, 8, 61, 0, torch.float32, seed=3)
    labels = torch.arange(6, device=DEVICE) * 3
    blocks = (0, 4, 20)

    def teacher(seed, k):
        logits = 3 * torch.randn(6, 61, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        top, ids = logits.topk(k)
        rest = logits.scatter(1, ids, -torch.inf)
        edges = (0, 4), (4, 20), (20, 61)
        log_z = torch.stack([(logits / t).logsumexp(1) for t in (1.0, 2.0)], 1)
        tails = [torch.stack([(rest[:, a:b] / t).logsumexp(1) for a, b in edges], 1) for t in (1.0, 2.0)]
        return Distribution(ids, top - log_z[:, :1], log_z, torch.stack(tails, 1) - log_z[..., None], (1.0, 2.0))

    teachers = [TeacherRows(slice(0, 6), teacher(1, 5), 0.7), TeacherRows(slice(0, 6), teacher(2, 9), 0.2)]
    results = []
    for form, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        settings = {"temperature": temperature, "t_squared": True, "blocks": blocks, "form": form, "chunk_bytes": 1}
        made = head_terms(*leaves, labels, teachers, divergence=Divergence("jsd"), label_weight=0.5, **settings)
        results.append((made.loss.double(), *(g.double() for g in torch.autograd.grad(made.loss, leaves))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
