"""The objective against live teachers: with k = V the cached terms are those of the full distributions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdpipe.stages.cache_teachers.blocks import block_bounds
from kdpipe.stages.cache_teachers.head import distribution
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel, load_model
from kdpipe.stages.models.vocabulary import Alignment, align, load_vocabulary
from kdpipe.stages.train.losses import Distribution, StoredStates
from kdpipe.stages.train.objective import MicroBatch, Objective
from kdpipe.stages.train.terms import Compared, Terms

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

JSD = Compared("jsd", 0.5, 1.0, False, 10_000)
NOTHING = Terms(
    sft=0.0,
    top=0.0,
    layer=0.0,
    acoustic=0.0,
    acoustic_top=0.0,
    compared=JSD,
    layers={},
    match=None,
    acoustic_layers=(),
    distance=None,
)
LENS = {1: 2, 2: 3, 3: 4, 4: 6}


@dataclasses.dataclass(frozen=True)
class Scene:
    """A student, its teachers, and what they say about one batch."""

    student: LoadedModel
    teacher: ModelFolder
    alignment: Alignment
    batch: Batch
    micro: MicroBatch
    teacher_logits: Mapping[int, torch.Tensor]

    def objective(self, terms: Terms) -> Objective:
        return Objective(self.student, terms, teacher=self.teacher, alignment=self.alignment, seed=3)

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        self.student.model.zero_grad(set_to_none=True)
        loss.backward()
        return {n: p.grad.clone() for n, p in self.student.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def scene(family: Miniatures) -> Scene:
    torch.set_num_threads(2)
    base = resolve(ModelConfig(str(family.qwen2_5_omni), dtype="float32"), family.teacher.parent)
    teacher = resolve(ModelConfig(str(family.teacher), dtype="float32"), family.teacher.parent)
    alignment = align(
        *(load_vocabulary(folder.path, folder.name) for folder in (base, teacher)), base.head_rows, teacher.head_rows
    )
    encoder, reads = Encoder(base), Encoder(teacher)
    rng = np.random.default_rng(0)
    heard, read = [], []
    for name, seconds, response in (("a", 0.9, "<RESPONSE>two</RESPONSE>"), ("b", 0.4, "the first tone is higher")):
        clip = rng.normal(size=int(seconds * encoder.rate)).astype(np.float32) * 0.1
        targets = encoder.target_ids(response)
        prompt = encoder.prompt_ids(encoder.prompt_text("How many tones?", clips=1), [len(clip)])
        heard.append(Example(name, prompt, targets, encoder.features([clip])))
        read.append(Example(name, reads.prompt_ids(reads.prompt_text(f"tones: 3 1\n{name}")), targets))
    batch = encoder.collate(heard)
    model = load_model(teacher, device="cpu")
    frozen = load_model(base, device="cpu")
    textual, states, logits = {}, {}, {}
    with torch.no_grad():
        their = reads.collate(read)
        assert torch.equal(their.targets, batch.targets)
        with model.capture(range(1, 7), their.response_rows) as inner:
            last = model.hidden(their).flatten(0, 1)[their.response_rows]
        for layer, hidden in inner.items():
            normed = last if layer == 6 else model.final_norm(hidden)
            textual[layer] = _cached(normed, model.head_weight, alignment)
            logits[layer] = normed @ model.head_weight.T
            states[layer] = StoredStates(hidden)
        with frozen.capture(range(1, 5), batch.audio_rows) as audio:
            own = frozen.hidden(batch).flatten(0, 1)[batch.response_rows]
        acoustic_top = _cached(own * 0.5, frozen.head_weight, alignment)
    moved = {layer: StoredStates(hidden + 0.1 * torch.randn(hidden.shape)) for layer, hidden in audio.items()}
    micro = MicroBatch(batch, textual, acoustic_top, states, moved, (0,))
    return Scene(load_model(base, device="cpu", train=True), teacher, alignment, batch, micro, logits)


def _cached(hidden: torch.Tensor, weight: torch.Tensor, alignment: Alignment, k: int | None = None) -> Distribution:
    shared = alignment.valid - len(alignment.masked)
    given = distribution(
        hidden,
        weight,
        k=k or shared,
        temperatures=(1.0, 2.0),
        bounds=block_bounds(alignment.valid, 1),
        alignment=alignment,
        chunk=7,
    )
    return Distribution(given["ids"], given["logprob"], given["log_z"], given["log_tail"], (1.0, 2.0))


def _log_softmax(logits: torch.Tensor, alignment: Alignment, temperature: float) -> torch.Tensor:
    """Full distributions over the shared ids, in float64."""
    shared = [index for index in range(alignment.valid) if index not in set(alignment.masked)]
    return torch.log_softmax(logits.double()[:, shared] / temperature, dim=1)


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = torch.logaddexp(log_p, log_q) - np.log(2)
    return 0.5 * _forward_kl(log_p, log_m) + 0.5 * _forward_kl(log_q, log_m)


def _close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, value in theirs.items():
        assert float((ours[name] - value).norm()) < 1e-5 * float(value.norm()), name


@pytest.mark.parametrize(
    ("compared", "full"),
    [
        (JSD, _jsd),
        (dataclasses.replace(JSD, kind="forward_kl"), _forward_kl),
        (dataclasses.replace(JSD, kind="reverse_kl"), lambda p, q: _forward_kl(q, p)),
        (dataclasses.replace(JSD, temperature=2.0, t_squared=True), lambda p, q: 4 * _jsd(p, q)),
    ],
    ids=["jsd", "forward_kl", "reverse_kl", "jsd at T = 2"],
)
def test_all_of_the_vocabulary_cached_is_the_live_teacher(
    scene: Scene, compared: Compared, full: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    terms = dataclasses.replace(NOTHING, top=1.0, layer=0.5, compared=compared, layers=LENS, match="lens")
    made = scene.objective(terms)(dataclasses.replace(scene.micro, acoustic_top=None), terms.weights)
    sums, ours = made.terms, scene.gradients(made.loss)
    assert float(made.loss.detach()) == pytest.approx(float(sums["top"] + 0.5 * sums["layer"]), rel=1e-5)

    student, temperature = scene.student, compared.temperature
    with student.capture([1, 2, 3]) as states:
        output = student.model(**scene.batch.forward, use_cache=False)
    rows = scene.batch.response_rows
    logits = {4: output.logits.flatten(0, 1)[rows]}
    for layer, hidden in states.items():
        logits[layer] = student.final_norm(hidden).flatten(0, 1)[rows] @ student.head_weight.T
    values = {
        layer: full(
            _log_softmax(scene.teacher_logits[theirs], scene.alignment, temperature),
            _log_softmax(logits[layer], scene.alignment, temperature),
        )
        for layer, theirs in LENS.items()
    }
    expected = values[4] + 0.5 * torch.stack(list(values.values())).sum()
    theirs = scene.gradients(expected)
    assert float(sums["top"].detach()) == pytest.approx(float(values[4].detach()), rel=1e-5)
    assert float(sums["layer"].detach()) == pytest.approx(float(sum(v.detach() for v in values.values())), rel=1e-5)
    _close(ours, theirs)


def test_cross_entropy_is_that_of_transformers_where_nothing_is_masked(scene: Scene) -> None:
    terms = dataclasses.replace(NOTHING, sft=1.0, compared=None)
    micro = dataclasses.replace(scene.micro, textual={}, acoustic_top=None, acoustic_states={}, textual_states={})
    objective = Objective(scene.student, terms, teacher=None, alignment=None, seed=0)
    made = objective(micro, {"sft": 1.0})
    ours, gradients = made.terms, scene.gradients(made.loss)
    assert set(ours) == {"sft"}
    output = scene.student.model(**scene.batch.forward, use_cache=False)
    expected = F.cross_entropy(
        output.logits.flatten(0, 1)[scene.batch.response_rows], scene.batch.targets, reduction="sum"
    )
    assert float(ours["sft"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    _close(gradients, scene.gradients(expected))


def test_acoustic_term_is_the_mean_over_layers_at_the_audio_positions(scene: Scene) -> None:
    terms = dataclasses.replace(NOTHING, acoustic=1.0, compared=None, acoustic_layers=(1, 3, 4), distance="cosine")
    made = scene.objective(terms)(dataclasses.replace(scene.micro, acoustic_top=None), terms.weights)
    output = scene.student.model(**scene.batch.forward, use_cache=False, output_hidden_states=True)
    audio = scene.batch.audio_rows
    assert len(audio) == sum(scene.batch.audio_offsets[-1:]) > 10
    expected = []
    for layer in (1, 3):  # transformers gives the last layer after the norm
        own = output.hidden_states[layer].flatten(0, 1)[audio]
        expected.append((1 - F.cosine_similarity(own, scene.micro.acoustic_states[layer].codes)).sum())
    with scene.student.capture([4], audio) as states:
        scene.student.hidden(scene.batch)
    expected.append((1 - F.cosine_similarity(states[4], scene.micro.acoustic_states[4].codes)).sum())
    assert float(made.terms["acoustic"]) == pytest.approx(float(torch.stack(expected).mean().detach()), rel=1e-4)
    assert [float(made.sources[f"acoustic/{layer:02d}"]["distance"]) for layer in (1, 3, 4)] == pytest.approx(
        [float(value.detach()) for value in expected], rel=1e-4
    )
    scene.gradients(made.loss)
    towers = [p.grad for n, p in scene.student.model.named_parameters() if "audio_tower.conv1" in n]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in towers)


def test_hidden_matching_trains_a_projection_for_each_pair(scene: Scene) -> None:
    terms = dataclasses.replace(NOTHING, layer=1.0, compared=None, layers={2: 3, 4: 6}, match="hidden", distance="mse")
    objective = scene.objective(terms)
    again = scene.objective(terms)
    assert list(objective.projections) == ["2", "4"]
    for name, value in objective.projections.state_dict().items():
        assert value.shape == (scene.teacher.width, scene.student.width)
        assert torch.equal(value, again.projections.state_dict()[name])
    micro = dataclasses.replace(scene.micro, textual={}, acoustic_top=None)
    made = objective(micro, terms.weights)
    with scene.student.capture([2, 4], scene.batch.response_rows) as states:
        scene.student.hidden(scene.batch)
    expected = 0.0
    for ours, theirs in ((2, 3), (4, 6)):
        projected = states[ours] @ objective.projections[str(ours)].weight.T
        target = scene.micro.textual_states[theirs].codes
        expected += float(((projected - target).square().mean(1) / target.square().mean(1)).sum().detach())
    assert float(made.terms["layer"]) == pytest.approx(expected, rel=1e-3)
    assert sum(float(made.sources[name]["distance"]) for name in ("layer/02", "layer/04")) == pytest.approx(
        expected, rel=1e-3
    )
    made.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.projections.parameters())


def test_every_term_at_once_and_the_top_computed_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdpipe.stages.train import objective as module

    seen = []
    true = module.head_terms

    def spy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, teachers: list, **rest: object):
        seen.append((len(hidden), len(teachers)))
        return true(hidden, weight, labels, teachers, **rest)

    monkeypatch.setattr(module, "head_terms", spy)
    terms = Terms(1.0, 1.0, 0.1, 0.1, 0.2, JSD, LENS, "lens", (1, 2, 3, 4), "cosine")
    sums = scene.objective(terms)(scene.micro, terms.weights)
    count = len(scene.batch.targets)
    assert seen == [(4 * count, 5)]
    assert set(sums.terms) == {"sft", "top", "layer", "acoustic", "acoustic_top"}
    assert all(torch.isfinite(value) for value in sums.terms.values())
    assert float(sums.terms["acoustic_top"]) > 0
    weighted = sum(weight * float(sums.terms[name]) for name, weight in terms.weights.items())
    assert float(sums.loss.detach()) == pytest.approx(weighted, rel=1e-5)


def test_diagnostics_by_source_and_layer(scene: Scene) -> None:
    terms = Terms(1.0, 1.0, 0.1, 0.1, 0.2, JSD, LENS, "lens", (1, 4), "cosine")
    sums = scene.objective(terms)(scene.micro, terms.weights)
    count = len(scene.batch.targets)
    lens = [f"layer/{layer:02d}" for layer in LENS]
    assert set(sums.sources) == {"top", "acoustic_top", *lens, "acoustic/01", "acoustic/04"}
    assert sums.sources["top"] == sums.sources["layer/04"], "the lens of the last layer is the top"
    for name in ("top", "acoustic_top", *lens):
        seen = {key: float(value) / count for key, value in sums.sources[name].items()}
        assert 0 <= seen["agreement"] <= 1 and 0 < seen["divergence"] <= np.log(2)
        assert seen["teacher_kept"] == pytest.approx(1.0, rel=1e-4), "the whole vocabulary is kept"
        assert seen["student_kept"] == pytest.approx(1.0, rel=1e-4)
        assert 0 < seen["student_entropy"] < np.log(scene.alignment.valid)
    their = _log_softmax(scene.teacher_logits[6], scene.alignment, 1.0)
    entropy = -float((their.exp() * their).sum())
    assert float(sums.sources["top"]["teacher_entropy"]) == pytest.approx(entropy, rel=1e-4)
    assert float(sums.terms["layer"]) == pytest.approx(
        sum(float(sums.sources[name]["divergence"]) for name in lens), rel=1e-5
    )


def test_tails_in_blocks_and_a_small_k_stay_below_the_full_divergence(scene: Scene) -> None:
    terms = dataclasses.replace(NOTHING, top=1.0)
    micro = dataclasses.replace(scene.micro, acoustic_top=None)
    full = float(scene.objective(terms)(micro, {}).terms["top"])
    given = micro.textual[6]
    few = Distribution(
        given.ids[:, :4].contiguous(),
        given.logprob[:, :4],
        given.log_z,
        torch.log1p(-given.logprob[:, :4].exp().sum(1)).reshape(-1, 1, 1).expand(-1, 2, 1),
        given.temperatures,
    )
    bucketed = float(scene.objective(terms)(dataclasses.replace(micro, textual={6: few}), {}).terms["top"])
    assert 0 < bucketed < full
