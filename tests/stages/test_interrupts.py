"""One Ctrl-C that comes twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from kdpipe.stages import interrupts
from kdpipe.stages.interrupts import Interrupts, handle


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What time it is; `Interrupts` are in charge of SIGINT meanwhile."""
    now = [100.0]
    monkeypatch.setattr(interrupts, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGINT, Interrupts())
    yield now
    signal.signal(signal.SIGINT, before)


def test_two_within_a_second_are_one(clock: list[float]) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    clock[0] += 0.9
    signal.raise_signal(signal.SIGINT)
    clock[0] += 0.1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_so_they_are_for_another_handler_and_where_it_hands_back_between_them(clock: list[float]) -> None:
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        handle(signal.SIGINT, before)

    before = handle(signal.SIGINT, hear)
    assert before is signal.default_int_handler
    for _ in range(3):
        signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGINT]
    clock[0] += 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_elsewhere_handlers_are_set_as_usual() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert handle(signal.SIGTERM, signal.SIG_IGN) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    handle(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGTERM) == before
