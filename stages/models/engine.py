"""vLLM, fed continuously: requests go in while finished ones come out, on a GPU or on the CPU build.

The engine runs in processes of its own, so that it works while this one decodes clips and writes results.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.data.hashing import digest
from kdpipe.stages.config import EngineConfig
from kdpipe.stages.models import reaper
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Encoder

_QUEUED_PER_SEQUENCE = 2  # requests in the engine for each it can run at once, so that it never waits for us
_LIVENESS_SECONDS = 1.0


@dataclass(frozen=True)
class Sampling:
    """How a request is decoded.

    Attributes:
        max_tokens: longest output.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 keeps everything.
        top_k: 0 keeps everything.
        n: outputs drawn; greedy decoding has one.
        seed: of this request's random numbers; output `i` uses `seed + i`.
        regex: expression that the whole output matches (vLLM structured output).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int | None = None
    regex: str | None = None


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        prompt: chat-templated text, one audio placeholder a clip (`Encoder.prompt_text`).
        sampling: how it is decoded.
        clips: float32 `[frames]` each, mono, at the model's rate.
    """

    prompt: str
    sampling: Sampling
    clips: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Output:
    """One of a request's outputs; `finish_reason` is `stop` or `length`, `tokens` counts the end token too."""

    text: str
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Completion:
    """A finished request: length of its prompt in tokens (audio included), and its outputs in order."""

    prompt_tokens: int
    outputs: tuple[Output, ...]


def seed_of(seed: int, *names: str) -> int:
    """A seed for one request, from the configured one and names (the sample's id), whatever the order of work.

    31 bits, so that every generator takes it.
    """
    return int(digest([seed, *names])[:8], 16) >> 1


class Engine:
    """A running engine; made by `open_engine`. Takes requests and is stepped by one thread."""

    def __init__(self, llm: Any, encoder: Encoder, capacity: int):
        self._llm = llm
        self._max_length = int(llm.model_config.max_model_len)
        self._tokenization = llm.renderer.default_cmpl_tok_params.with_kwargs(add_special_tokens=False)
        self._submitted = 0
        self._errors: dict[str, Rejected] = {}
        self.encoder = encoder
        self.capacity = capacity

    def submit(self, request: Request) -> str:
        """Queues a request; returns the name under which `step` will give it back.

        Raises:
            Rejected: `too_long` (prompt and one token more than `engine.max_model_len`), `audio_too_long`,
                `audio_too_short`, or `engine_refused` with vLLM's own words.
            KdpipeError: the engine died.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.renderers.inputs.preprocess import parse_model_prompt
        from vllm.v1.engine.exceptions import EngineDeadError

        length = len(self.encoder.prompt_ids(request.prompt, [len(clip) for clip in request.clips]))
        if length >= self._max_length:
            raise Rejected(
                "too_long",
                f"the prompt has {length} tokens, audio included, and engine.max_model_len is {self._max_length}",
            )
        prompt: dict[str, Any] = {"prompt": request.prompt}
        if request.clips:
            rate = self.encoder.rate
            prompt["multi_modal_data"] = {"audio": [(clip, rate) for clip in request.clips]}
        name = str(self._submitted)
        self._submitted += 1
        rendered = None
        try:
            parsed = parse_model_prompt(self._llm.model_config, prompt)
            (rendered,) = self._llm.renderer.render_cmpl([parsed], self._tokenization)
            self._llm.add_request(name, rendered, _sampling_params(request.sampling))
        except EngineDeadError as error:
            raise self._death() from error
        except (VLLMClientError, ValueError, RuntimeError) as error:
            self._forget_clips(rendered)
            raise Rejected("engine_refused", " ".join(str(error).split())) from error
        return name

    def step(self) -> list[tuple[str, Completion | Rejected]]:
        """Waits for the engine's next step; gives the requests that it finished.

        Raises:
            KdpipeError: the engine died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self._await_output()
            outputs = self._llm.step()
        except EngineDeadError as error:
            raise self._death() from error
        return [(output.request_id, _completion(output)) for output in outputs if output.finished]

    def _await_output(self) -> None:
        """Waits until there is an output, or the engine is found dead.

        vLLM's own wait does not end when the engine core is killed outright, as the system does where memory is short.
        """
        core = self._llm.engine_core
        arrival = core.outputs_queue.not_empty
        while True:
            with arrival:
                if core.outputs_queue.queue or arrival.wait(_LIVENESS_SECONDS):
                    return
            core.ensure_alive()

    def _death(self) -> KdpipeError:
        return KdpipeError(
            f"{self.encoder.folder.name}: the vLLM engine died; its own message stands above. What was committed is "
            "kept, and the same command goes on from there. If memory ran out, lower engine.max_num_seqs, "
            "engine.max_model_len or engine.gpu_memory_utilization."
        )

    def _forget_clips(self, rendered: Any) -> None:
        """Takes the clips of a request that never reached the engine out of the sender's cache.

        Otherwise the next request with the same clip would send its hash alone, which the engine does not know.
        """
        cache = self._llm.renderer.mm_processor_cache
        if rendered is not None and cache is not None:
            for hashes in rendered.get("mm_hashes", {}).values():
                for value in hashes:
                    cache.invalidate(value)


@contextlib.contextmanager
def open_engine(folder: ModelFolder, config: EngineConfig, *, clips: int, seed: int) -> Iterator[Engine]:
    """Starts vLLM, and stops it with all its processes however the block ends.

    vLLM's log shows warnings and errors (errors alone on the CPU build); the environment variable `KDPIPE_VLLM_LOG`
    sets another level. Sampling defaults in the model's generation_config.json are not used, only its end tokens.

    Args:
        folder: the model.
        config: how vLLM is started.
        clips: most clips in one request; 0 for text only.
        seed: of the engine itself; requests bring their own.

    Raises:
        ModelError: the tokenizer or the feature extractor cannot be used.
        KdpipeError: vLLM does not start.
    """
    encoder = Encoder(folder)
    mark = uuid.uuid4().hex
    watcher = reaper.watch(mark)
    os.environ[reaper.MARK] = mark
    llm = None
    try:
        llm = _start(folder, config, clips, seed)
        yield Engine(llm, encoder, _QUEUED_PER_SEQUENCE * config.max_num_seqs)
    finally:
        try:
            _stop(llm)
        finally:
            reaper.end(mark)
            os.environ.pop(reaper.MARK, None)
            watcher.kill()
            watcher.wait()
        llm = None
        gc.collect()


def _start(folder: ModelFolder, config: EngineConfig, clips: int, seed: int) -> Any:
    level = _set_environment()
    from vllm import EngineArgs, LLMEngine
    from vllm.config import StructuredOutputsConfig
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    settings: dict[str, Any] = {}
    if current_platform.is_cpu():
        settings["kv_cache_memory_bytes"] = config.cpu_kv_cache_gib << 30
    else:
        settings["gpu_memory_utilization"] = config.gpu_memory_utilization
    if folder.hears:
        settings["limit_mm_per_prompt"] = {"audio": max(clips, 1)}
    if folder.family == "qwen2_5_omni":
        settings["limit_mm_per_prompt"] |= {"image": 0, "video": 0}
    try:
        args = EngineArgs(
            model=str(folder.path),
            dtype=folder.settings.dtype,
            trust_remote_code=folder.settings.trust_remote_code,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel_size,
            enforce_eager=config.enforce_eager,
            seed=seed,
            structured_outputs_config=StructuredOutputsConfig(backend="xgrammar"),
            disable_log_stats=True,
            use_tqdm_on_load=level in ("INFO", "DEBUG"),
            **settings,
        )
        return LLMEngine.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise KdpipeError(
            f"{folder.name}: vLLM could not start the model in {folder.path}: {reason}\n"
            "Messages of the engine stand above, more with KDPIPE_VLLM_LOG=info. If it is memory: lower "
            "engine.max_num_seqs, engine.max_model_len or engine.gpu_memory_utilization (CPU: engine.cpu_kv_cache_gib)."
        ) from error


def _set_environment() -> str:
    """Sets what vLLM and its processes read from the environment; returns the log level."""
    # The CPU build warns a dozen times at every start of what a user cannot change.
    quiet = "warning" if torch.cuda.is_available() else "error"
    level = os.environ.get("KDPIPE_VLLM_LOG", quiet).upper()
    os.environ["VLLM_LOGGING_LEVEL"] = level
    # Process titles would otherwise be written over the environment that the reaper reads.
    os.environ["SPT_NOENV"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    # A forked process would not carry the reaper's mark, nor go well with our threads.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore:resource_tracker:UserWarning")
    return level


def _stop(llm: Any) -> None:
    """Takes down the client side; the engine's processes hold nothing that is worth their slow farewell."""
    if llm is None:
        return
    log = logging.getLogger("vllm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.suppress(Exception):
            llm.engine_core.shutdown(timeout=0)
    finally:
        log.setLevel(level)


def _sampling_params(sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        n=1 if sampling.temperature == 0 else sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        structured_outputs=StructuredOutputsParams(regex=sampling.regex) if sampling.regex is not None else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion | Rejected:
    outputs = tuple(
        Output(item.text, str(item.finish_reason), len(item.token_ids))
        for item in sorted(output.outputs, key=lambda item: item.index)
    )
    broken = {item.finish_reason for item in outputs} - {"stop", "length"}
    if broken or not outputs:
        return Rejected("engine_refused", f"vLLM ended the request with {', '.join(sorted(broken)) or 'no output'}")
    return Completion(len(output.prompt_token_ids or ()), outputs)
