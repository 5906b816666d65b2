"""AdamW on float32 copies, schedules, clipping, freezing."""

import dataclasses

import pytest
import torch
from torch import nn

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.config import TrainConfig
from kdpipe.stages.train.optimizer import PROJECTION_RATE, Optimizer, freeze, learning_rate_factor

CONFIG = TrainConfig(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0, grad_clip=0.0)


def test_schedules_warm_up_and_fall() -> None:
    config = dataclasses.replace(CONFIG, warmup_ratio=0.2)
    for schedule, middle, last in (("constant", 1.0, 1.0), ("linear", 0.5, 0.125), ("cosine", 0.5, 0.0381)):
        chosen = dataclasses.replace(config, schedule=schedule)
        factors = [learning_rate_factor(step, 10, chosen) for step in range(10)]
        assert factors[:2] == [0.5, 1.0]
        assert factors[2] == 1.0
        assert factors[6] == pytest.approx(middle)
        assert factors[9] == pytest.approx(last, abs=1e-4)
    assert learning_rate_factor(0, 10, dataclasses.replace(config, warmup_ratio=0.0)) == 1.0
    assert learning_rate_factor(9, 10, dataclasses.replace(config, warmup_ratio=1.0)) == 1.0


def _train(dtype: torch.dtype, config: TrainConfig, steps: int = 20) -> tuple[nn.Linear, Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).to(dtype)
    optimizer = Optimizer(dict(layer.named_parameters()), {}, config, steps)
    inputs = torch.randn(16, 8, dtype=dtype)
    for step in range(steps):
        for half in (inputs[:8], inputs[8:]):
            (layer(half).float() - 1).square().mean().backward()
        optimizer.step(step)
    return layer, optimizer


def test_float32_is_plain_adamw() -> None:
    layer, _ = _train(torch.float32, dataclasses.replace(CONFIG, weight_decay=0.1, betas=(0.8, 0.9)))
    torch.manual_seed(0)
    plain = nn.Linear(8, 8)
    adamw = torch.optim.AdamW(
        [{"params": [plain.weight], "weight_decay": 0.1}, {"params": [plain.bias], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.9),
    )
    inputs = torch.randn(16, 8)
    for _ in range(20):
        adamw.zero_grad()
        ((plain(inputs[:8]) - 1).square().mean() + (plain(inputs[8:]) - 1).square().mean()).backward()
        adamw.step()
    torch.testing.assert_close(layer.weight, plain.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias, plain.bias, rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_move_by_less_than_their_rounding() -> None:
    config = dataclasses.replace(CONFIG, learning_rate=1e-5)
    layer, optimizer = _train(torch.bfloat16, config, steps=50)
    torch.manual_seed(0)
    start = nn.Linear(8, 8).to(torch.bfloat16)
    master = optimizer.weights["weight"].detach()
    assert master.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16 and layer.weight.grad is None
    moved = (master - start.weight.detach().float()).abs()
    assert 2e-4 < float(moved.mean()) < 6e-4
    assert torch.equal(layer.weight, master.to(torch.bfloat16))


def test_clipping_is_torchs_and_the_norm_is_that_before() -> None:
    torch.manual_seed(0)
    mine, plain = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    plain.load_state_dict(mine.state_dict())
    optimizer = Optimizer(dict(mine.named_parameters()), {}, dataclasses.replace(CONFIG, grad_clip=0.5), 2)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step, size in enumerate((3.0, 0.1)):
        inputs = torch.full((1, 4), size)
        mine(inputs).sum().backward()
        assert optimizer.step(step)[0] == pytest.approx(2 * size)
        adamw.zero_grad()
        plain(inputs).sum().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adamw.step()
    torch.testing.assert_close(mine.weight, plain.weight)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    optimizer = Optimizer(dict(layer.named_parameters()), {}, CONFIG, 1)
    (layer(torch.tensor([[float("nan"), 1.0]]))).sum().backward()
    norm, _ = optimizer.step(0)
    assert norm != norm
    assert torch.equal(layer.weight, before) and layer.weight.grad is None


def test_projections_learn_at_a_rate_of_their_own() -> None:
    layer, projection = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    start = layer.weight.detach().clone(), projection.weight.detach().clone()
    config = dataclasses.replace(CONFIG, learning_rate=1e-5)
    optimizer = Optimizer({"weight": layer.weight}, {"1.weight": projection.weight}, config, 1)
    (layer.weight.sum() + projection.weight.sum()).backward()
    optimizer.step(0)
    assert float((layer.weight.detach() - start[0]).abs().max()) == pytest.approx(1e-5, rel=0.05)
    assert float((projection.weight.detach() - start[1]).abs().max()) == pytest.approx(PROJECTION_RATE, rel=0.05)


def test_state_goes_round() -> None:
    config = dataclasses.replace(CONFIG, schedule="cosine")
    layer, optimizer = _train(torch.bfloat16, config, steps=5)
    other = nn.Linear(8, 8).to(torch.bfloat16)
    twin = Optimizer(dict(other.named_parameters()), {}, config, 5)
    held = optimizer.tensors()
    room = twin.prepare(held)
    assert room.keys() == held.keys()
    for name, value in held.items():
        room[name].copy_(value)
    twin.publish()
    assert torch.equal(layer.weight, other.weight)
    for model, its in ((layer, optimizer), (other, twin)):
        model(torch.ones(1, 8, dtype=torch.bfloat16)).float().sum().backward()
        its.step(4)
    assert torch.equal(layer.weight, other.weight)
    assert all(torch.equal(value, twin.tensors()[name]) for name, value in optimizer.tensors().items())


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio_tower = nn.ModuleDict({"conv": nn.Linear(2, 2), "proj": nn.Linear(2, 2)})
        self.multi_modal_projector = nn.Linear(2, 2)
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(2, 2), "norm": nn.LayerNorm(2)})


def _frozen(prefixes: tuple[str, ...], family: str) -> set[str]:
    model = _Student()
    names = {name: f"thinker.{name}" for name, _ in model.named_parameters()}
    freeze(model, names, prefixes, family)
    return {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if not p.requires_grad}


def test_freeze_takes_aliases_and_prefixes_of_either_name() -> None:
    assert _frozen(("audio_tower",), "qwen2_5_omni") == {"audio_tower.conv"}
    assert _frozen(("audio_tower",), "qwen2_audio") == {"audio_tower.conv", "audio_tower.proj"}
    assert _frozen(("projector",), "qwen2_5_omni") == {"audio_tower.proj"}
    assert _frozen(("projector",), "qwen2_audio") == {"multi_modal_projector"}
    assert _frozen(("embeddings",), "qwen2_audio") == {"model.embed_tokens"}
    assert _frozen(("thinker.model.norm", "model.embed"), "qwen2_audio") == {"model.embed_tokens", "model.norm"}
    assert _frozen((), "qwen2_audio") == set()


def test_freeze_refuses_a_prefix_that_fits_nothing_and_freezing_all() -> None:
    with pytest.raises(KdpipeError, match=r"train\.freeze: no parameter's name begins with 'audiotower'.*thinker\."):
        _frozen(("audiotower",), "qwen2_audio")
    with pytest.raises(KdpipeError, match="nothing to train"):
        _frozen(("thinker.",), "qwen2_audio")
