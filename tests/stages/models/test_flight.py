"""Requests in an engine that dies: a scripted engine under the real `Engine`, `Flight` and `drive`."""

from __future__ import annotations

import math
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.stages.config import EngineConfig
from kdpipe.stages.models.drive import drive
from kdpipe.stages.models.engine import Completion, Engine, Request, Sampling
from kdpipe.stages.models.flight import Flight


class Life:
    """What stands for vLLM's processes: one engine after another, each with the requests that it was given."""

    def __init__(self) -> None:
        self.llm: Any = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=100), abort_request=lambda names: self._end(names)
        )
        self.starts, self.dead, self.inside = 1, False, {}

    def renew(self) -> None:
        time.sleep(0.002)  # a start takes longer than a clip does to be decoded
        self.starts, self.dead, self.inside = self.starts + 1, False, {}

    def signals(self) -> str:
        return " (signal 9)"

    def _end(self, names: list[str]) -> None:
        for name in names:
            self.inside.pop(name, None)


class Scripted(Engine):
    """Runs the oldest `max_num_seqs` of its requests and finishes some of them a step; dies as it is told.

    Args:
        poison: prompts of which it dies, when they arrive or when they run.
        on_arrival: which of the two.
        kills: steps, counted over all its lives, at which it dies for no reason.
        refused: prompts that it refuses.
    """

    def __init__(
        self, poison=(), *, on_arrival=False, kills=(), refused=(), max_num_seqs=4, max_restarts=1000, seed=0
    ) -> None:
        encoder: Any = SimpleNamespace(
            prompt_ids=lambda prompt, frames: [0], rate=16_000, folder=SimpleNamespace(name="model")
        )
        config = EngineConfig(max_num_seqs=max_num_seqs, max_restarts=max_restarts)
        self.life, self.said, self.steps = Life(), [], 0
        launched: Any = self.life
        super().__init__(launched, encoder, config, "engine.max_num_seqs", self.said.append)
        self.poison, self.on_arrival, self.kills, self.refused = set(poison), on_arrival, set(kills), set(refused)
        self.running = max_num_seqs
        self.random = random.Random(seed)

    def _put(self, name, prompt, params) -> bool:
        if self.life.dead:
            return False
        text = prompt["prompt"]
        if text in self.refused:
            raise Rejected("engine_refused", "no")
        self.life.inside[name] = text
        self.life.dead = self.on_arrival and text in self.poison
        return True

    def _outputs(self):
        self.steps += 1
        running = dict(list(self.life.inside.items())[: self.running])
        assert running or self.life.dead or self.steps in self.kills, "waits for an engine that has nothing to do"
        if self.life.dead or self.steps in self.kills or self.poison & set(running.values()):
            return None
        done = self.random.sample(list(running), self.random.randint(0, len(running)))
        return [self._output(name, self.life.inside.pop(name)) for name in done]

    def _output(self, name: str, text: str) -> Any:
        output = SimpleNamespace(index=0, text=text, finish_reason="stop", token_ids=[1])
        return SimpleNamespace(request_id=name, outputs=[output], prompt_token_ids=[1])


def take(engine: Scripted, prompts: list[str], requests: int = 1) -> tuple[list[str], dict[str, str]]:
    """Takes items through the engine, each through so many requests; gives those that are done and those rejected."""
    done, rejected, asked = [], {}, dict.fromkeys(prompts, 0)

    def advance(item: str, completion: Completion | None) -> Request | None:
        asked[item] += 1
        if asked[item] > requests:
            done.append(item)
            return None
        return Request(item if asked[item] == 1 else f"{item} {asked[item]}", Sampling(4))

    drive(
        engine,
        prompts,
        prepare=lambda item: None,
        advance=advance,
        reject=lambda item, why: rejected.update({item: why.reason}),
    )
    assert len(done) == len(set(done)) and not done & rejected.keys()
    return sorted(done), rejected


def names(count: int) -> list[str]:
    return [f"p{n:03}" for n in range(count)]


@pytest.mark.parametrize("on_arrival", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 40])
def test_one_poisoned_sample_wherever_it_stands_is_found_with_few_restarts(count, on_arrival):
    for place in range(count):
        prompts = names(count)
        engine = Scripted({prompts[place]}, on_arrival=on_arrival, max_num_seqs=8)
        done, rejected = take(engine, prompts)
        assert rejected == {prompts[place]: "engine_died"}
        assert done == [*prompts[:place], *prompts[place + 1 :]]
        suspects = min(count, engine.capacity)
        assert 2 <= len(engine.said) <= 2 + math.ceil(math.log2(suspects))
        assert engine.life.starts == 1 + len(engine.said)
        assert engine._flight.restarts == 0


@pytest.mark.parametrize("seed", range(40))
def test_many_poisoned_samples_and_deaths_for_no_reason(seed):
    rng = random.Random(seed)
    prompts = names(rng.randint(1, 60))
    poison = set(rng.sample(prompts, rng.randint(0, min(5, len(prompts) - 1))))
    # The second request of an item, for some of them.
    killing = {f"{item} 2" if rng.random() < 0.3 else item for item in poison}
    # Far enough apart that no innocent one is alone in two of them.
    kills = {place for place in range(1, 400) if place % 12 == rng.randrange(12)}
    kills = {place for place in kills if not kills & set(range(place - 6, place))}
    engine = Scripted(
        killing, on_arrival=rng.random() < 0.5, kills=kills, max_num_seqs=rng.choice([1, 3, 8]), seed=seed
    )
    done, rejected = take(engine, prompts, requests=2)
    assert set(rejected) == poison
    assert set(rejected.values()) <= {"engine_died"}
    assert done == sorted(set(prompts) - poison)


def test_a_death_is_said_aloud_and_costs_no_sample():
    engine, given = Scripted(kills=[1], max_restarts=2), {}
    asked = [engine.submit(Request(prompt, Sampling(1))) for prompt in names(4)]
    while len(given) < len(asked):
        given |= dict(engine.step())
    assert set(given) == set(asked)
    assert [given[name].outputs[0].text for name in asked] == names(4)
    assert engine.said == [
        "model: the vLLM engine died (signal 9) with 4 samples in it, which are tried again in groups, since one of "
        "them may kill it. Starting it again (1 of 2)"
    ]


def test_an_engine_that_died_with_nothing_in_it_is_started_again():
    engine = Scripted()
    take(engine, names(3))
    engine.life.dead = True
    assert take(engine, names(6)) == (names(6), {})
    assert engine.life.starts == 2


def test_a_sample_that_was_alone_at_one_death_is_tried_once_more():
    engine = Scripted(kills=[1])
    assert take(engine, ["only"]) == (["only"], {})
    assert "with one sample in it, which is tried again by itself" in engine.said[0]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_the_budget_ends_the_run(most):
    engine = Scripted(kills=range(2, 100, 3), max_restarts=most)
    done, message = [], r"model: the vLLM engine died( \d times)? \(signal 9\), and max_restarts is \d; .*lower engine"
    with pytest.raises(KdpipeError, match=message):
        drive(
            engine,
            names(200),
            prepare=lambda item: None,
            advance=lambda item, completion: done.append(item) if completion else Request(item, Sampling(1)),
            reject=pytest.fail,
        )
    assert engine.life.starts == 1 + most == 1 + len(engine.said)
    assert 0 < len(done) < 200


def test_poisoned_samples_do_not_use_the_budget_up():
    prompts = names(300)
    poison = set(prompts[5::20])
    engine = Scripted(poison, max_num_seqs=8, max_restarts=6)
    done, rejected = take(engine, prompts)
    assert set(rejected) == poison and len(done) == 300 - len(poison)
    assert len(engine.said) > 6 * 3


def test_an_engine_that_dies_of_everything_is_no_fault_of_the_samples():
    broken = Scripted(names(100), max_restarts=16)
    with pytest.raises(KdpipeError, match=r"answered nothing at all; see kdpipe doctor"):
        drive(
            broken,
            names(100),
            prepare=lambda item: None,
            advance=lambda item, _: Request(item, Sampling(1)),
            reject=pytest.fail,
        )
    # From the tenth on.
    later, rejected = Scripted(names(100)[10:], max_restarts=16), []
    with pytest.raises(KdpipeError, match="died 17 times"):
        drive(
            later,
            names(100),
            prepare=lambda item: None,
            advance=lambda item, completion: None if completion else Request(item, Sampling(1)),
            reject=lambda item, why: rejected.append(item),
        )
    assert rejected == []


def test_what_the_engine_refuses_is_no_suspect():
    prompts = names(12)
    engine = Scripted({"p004"}, refused={"p003", "p007"})
    done, rejected = take(engine, prompts)
    assert rejected == {"p003": "engine_refused", "p004": "engine_died", "p007": "engine_refused"}
    assert len(done) == 9


def test_suspects_that_nobody_waits_for_any_more_are_forgotten():
    engine = Scripted({"b"})
    asked = [engine.submit(Request(prompt, Sampling(1))) for prompt in "abc"]
    while not engine.said:
        engine.step()
    engine.forget(asked)
    assert take(engine, ["d", "e"]) == (["d", "e"], {})


def test_an_engine_that_does_not_start_again_says_why(monkeypatch):
    engine = Scripted({"b"})
    asked = [engine.submit(Request(prompt, Sampling(1))) for prompt in "ab"]

    def renew() -> None:
        engine.life.llm = None
        raise KdpipeError("vLLM could not start the model")

    monkeypatch.setattr(engine.life, "renew", renew)
    with pytest.raises(KdpipeError, match="could not start"):
        engine.step()
    engine.forget(asked)


def test_a_killer_waits_for_another_to_get_through():
    flight: Flight[str] = Flight()
    flight.ask("killer", "")
    for _ in range(2):
        assert [name for name, _ in flight.due()] == ["killer"]
        flight.ask("other", "")
        flight.die()
    assert flight.give_up() == []
    assert [name for name, _ in flight.due()] == ["other"]
    flight.answer("other")
    assert (flight.restarts, flight.give_up(), flight.restarts) == (2, ["killer"], 0)
