"""What a user can say: the configuration as frozen dataclasses, read from YAML by `kdpipe.pipeline.config`.

Every field is either *identity* (it can change the bytes of an output, so it is part of a sample's key) or
*execution* (it cannot: how fast, how much at once, where). `docs/configuration.md` lists both. The section
`train` stands in `config_train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdpipe.stages.config_fields import Device, bounded, execution
from kdpipe.stages.config_fields import identity_of as identity_of
from kdpipe.stages.config_train import Divergence as Divergence
from kdpipe.stages.config_train import LoraConfig as LoraConfig
from kdpipe.stages.config_train import TrainConfig
from kdpipe.stages.config_train import WeightsConfig as WeightsConfig

Dtype = Literal["float32", "bfloat16", "float16"]
Distance = Literal["cosine", "mse", "smooth_l1"]


@dataclass(frozen=True)
class ModelConfig:
    """A model: a folder (relative to the configuration file) or a Hugging Face hub name."""

    path: str
    """Folder or hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask for it."""
    dtype: Dtype = "bfloat16"
    """Precision of weights and activations."""


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from."""

    manifest: str = execution()
    """What is in it counts, not where it lies: JSONL, CSV, Parquet, or a folder written by `datasets.save_to_disk`."""
    train_split: str = execution("train")
    """Split that is textualized, scored and trained on; rows without a split belong to `train`."""
    eval_split: str = execution("test")
    """Split that `kdpipe evaluate` scores."""
    allow_outside: bool = execution(False)
    """Let audio paths leave the manifest's folder."""
    max_seconds: float = bounded(30.0, 0.1, 3600.0)
    """Longer clips are rejected, never truncated (seconds)."""
    max_reject_fraction: float = bounded(0.05, 0.0, 1.0, how=True)
    """A stage fails (good samples kept) when more than this share of its samples is rejected."""


@dataclass(frozen=True)
class StudentConfig:
    """The audio language model to teach, before training."""

    model: ModelConfig
    """Its checkpoint; also the acoustic teacher and the describer unless others are named."""
    system: str | None = None
    """System message; None leaves it to the chat template."""
    prompt: str = "{question}\n{choices}"
    """User text after the audio, at training and at evaluation. Fields: question,
    choices (written `Choices: A, B, C`, or nothing)."""


@dataclass(frozen=True)
class LaunchConfig:
    """How vLLM is started, whatever it is asked."""

    gpu_memory_utilization: float = bounded(0.9, 0.05, 1.0, how=True)
    """Share of the GPU's memory that vLLM takes."""
    tensor_parallel_size: int = bounded(1, 1, how=True)
    """GPUs a model is spread over."""
    max_num_seqs: int = bounded(64, 1, how=True)
    """Sequences that run at once."""
    enforce_eager: bool = execution(False)
    """No CUDA graphs and no compilation: starts faster, runs slower."""
    cpu_kv_cache_gib: int = bounded(2, 1, how=True)
    """Key-value cache of the CPU build (GiB)."""
    max_restarts: int = bounded(16, 0, how=True)
    """Times that an engine which died is started again; one death more ends the run. Restarts that found a sample which
    kills the engine do not count; finding it among n takes up to log2(n) + 2."""


@dataclass(frozen=True)
class EngineConfig(LaunchConfig):
    """How vLLM is started, and for sequences of which length."""

    max_model_len: int = bounded(4096, 16)
    """Longest sequence in tokens, audio included; longer samples are rejected (identity: it decides which)."""


@dataclass(frozen=True)
class DescribeConfig:
    """How a clip becomes text."""

    model: ModelConfig | None = None
    """An audio language model; None: the student's."""
    prompt: str = (
        "Describe this audio in detail: the sounds, speech, speakers, emotion, music, and the order of events."
    )
    """User text after the audio. Fields: question, choices."""
    max_tokens: int = bounded(512, 1)
    """Longest description."""
    temperature: float = bounded(0.0, 0.0)
    """0 is greedy, as in the paper."""
    top_p: float = bounded(1.0, 0.0, 1.0)
    """Nucleus sampling; 1 keeps everything."""


@dataclass(frozen=True)
class TraceConfig:
    """How a structured reasoning trace is written where the manifest brings none."""

    model: ModelConfig | None = None
    """An audio model (it hears the clip) or a text model (it reads the description); None: the describer."""
    prompt: str = (
        "{description}\n\n{question}\n{choices}\nThink step by step, then give the final answer only, in the response."
    )
    """User text. Fields: description, question, choices."""
    sections: tuple[str, ...] = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
    """Tags inside <THINK>, in order (the CoTA schema of Audio-Reasoner by default)."""
    candidates: int = bounded(4, 1)
    """Traces drawn for a sample; the first whose answer matches is kept."""
    temperature: float = bounded(0.7, 0.0)
    """Sampling temperature of the candidates."""
    top_p: float = bounded(0.95, 0.0, 1.0)
    """Nucleus sampling of the candidates."""
    max_tokens: int = bounded(1024, 1)
    """Longest trace."""
    max_section_chars: int = bounded(2000, 1)
    """Longest section (characters), enforced while decoding."""
    structured: bool = True
    """Constrain decoding to the schema (vLLM structured output)."""
    require_match: bool = True
    """Reject a sample none of whose candidates gives the manifest's answer."""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false} for Qwen3."""


@dataclass(frozen=True)
class TextualizeConfig:
    """Stage one, first half: descriptions and traces with vLLM."""

    describe: DescribeConfig = DescribeConfig()
    trace: TraceConfig = TraceConfig()
    seed: int = bounded(0, 0, 2**63 - 1)
    """Seeds each sample's sampling, together with its id."""
    part_samples: int = bounded(256, 1, how=True)
    """Samples written and committed together."""
    engine: EngineConfig = EngineConfig()


@dataclass(frozen=True)
class LayersConfig:
    """Which student layers are taught by which textual-teacher layers, and how they are compared."""

    mode: Literal["top", "skip", "all", "map"] = "all"
    """top: the last layer only; skip: one in `every`; all: each; map: exactly `map`."""
    every: int = bounded(7, 1)
    """Distance of `skip` (7: student layers 7, 14, 21, 28 of 28)."""
    map: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Student layer to teacher layer, counted from 1."""
    match: Literal["lens", "hidden"] = "lens"
    """lens: through each model's own final norm and output head; hidden: learned projection, then `distance`."""
    distance: Distance = "cosine"
    """Distance of projected hidden states, and, whatever `match` is, of the acoustic states."""


@dataclass(frozen=True)
class TextualTeacherConfig:
    """The teacher that reads: description + question, any text model with the student's base vocabulary."""

    model: ModelConfig
    """A text model with the student's base vocabulary."""
    system: str | None = None
    """System message."""
    prompt: str = "{description}\n\n{question}\n{choices}"
    """User text. Fields: description, question, choices."""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false} for Qwen3."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs it. vllm (`prompt_logprobs`) serves the last layer at temperature 1 alone; see docs/format.md."""


@dataclass(frozen=True)
class AcousticTeacherConfig:
    """The teacher that hears: by default the untouched student."""

    model: ModelConfig | None = None
    """None: the student's checkpoint, frozen."""
    layers: Literal["all", "skip"] = "all"
    """Whose hidden states at the audio positions are kept: every layer, or one in `layers.every`."""


@dataclass(frozen=True)
class TeachersConfig:
    """Stage one, second half: what the teachers know, written once."""

    textual: TextualTeacherConfig
    acoustic: AcousticTeacherConfig = AcousticTeacherConfig()
    k: int = bounded(64, 1)
    """Entries kept of each distribution; the rest is its exact tail. With `mass`, the most entries."""
    mass: float | None = bounded(None, 1e-6, 1.0)
    """Keep of each distribution only as many of the likeliest entries as reach this mass (0.99, say), at most k and at
    least `min_k`; None keeps k of each."""
    min_k: int = bounded(1, 1)
    """With `mass`: the fewest entries."""
    draws: int = bounded(0, 0, 4096)
    """Ids drawn from the tail that this k leaves, at each temperature, for the divergence `sampled_ce`; 0: none."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures at which distributions can be used in training; 1 is always among them."""
    tail_blocks: int = bounded(1, 1)
    """Vocabulary blocks whose tail mass is kept apart: ranges of ids that grow geometrically, the first of at most 256
    (1: one tail; 8 serve best where the student is far from the teacher, see docs/fidelity.md)."""
    logprob_dtype: Literal["float16", "float32", "uint8"] = "float16"
    """Precision of the kept log-probabilities and of the tails; uint8: 256 steps from a token's largest to its smallest
    kept log-probability, and float16 tails."""
    states: Literal["bfloat16", "int8", "fp8", "low_rank", "low_rank_int8", "float32"] = "bfloat16"
    """Codec of hidden states; its measured fidelity is stored with them. docs/format.md compares them."""
    rank: int = bounded(256, 1)
    """Numbers a token and layer in the codecs `low_rank` and `low_rank_int8`."""
    max_length: int = bounded(4096, 16)
    """Longest sequence in tokens (audio, prompt and response); longer samples are rejected."""
    batch_tokens: int = bounded(16384, 1, how=True)
    """Tokens in one forward pass, padding included."""
    head_chunk: int = bounded(1024, 1, how=True)
    """Positions taken through the output head at once."""
    part_samples: int = bounded(256, 1, 1_000_000, how=True)
    """Samples written and committed together."""
    device: Device = execution("auto")
    """auto: a GPU where there is one."""
    device_map: Literal["auto", "balanced", "sequential"] | None = execution(None)
    """Spread the layers of a teacher over all GPUs of this machine, as transformers' `device_map` does; None: one."""
    tensor_parallel_size: int = bounded(1, 1, how=True)
    """Processes, one a GPU, that each hold a share of every layer, as the model's tensor-parallel plan says."""
    serve: LaunchConfig = LaunchConfig()
    """How vLLM is started for the textual teacher, with `textual.engine: vllm` alone."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores the student, and the untouched one beside it, with vLLM."""

    base: bool = execution(True)
    """Score the untouched student too."""
    model: ModelConfig | None = None
    """Score this model in place of the trained student; nothing is trained for it. See `kdpipe evaluate --model`."""
    max_tokens: int = bounded(1024, 1)
    """Longest answer, trace included."""
    temperature: float = bounded(0.6, 0.0)
    """As in the paper."""
    top_k: int = bounded(5, 0)
    """As in the paper; 0 keeps everything."""
    top_p: float = bounded(0.5, 0.0, 1.0)
    """As in the paper."""
    seed: int = bounded(0, 0, 2**63 - 1)
    """Seeds each sample's sampling, together with its id."""
    part_samples: int = bounded(512, 1, how=True)
    """Answers written and committed together."""
    engine: EngineConfig = EngineConfig()


@dataclass(frozen=True)
class RunConfig:
    """Where outputs lie."""

    folder: str = execution(".")
    """Run folder, relative to the configuration file."""
    cache: str | None = execution(None)
    """Folder that holds `textualize/` and `cache-teachers/`; None: the run folder. Name another run's folder
    to train several students from one cache."""
    strict_env: bool = execution(False)
    """What was made with other versions of the libraries that a stage computes with is made anew. If not, kdpipe only
    says so. The same as `--strict-env`."""


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    data: DataConfig
    student: StudentConfig
    teachers: TeachersConfig
    run: RunConfig = RunConfig()
    textualize: TextualizeConfig = TextualizeConfig()
    layers: LayersConfig = LayersConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def describer(self) -> ModelConfig:
        """The model that describes clips."""
        return self.textualize.describe.model or self.student.model

    @property
    def tracer(self) -> ModelConfig:
        """The model that writes traces."""
        return self.textualize.trace.model or self.describer

    @property
    def acoustic(self) -> ModelConfig:
        """The acoustic teacher."""
        return self.teachers.acoustic.model or self.student.model
