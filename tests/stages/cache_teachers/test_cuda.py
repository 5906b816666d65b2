"""The stage on a GPU stores what it stores on a CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kdpipe.stages.config import LayersConfig, WeightsConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("settings", [{"k": 8, "tail_blocks": 3, "draws": 4}, {"k": 8, "states": "int8"}], ids=str)
def test_a_gpu_stores_what_a_cpu_stores(begin, tmp_path, settings):
    weights = WeightsConfig(acoustic_top=0.1)
    layers = LayersConfig("all", match="hidden") if "states" in settings else LayersConfig("all")
    runs = [begin(tmp_path / name, weights=weights, layers=layers, **settings) for name in ("cpu", "gpu")]
    runs[1] = runs[1].again(teachers=dataclasses.replace(runs[1].ctx.config.teachers, device="cuda", batch_tokens=900))
    for run in runs:
        run.bring_up()
    rows = {(row.id, row.source): row for row in runs[0].ledger.rows()}
    assert {source for _, source in rows} == {"targets", "textual", "acoustic", "acoustic_top"}
    for (name, source), row in rows.items():
        (ours, at), (theirs, there) = (run.store.get(name, source) for run in runs)
        for layer in row.cover.get("hidden", []):
            a, b = ours.hidden(at, layer).float(), theirs.hidden(there, layer).float()
            assert float(torch.cosine_similarity(a, b, dim=1).min()) > 0.9999
        for prefix in (
            ["top", *(f"lens/{layer:02}" for layer in row.cover.get("lens", []))] if row.cover.get("k") else []
        ):
            wanted = {"k": 8, "temperatures": [1.0, 2.0], "draws": "draws" in settings}
            one, other = (part.distribution(place, prefix, **wanted) for part, place in ((ours, at), (theirs, there)))
            for field in ("ids", "logprob", "log_z", "log_tail") + (("draws",) if "draws" in settings else ()):
                x, y = (np.asarray(getattr(found, field)) for found in (one, other))
                if x.dtype.kind == "f":
                    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
                else:
                    assert (x == y).mean() > 0.99, "ids that are about as likely may change places"
