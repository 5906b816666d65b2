"""Says at the end how many examples the fuzz tests ran."""

from __future__ import annotations

from typing import Any

from .fuzzing import COUNTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if COUNTS:
        terminalreporter.section("fuzz")
        for name, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{count:>7,} {name}")
        terminalreporter.write_line(f"{sum(COUNTS.values()):>7,} examples in all")
