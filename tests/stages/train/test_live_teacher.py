"""From the store to the gradient: with k = V in float32, training is taught exactly what the live teacher says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdpipe.data.store.reader import Store
from kdpipe.data.stream import StreamState
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.config import Divergence
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.loaded import load_model
from kdpipe.stages.models.prompt import fill
from kdpipe.stages.textualize.table import read_traces
from kdpipe.stages.train.data import Reader
from kdpipe.stages.train.objective import Objective, Sums
from kdpipe.stages.train.terms import resolve_terms


def _shared(logits: torch.Tensor, alignment: Any) -> torch.Tensor:
    kept = [index for index in range(alignment.valid) if index not in set(alignment.masked)]
    return torch.log_softmax(logits.double()[:, kept], dim=1)


def _full(kind: str, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(b, a, log_target=True, reduction="sum")

    if kind == "forward_kl":
        return kl(log_p, log_q)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), dim=0) - torch.tensor(2.0).log()
    return 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)


@pytest.mark.parametrize("student", ["qwen2_audio", "qwen2_5_omni"])
def test_cached_and_live_teacher_give_the_same_loss_and_gradients(cached: Any, student: str) -> None:
    torch.set_num_threads(2)
    run = cached("all + SFT", student=student, samples=3, k=10_000, logprob_dtype="float32")
    ctx, needs = run.ctx, requirements(run.ctx)
    assert needs.k == needs.alignment.valid - len(needs.alignment.masked), "the whole shared vocabulary is kept"
    ledger = ctx.ledger("cache-teachers")
    samples = {sample.id: sample for sample in ctx.samples("train")}
    encoder = Encoder(needs.student)
    lengths = {name: ledger.get(name, "targets").length for name in samples}
    model, teacher = load_model(needs.student, device="cpu", train=True), load_model(needs.textual, device="cpu")
    reads, traces = Encoder(needs.textual), read_traces(ctx)

    def cached_terms(kind: Divergence) -> Sums:
        config = replace(run.config, train=replace(run.config.train, divergence=kind, micro_batch_tokens=10_000))
        terms = resolve_terms(config, needs)
        store = Store(ledger.parts, ledger)
        reader = Reader(config, terms, encoder, samples, store, lengths, needs.textual.layers)
        (micro,) = reader.load((StreamState("", 0, 0, 0), list(samples))).micros
        objective = Objective(model, terms, teacher=needs.textual, alignment=needs.alignment, seed=0)
        return objective(micro, {"top": 1.0, "layer": 0.05})

    def live_terms(kind: str) -> dict[str, torch.Tensor]:
        """One sample at a time, full logits, no padding; teacher and student by transformers alone."""
        sums = {"top": torch.zeros((), dtype=torch.float64), "layer": torch.zeros((), dtype=torch.float64)}
        for sample in samples.values():
            ids = encoder.target_ids(traces[sample.id].trace)
            text = reads.prompt_text(fill(run.config.teachers.textual.prompt, sample, sample.description))
            prompt = reads.prompt_ids(text)
            with torch.no_grad(), teacher.capture([2, 3, 5]) as inner:
                says = teacher.model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
            rows = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
            log_p = {6: _shared(says[rows], needs.alignment)}
            for layer, state in inner.items():
                log_p[layer] = _shared(
                    (teacher.final_norm(state) @ teacher.head_weight.T)[0, rows], needs.alignment
                ).detach()
            reader = Reader(
                run.config,
                resolve_terms(run.config, needs),
                encoder,
                samples,
                Store(ledger.parts, ledger),
                lengths,
                needs.textual.layers,
            )
            batch = reader.load((StreamState("", 0, 0, 0), [sample.id])).micros[0].batch
            with model.capture([1, 2, 3]) as own:
                logits = model.model(**batch.forward, use_cache=False).logits[0]
            rows = slice(len(logits) - len(ids) - 1, len(logits) - 1)
            for ours, theirs in {1: 2, 2: 3, 3: 5, 4: 6}.items():
                spoken = logits if ours == 4 else (model.final_norm(own[ours]) @ model.head_weight.T)[0]
                value = _full(kind, log_p[theirs], _shared(spoken[rows], needs.alignment))
                sums["layer"] = sums["layer"] + value
                if ours == 4:
                    sums["top"] = sums["top"] + value
        return sums

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.model.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}

    for kind in ("jsd", "forward_kl"):
        ours, theirs = cached_terms(kind), live_terms(kind)
        for name, value in theirs.items():
            assert float(ours.terms[name]) == pytest.approx(float(value.detach()), rel=1e-5)
        mine, its = gradients(ours.loss), gradients(theirs["top"] + 0.05 * theirs["layer"])
        assert mine.keys() == its.keys() and len(mine) > 40
        for name, value in its.items():
            assert float((mine[name] - value).norm()) < 1e-5 * float(value.norm()), name
