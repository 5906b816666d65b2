"""The teachers and students of `bench_fidelity.py`.

Shape suffixes: N positions, H width, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from fidelity_forms import Student, Teacher

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.models.vocabulary import Alignment


def zipf_teacher(
    vocabulary: int = 151_936, rows: int = 512, width: int = 128, spread: float = 4.55, seed: int = 0
) -> Teacher:
    """A teacher of logits log(1 / (id + 2.7)) + noise, and two students that know the prior.

    The noise is a product of states and head (deviation `spread`, in nats), so it differs by position and is the
    same in kind for teacher and students. The near student's states and head are the teacher's mixed with a tenth of
    something else; the far one's with half, and its noise is weaker by a quarter.
    """
    generator = torch.Generator().manual_seed(seed)

    def with_prior(states_NH: torch.Tensor, head_VH: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(len(states_NH), 1)
        return torch.cat([ones, states_NH], 1), torch.cat([prior_V1, head_VH * (scale / math.sqrt(width - 1))], 1)

    prior_V1 = -(torch.arange(vocabulary) + 2.7).log()[:, None]
    prior_V1 -= prior_V1.mean()
    states_NH, head_VH = _normal(generator, rows, width - 1), _normal(generator, vocabulary, width - 1)
    students = []
    for name, other, scale in (("far", 0.5, 0.75 * spread), ("near", 0.1, spread)):
        own = (_mixed(own, other, _normal(generator, *own.shape)) for own in (states_NH, head_VH))
        students.append(Student(name, *with_prior(*own, scale)))
    return Teacher(
        f"Zipf, V = {vocabulary:,}", *with_prior(states_NH, head_VH, spread), Alignment(vocabulary, ()), students
    )


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _mixed(own: torch.Tensor, other_share: float, other: torch.Tensor) -> torch.Tensor:
    """As long as `own` where both are as long and independent."""
    return math.sqrt(1 - other_share**2) * own + other_share * other


def miniature_teacher(demo: Path, rows: int = 1024) -> Teacher:
    """The demo's textual teacher at the response tokens of gold traces of held-out scenes.

    Far is the demo's student before training, distilled the one that came of it; both hear the clips. Near is the
    teacher with a tenth of something else in its states and head.
    """
    from kdpipe.stages.config import ModelConfig
    from kdpipe.stages.miniature import world
    from kdpipe.stages.models.folder import resolve
    from kdpipe.stages.models.inputs import Encoder, Example
    from kdpipe.stages.models.loaded import load_model
    from kdpipe.stages.models.vocabulary import align, load_vocabulary

    paths = {"teacher": demo / "models/teacher", "far": demo / "models/student", "distilled": demo / "train/student"}
    for path in paths.values():
        if not path.is_dir():
            raise KdpipeError(f"{path} is missing. Make it: kdpipe demo --folder {demo}")
    found = {name: resolve(ModelConfig(str(path.resolve()), dtype="float32"), Path()) for name, path in paths.items()}
    encoders = {name: Encoder(folder) for name, folder in found.items()}
    examples: dict[str, list[Example]] = {name: [] for name in paths}
    rng = np.random.default_rng(7)
    count = 0
    while count < rows:
        scene, question = world.sample_question(rng, held_out=True)
        samples, _ = world.render(scene, rng)
        target = encoders["teacher"].target_ids(world.trace(scene, question))
        count += len(target)
        for name, encoder in encoders.items():
            hears = name != "teacher"
            user = world.question_text(question) if hears else world.teacher_text(world.describe(scene), question)
            prompt = encoder.prompt_ids(encoder.prompt_text(user, clips=int(hears)), [len(samples)] if hears else [])
            examples[name].append(Example("", prompt, target, encoder.features([samples]) if hears else {}))
    states, heads = {}, {}
    for name, folder in found.items():
        model = load_model(folder, device="cpu", train=False)
        with torch.no_grad():
            batch = encoders[name].collate(examples[name])
            states[name] = model.hidden(batch).flatten(0, 1)[batch.response_rows][:rows].float().clone()
        heads[name] = model.head_weight.detach().float()
    vocabularies = {name: load_vocabulary(paths[name], name) for name in ("teacher", "far")}
    alignment = align(vocabularies["far"], vocabularies["teacher"], len(heads["far"]), len(heads["teacher"]))
    students = [Student(name, states[name], heads[name]) for name in ("far", "distilled")]
    generator = torch.Generator().manual_seed(0)
    near = (
        _mixed(own, 0.1, own.std() * _normal(generator, *own.shape)) for own in (states["teacher"], heads["teacher"])
    )
    students.append(Student("near", *near))
    live = alignment.valid - len(alignment.masked)
    return Teacher(f"miniature Qwen3, V = {live}", states["teacher"], heads["teacher"], alignment, students)
