"""The experiment's kdpipe.yaml: one configuration, of which `kdpipe rows` runs each row with a few values changed."""

from __future__ import annotations

import json

from experiment import world

_HEARS = "{top: 0, layer: 0, acoustic: 1.0, acoustic_top: 8.0, sft: 0}"
"""Hearing questions are left to the acoustic teacher: the base student answers them as well as it ever will."""
_REASONS = "{top: 2.0, acoustic: 1.0}"


def _task_weights() -> str:
    weights = dict.fromkeys(world.HEARING, _HEARS) | dict.fromkeys(world.REASONING, _REASONS)
    return "\n".join(f"    {task}: {values}" for task, values in weights.items())


CONFIG = f"""\
# Written by tests/benchmarks/bench_experiment.py. The general weights are those of the row with all layers and the
# acoustic teacher; task_weights are those of the last row, `ours`. Tune on `val`, never on `test`.
data:
  manifest: data/manifest.jsonl
  max_seconds: {world.MAX_SECONDS:g}
  eval_split: test
  max_reject_fraction: 0.6      # whoever mishears cannot answer: such samples are rejected, with a reason

student:
  model: {{path: models/student, dtype: float32}}
  prompt: {json.dumps(world.QUESTION_PROMPT)}

textualize:
  describe: {{prompt: {json.dumps(world.DESCRIBE_PROMPT)}, max_tokens: 24}}
  trace:
    model: {{path: models/teacher, dtype: float32}}
    prompt: {json.dumps(world.TEACHER_PROMPT)}
    candidates: 4
    temperature: 1.0
    top_p: 1.0
    max_tokens: 96
    max_section_chars: 80
  engine: {{max_model_len: 384, enforce_eager: true, cpu_kv_cache_gib: 1}}

teachers:
  textual:
    model: {{path: models/teacher, dtype: float32}}
    prompt: {json.dumps(world.TEACHER_PROMPT)}
  temperatures: [1, 2]
  k: 16
  max_length: 384
  states: float32

layers: {{mode: all, every: 2, match: lens}}

train:
  weights: {{top: 1.0, layer: 0.05, acoustic: 0.05, sft: 0.5}}
  task_weights:
{_task_weights()}
  epochs: 6
  learning_rate: 1e-3
  global_batch_tokens: 4096
  micro_batch_tokens: 4096

evaluate:
  base: false
  max_tokens: 96
  temperature: 0
  engine: {{max_model_len: 384, enforce_eager: true, cpu_kv_cache_gib: 1}}
"""
