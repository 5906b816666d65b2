"""How vLLM is started, started anew, and ended."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.config import EngineConfig
from kdpipe.stages.models import reaper
from kdpipe.stages.models.folder import ModelFolder

MEMORY = "engine.max_num_seqs, engine.max_model_len or engine.gpu_memory_utilization (CPU: engine.cpu_kv_cache_gib)"
"""Keys to lower where memory runs out, of an engine that generates."""
LIVENESS_SECONDS = 1.0
"""How long vLLM is waited for before its processes are looked at."""


@dataclass(frozen=True)
class Scoring:
    """What an engine needs that also gives the log-probabilities of prompts.

    Attributes:
        entries: most entries that may be asked of a position.
        batch_tokens: positions taken through the model, and so through its output head, in one step. vLLM does not
            count the logits of a prompt when it measures how much memory is left for its cache.
    """

    entries: int
    batch_tokens: int


class Launched:
    """vLLM with all its processes, one engine after another; a context manager, after which nothing of it is left.

    Args:
        start: starts an engine.
    """

    def __init__(self, start: Callable[[], Any]):
        self._start = start
        self._mark = uuid.uuid4().hex
        self.llm: Any = None

    def __enter__(self) -> Launched:
        self._watcher = reaper.watch(self._mark)
        os.environ[reaper.MARK] = self._mark
        try:
            self.renew()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._end()
        finally:
            os.environ.pop(reaper.MARK, None)
            self._watcher.kill()
            self._watcher.wait()

    def renew(self) -> None:
        """Starts an engine, after the end of the one before and of all its processes.

        Raises:
            KdpipeError: vLLM does not start.
        """
        self._end()
        self.llm = self._start()

    def signals(self) -> str:
        """How the engine's process ended where a signal ended it, as ` (signal 9)`; else nothing."""
        processes = self.llm.engine_core.resources.engine_manager.processes
        codes = {process.exitcode for process in processes}
        return "".join(f" (signal {-code})" for code in sorted(code for code in codes if code is not None and code < 0))

    def _end(self) -> None:
        try:
            stop(self.llm)
        finally:
            reaper.end(self._mark)
        self.llm = None
        gc.collect()


def start(
    folder: ModelFolder, config: EngineConfig, clips: int, seed: int, scoring: Scoring | None, memory: str
) -> Any:
    """Starts vLLM's engine in processes of its own; `kdpipe.stages.models.engine.open_engine` says how.

    Raises:
        KdpipeError: vLLM does not start.
    """
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
    if scoring is not None:
        settings |= _scoring_settings(config, scoring)
    try:
        args = EngineArgs(
            model=str(folder.path),
            dtype=folder.settings.dtype,
            trust_remote_code=folder.settings.trust_remote_code,
            load_format="safetensors",
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
        llm = LLMEngine.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
        _await_first_answer(llm)
        return llm
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise KdpipeError(
            f"{folder.name}: vLLM could not start the model in {folder.path}: {reason}\n"
            f"Messages of the engine stand above, more with KDPIPE_VLLM_LOG=info. If it is memory: lower {memory}."
        ) from error


def _await_first_answer(llm: Any) -> None:
    """Asks what vLLM asks with the first request; there it waits without end where the engine is dead by then."""
    asking = Thread(target=llm.get_supported_tasks, daemon=True)
    asking.start()
    while asking.is_alive():
        llm.engine_core.ensure_alive()
        asking.join(LIVENESS_SECONDS)


def _scoring_settings(config: EngineConfig, scoring: Scoring) -> dict[str, Any]:
    return {
        "max_logprobs": scoring.entries,
        # A position that is found in the prefix cache is not computed, and has no log-probabilities.
        "enable_prefix_caching": False,
        "max_num_batched_tokens": max(scoring.batch_tokens, config.max_num_seqs),
        # Logits of a bfloat16 product would be rounded by 0.06 at a logit of 20.
        "hf_overrides": {"head_dtype": "float32"},
    }


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


def stop(llm: Any) -> None:
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
