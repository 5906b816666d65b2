"""What the fuzz tests share: how many examples, damage to bytes and to values, and what may come out.

`KDPIPE_FUZZ` is the number of examples in all, shared out to the tests; a change is tested with a few hundred, always
the same ones. With 10,000 or more they are chosen anew each time; a failure prints how to repeat it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kdpipe.data.errors import ConfigError, ManifestError, Rejected

TOTAL = int(os.environ.get("KDPIPE_FUZZ", "600"))
FULL = 10_000
COUNTS: Counter[str] = Counter()
"""Examples that were run, by test."""

ODD_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\ud800",
    "\udcff",
    "\u202ereversed",
    "\ufeff",
    "\r\n",
    "\u2028",
    "<script>alert(1)</script>",
    "![x](javascript:alert(1))",
    "| a | b |\n---\n```",
    "{question}{0}{__class__}",
    "%s%n%d",
    "$(touch pwned)`touch pwned`;touch pwned",
    "-rf",
    "../../../../etc/passwd",
    "/etc/passwd",
    "~root/x",
    "http://example.org/a.wav",
    "file:///etc/passwd",
    "con.wav",
    "NaN",
    "null",
    "é猫🎧" * 3,
    "e\u0301",
    "x" * 70_000,
    "x/" * 3_000,
)
ODD_NUMBERS = (
    *(0, 1, -1, -0.0, 2**31, 2**32 - 1, 2**63, -(2**63) - 1, 2**64, 10**400, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
)


def fuzz(part: float, **strategies: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Like `given`, with a share of all examples, which are counted and, for the few of a change, the same each time.

    Args:
        part: the share, from 0 to 1.
        strategies: by argument of the test.
    """

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> Any:
            COUNTS[f"{test.__module__.rpartition('.')[2]}.{test.__name__}"] += 1
            return test(*args, **kwargs)

        chosen = settings(
            max_examples=max(2, round(TOTAL * part)),
            derandomize=TOTAL < FULL,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        return chosen(given(**strategies)(counted))

    return decorate


odd_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(ODD_TEXTS),
        st.sampled_from(ODD_NUMBERS),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(("a", "id", "path", "bytes")), inner, max_size=3)
    ),
    max_leaves=5,
)
"""Values of every kind that JSON and YAML know, and then some."""

_PAYLOADS = (
    *(b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x80\x00\x00\x00", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"),
    *(b"\xef\xbb\xbf", b"\r\n", b"\n", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"1e999", b"\xc3\x28"),
)


@st.composite
def edits(draw: st.DrawFn, most: int = 6) -> list[tuple[str, float, int, bytes]]:
    """What `apply` does to bytes: kind, place as a share of the length, length, content."""
    kinds = st.sampled_from(("flip", "write", "insert", "delete", "repeat", "cut", "zero"))
    place = st.floats(0, 1, exclude_max=True)
    content = st.one_of(st.sampled_from(_PAYLOADS), st.binary(max_size=12))
    one = st.tuples(kinds, place, st.integers(1, 64), content)
    return draw(st.lists(one, min_size=1, max_size=most))


def apply(data: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    """The bytes after some edits."""
    out = bytearray(data)
    for kind, share_, length, content in changes:
        at = int(share_ * len(out))
        if kind == "flip" and out:
            out[at] ^= 1 << length % 8
        elif kind == "write":
            out[at : at + len(content)] = content
        elif kind == "insert":
            out[at:at] = content
        elif kind == "delete":
            del out[at : at + length]
        elif kind == "repeat":
            out[at:at] = out[at : at + length] * 3
        elif kind == "cut":
            del out[at:]
        elif kind == "zero":
            out[at : at + length] = bytes(len(out[at : at + length]))
    return bytes(out)


@contextmanager
def refusing(place: str, *errors: type[BaseException]) -> Iterator[None]:
    """Lets the errors of a contract pass, which must give a reason and name the place."""
    try:
        yield
    except errors as error:
        said = str(error)
        assert said.strip() and said.strip() != type(error).__name__, f"{type(error).__name__} without a reason"
        assert place in said, f"does not name {place!r}: {said[:500]}"
        if isinstance(error, ConfigError | ManifestError):
            assert error.problems and all(problem.strip() for problem in error.problems)
        if isinstance(error, Rejected):
            assert error.reason.replace("_", "").isalpha() and error.detail.strip()


def forget() -> None:
    """Empties what kdpipe remembers of files within one process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kdpipe."):
            for found in list(vars(module).values()):
                if isinstance(found, _CACHED):
                    found.cache_clear()


_CACHED = type(lru_cache(maxsize=1)(len))
