"""vLLM, fed continuously: requests go in while finished ones come out, on a GPU or on the CPU build.

The engine runs in processes of its own, so that it works while this one decodes clips and writes results. Where they
die they are started anew, and the requests that were in them are asked again; see `flight`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.data.hashing import digest
from kdpipe.stages.config import EngineConfig
from kdpipe.stages.models.flight import ENGINE_DIED, Flight
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.launch import LIVENESS_SECONDS, MEMORY, Launched, Scoring, start

_QUEUED_PER_SEQUENCE = 2  # requests in the engine for each it can run at once, so that it never waits for us


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

    def __init__(
        self, launched: Launched, encoder: Encoder, config: EngineConfig, memory: str, say: Callable[[str], None]
    ):
        self._launched = launched
        self._max_restarts = config.max_restarts
        self._memory = memory
        self._say = say
        self._flight: Flight[tuple[Mapping[str, Any], Any]] = Flight()
        self._refused: list[tuple[str, Any]] = []
        self._count = 0
        self._max_length = int(launched.llm.model_config.max_model_len)
        self.encoder = encoder
        self.capacity = _QUEUED_PER_SEQUENCE * config.max_num_seqs

    def submit(self, request: Request) -> str:
        """Queues a request; returns the name under which `step` will give it back.

        Raises:
            Rejected: `too_long` (prompt and one token more than `engine.max_model_len`), `audio_too_long` or
                `audio_too_short`.
        """
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
        return self.ask(prompt, _sampling_params(request.sampling))

    def step(self) -> list[tuple[str, Completion | Rejected]]:
        """Waits for the engine's next step; gives the requests that it finished, or that are rejected as in `finished`.

        Raises:
            KdpipeError: the engine died once more than `engine.max_restarts` allows, or does not start again.
        """
        return [(name, it if isinstance(it, Rejected) else _completion(it)) for name, it in self.finished()]

    def ask(self, prompt: Mapping[str, Any], params: Any) -> str:
        """Queues a request in vLLM's own terms; returns the name under which `finished` will give it back.

        Args:
            prompt: what vLLM takes as a prompt, text or token ids.
            params: `SamplingParams` whose output comes once, when the request is finished.
        """
        name = str(self._count)
        self._count += 1
        self._flight.ask(name, (prompt, params))
        self._send()
        return name

    def finished(self) -> list[tuple[str, Any]]:
        """Waits for the engine's next step; gives vLLM's `RequestOutput` of each request that it finished.

        In its place stands a `Rejected` where vLLM refused the request (`engine_refused`, with its own words), or where
        the engine dies of it (`engine_died`).

        Raises:
            KdpipeError: the engine died once more than `engine.max_restarts` allows, or does not start again.
        """
        self._send()
        detail = "vLLM's engine died of it twice while nothing else was in it"
        given = self._refused + [(name, Rejected(ENGINE_DIED, detail)) for name in self._flight.give_up()]
        if given:
            self._refused = []
            return given
        outputs = self._outputs()
        if outputs is None:
            self._start_again()
            return []
        for output in outputs:
            self._flight.answer(output.request_id)
        return [(output.request_id, _broken(output) or output) for output in outputs]

    def forget(self, names: Iterable[str]) -> None:
        """Ends requests that nobody waits for any more; those that are done, or lost with the engine, are no error."""
        from vllm.v1.engine.exceptions import EngineDeadError
        from zmq import ZMQError

        names, llm = list(names), self._launched.llm
        for name in names:
            self._flight.drop(name)
        if llm is not None:  # as it is where the engine did not start again
            with contextlib.suppress(EngineDeadError, ZMQError):
                llm.abort_request(names)

    def _send(self) -> None:
        """Gives the engine the requests that are due; that it is dead is found out by whoever waits for an answer."""
        for name, (prompt, params) in self._flight.due():
            try:
                if not self._put(name, prompt, params):
                    return
            except Rejected as refused:
                self._flight.drop(name)
                self._refused.append((name, refused))

    def _put(self, name: str, prompt: Mapping[str, Any], params: Any) -> bool:
        """Gives the engine a request; False: it is dead.

        Raises:
            Rejected: `engine_refused`.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.renderers.inputs.preprocess import parse_model_prompt
        from vllm.v1.engine.exceptions import EngineDeadError
        from zmq import ZMQError

        llm = self._launched.llm
        tokenization = llm.renderer.default_cmpl_tok_params.with_kwargs(add_special_tokens=False)
        rendered = None
        try:
            parsed = parse_model_prompt(llm.model_config, prompt)
            (rendered,) = llm.renderer.render_cmpl([parsed], tokenization)
            llm.add_request(name, rendered, params)
        except (EngineDeadError, ZMQError):  # the latter where vLLM closes its sockets at that moment
            if not llm.engine_core.resources.engine_dead:
                raise
            return False
        except (VLLMClientError, ValueError, RuntimeError) as error:
            self._forget_clips(rendered)
            raise Rejected("engine_refused", " ".join(str(error).split())) from error
        return True

    def _outputs(self) -> list[Any] | None:
        """Waits until there is an output, and gives those that are finished; None: the engine is found dead.

        vLLM's own wait does not end when the engine core is killed outright, as the system does where memory is short.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        core = self._launched.llm.engine_core
        arrival = core.outputs_queue.not_empty
        try:
            while True:
                with arrival:
                    if core.outputs_queue.queue or arrival.wait(LIVENESS_SECONDS):
                        break
                core.ensure_alive()
            return [output for output in self._launched.llm.step() if output.finished]
        except EngineDeadError:
            return None

    def _start_again(self) -> None:
        name, ended = self.encoder.folder.name, self._launched.signals()
        what = self._flight.die()
        count, most = self._flight.restarts, self._max_restarts
        if count > most:
            often = "" if count == 1 else f" {count} times"
            nothing = "" if self._flight.answered else " It answered nothing at all; see kdpipe doctor."
            raise KdpipeError(
                f"{name}: the vLLM engine died{often}{ended}, and max_restarts is {most}; its own message stands above."
                f"{nothing} What was committed is kept, and the same command goes on from there. "
                f"If memory ran out, lower {self._memory}."
            )
        self._say(f"{name}: the vLLM engine died{ended} {what}. Starting it again ({count} of {most})")
        self._launched.renew()

    def _forget_clips(self, rendered: Any) -> None:
        """Takes the clips of a request that never reached the engine out of the sender's cache.

        Otherwise the next request with the same clip would send its hash alone, which the engine does not know.
        """
        cache = self._launched.llm.renderer.mm_processor_cache
        if rendered is not None and cache is not None:
            for hashes in rendered.get("mm_hashes", {}).values():
                for value in hashes:
                    cache.invalidate(value)


@contextlib.contextmanager
def open_engine(
    folder: ModelFolder,
    config: EngineConfig,
    *,
    clips: int,
    seed: int,
    scoring: Scoring | None = None,
    memory: str = MEMORY,
    say: Callable[[str], None] = print,
) -> Iterator[Engine]:
    """Starts vLLM, and stops it with all its processes however the block ends.

    vLLM's log shows warnings and errors (errors alone on the CPU build); the environment variable `KDPIPE_VLLM_LOG`
    sets another level. Sampling defaults in the model's generation_config.json are not used, only its end tokens.

    Args:
        folder: the model.
        config: how vLLM is started.
        clips: most clips in one request; 0 for text only.
        seed: of the engine itself; requests bring their own.
        scoring: for requests that ask for log-probabilities of the prompt; None: there are none.
        memory: keys of the configuration to lower where memory runs out, for messages.
        say: prints one line for the user when an engine that died is started again.

    Raises:
        ModelError: the tokenizer or the feature extractor cannot be used.
        KdpipeError: vLLM does not start.
    """
    encoder = Encoder(folder)
    with Launched(partial(start, folder, config, clips, seed, scoring, memory)) as launched:
        yield Engine(launched, encoder, config, memory, say)


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


def _broken(output: Any) -> Rejected | None:
    """Why vLLM ended a request before it was done, as `engine_refused`; None where it was done."""
    reasons = {str(item.finish_reason) for item in output.outputs} - {"stop", "length"}
    if reasons or not output.outputs:
        return Rejected("engine_refused", f"vLLM ended the request with {', '.join(sorted(reasons)) or 'no output'}")
    return None


def _completion(output: Any) -> Completion:
    outputs = tuple(
        Output(item.text, str(item.finish_reason), len(item.token_ids))
        for item in sorted(output.outputs, key=lambda item: item.index)
    )
    return Completion(len(output.prompt_token_ids or ()), outputs)
