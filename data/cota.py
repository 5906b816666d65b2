"""The structured trace (CoTA, chain of thought for audio): its text form, its parser and its grammar.

    <THINK><PLANNING>..</PLANNING><CAPTION>..</CAPTION><REASONING>..</REASONING><SUMMARY>..</SUMMARY></THINK><RESPONSE>..</RESPONSE>

The schema is that of Audio-Reasoner, as used by Yang et al. (arXiv 2509.18579); the section names are configurable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kdpipe.data.errors import ConfigError, Rejected

DEFAULT_SECTIONS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")

# ASCII, because a case-insensitive S or K would otherwise match letters of other scripts (U+017F, U+212A).
_FLAGS = re.IGNORECASE | re.ASCII
_NAME = re.compile(r"[A-Z][A-Z_]*")
_REGEX_SPECIAL = re.compile(r"[\\.^$*+?()\[\]{}|]")


@dataclass(frozen=True)
class Trace:
    """A parsed trace.

    Attributes:
        sections: text of each section by its name, in the order of the schema.
        response: the final answer.
    """

    sections: Mapping[str, str]
    response: str


@dataclass(frozen=True)
class TraceSchema:
    """Which sections a trace holds, and the tags that carry them.

    Attributes:
        sections: names of the sections inside the thinking part, in order.
        think: tag around the sections.
        response: tag around the final answer.

    Raises:
        ConfigError: a name is not upper-case letters and underscores, or stands twice, or there is no section.
    """

    sections: tuple[str, ...] = DEFAULT_SECTIONS
    think: str = "THINK"
    response: str = "RESPONSE"

    def __post_init__(self) -> None:
        names = (self.think, *self.sections, self.response)
        problems = [
            f"trace tag {name!r}: use upper-case letters and underscores, a letter first"
            for name in names
            if not _NAME.fullmatch(name)
        ]
        problems += [
            f"trace tag {name!r} is used {names.count(name)} times: every section needs a name of its own"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        if not self.sections:
            problems.append("the trace schema has no sections: name at least one, such as REASONING")
        if problems:
            raise ConfigError(problems)

    def render(self, trace: Trace) -> str:
        """The canonical text of a trace: no space between tags, each text stripped.

        Args:
            trace: a trace with exactly the sections of this schema.

        Returns:
            The text; `parse` gives the (stripped) trace back.

        Raises:
            Rejected: `trace_malformed` when a section is missing, unknown, empty, or holds a tag of the schema.
        """
        unknown = [name for name in trace.sections if name not in self.sections]
        missing = [name for name in self.sections if name not in trace.sections]
        if unknown or missing:
            raise _malformed(
                "; ".join(
                    [f"section {name} is missing" for name in missing]
                    + [f"section {name} is not in the schema" for name in unknown]
                )
            )
        texts = {name: trace.sections[name].strip() for name in self.sections}
        for name, text in {**texts, self.response: trace.response.strip()}.items():
            if not text:
                raise _malformed(f"<{name}> is empty")
            if tag := self._tags.search(text):
                raise _malformed(f"{tag[0]} stands inside <{name}>")
        inner = "".join(f"<{name}>{text}</{name}>" for name, text in texts.items())
        return f"<{self.think}>{inner}</{self.think}><{self.response}>{trace.response.strip()}</{self.response}>"

    def parse(self, text: str) -> Trace:
        """Read a trace: tolerant of space around tags and texts and of the case of tags, strict on everything else.

        A `<` that does not begin a tag of this schema is text.

        Args:
            text: a whole trace.

        Returns:
            The trace, its texts stripped.

        Raises:
            Rejected: `trace_empty` for a blank text; `trace_malformed` when a section is missing, repeated, out of
                order, nested, unclosed or empty, or when text stands outside the tags.
        """
        if not text.strip():
            raise Rejected("trace_empty", "the trace is empty")
        found = list(self._tags.finditer(text))
        got = [match[1] + match[2].upper() for match in found]
        if got != self._expected:
            raise _malformed(self._difference(got))
        edges = [0, *(edge for match in found for edge in match.span()), len(text)]
        texts = [text[begin:end].strip() for begin, end in zip(edges[::2], edges[1::2], strict=True)]
        # texts[0] stands before the first tag and texts[i] behind tag i - 1: a section where that tag opens one.
        content = {}
        for after, between in zip(["", *got], texts, strict=True):
            if after in self.sections or after == self.response:
                if not between:
                    raise _malformed(f"<{after}> is empty")
                content[after] = between
            elif between:
                raise _malformed(f"text outside the tags: {_excerpt(between)!r}")
        response = content.pop(self.response)
        return Trace(sections=content, response=response)

    def regex(self, *, max_chars_per_section: int | None, response: Sequence[str] | None) -> str:
        """A regular expression for structured output (vLLM, xgrammar) of canonical traces.

        Every text that `render` makes of a trace whose texts hold no `<`, keep to the length, and whose response is
        among `response` satisfies it; every text that satisfies it can be parsed. Only literals, classes, bounded
        repetition and groups are used.

        Args:
            max_chars_per_section: most characters in a section, and in a free response; None for no bound.
            response: the responses to choose from; None for a free response.

        Returns:
            The expression, to be matched against the whole output.

        Raises:
            ConfigError: the bound is below 1, or a choice is blank or holds a tag of the schema.
        """
        if max_chars_per_section is not None and max_chars_per_section < 1:
            raise ConfigError([f"max_chars_per_section is {max_chars_per_section}: at least 1 is needed"])
        most = "" if max_chars_per_section is None else max_chars_per_section - 1
        # The first character is no space, so that a section cannot be blank; render() strips, so nothing is lost.
        free = rf"[^<\s][^<]{{0,{most}}}"
        inner = "".join(f"<{name}>{free}</{name}>" for name in self.sections)
        if response is None:
            answer = free
        else:
            choices = [choice.strip() for choice in response]
            bad = [choice for choice in choices if not choice or self._tags.search(choice)]
            if bad or not choices:
                raise ConfigError([f"{choice!r} cannot be a response choice" for choice in bad] or ["no choices"])
            answer = "(" + "|".join(_escape(choice) for choice in dict.fromkeys(choices)) + ")"
        return f"<{self.think}>{inner}</{self.think}><{self.response}>{answer}</{self.response}>"

    def extract_response(self, text: str) -> str | None:
        """The answer in a model's output, however broken the rest: for evaluation.

        Args:
            text: what a model wrote.

        Returns:
            The stripped text behind the last `<RESPONSE>`, up to the closing tag or, where the output was cut, to the
            end (a closing tag cut in two is dropped); None when there is no such tag.
        """
        openings = list(re.finditer(f"<{self.response}>", text, _FLAGS))
        if not openings:
            return None
        answer = text[openings[-1].end() :]
        closing = f"</{self.response}>"
        if match := re.search(closing, answer, _FLAGS):
            return answer[: match.start()].strip()
        cut = answer.rfind("</")
        if cut >= 0 and closing.startswith(answer[cut:].upper()):
            answer = answer[:cut]
        return answer.strip()

    @cached_property
    def _tags(self) -> re.Pattern[str]:
        return re.compile(f"<(/?)({'|'.join((self.think, *self.sections, self.response))})>", _FLAGS)

    @cached_property
    def _expected(self) -> list[str]:
        sections = [tag for name in self.sections for tag in (name, f"/{name}")]
        return [self.think, *sections, f"/{self.think}", self.response, f"/{self.response}"]

    def _difference(self, got: Sequence[str]) -> str:
        """Say how the tags of a text differ from those of the schema, the plainest reason first."""
        missing = [tag for tag in self._expected if tag not in got]
        if missing:
            absent = [name for name in missing if not name.startswith("/")]
            unclosed = [name[1:] for name in missing if name.startswith("/") and name[1:] not in absent]
            return "; ".join(
                [f"section <{name}> is missing" for name in absent] + [f"<{name}> is not closed" for name in unclosed]
            )
        repeated = [tag for tag in self._expected if got.count(tag) > 1]
        if repeated:
            return "; ".join(f"<{tag}> stands {got.count(tag)} times" for tag in repeated)
        found, wanted = next((a, b) for a, b in zip(got, self._expected, strict=True) if a != b)
        return f"<{found}> stands where <{wanted}> belongs"


def _malformed(detail: str) -> Rejected:
    return Rejected("trace_malformed", detail)


def _excerpt(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _escape(literal: str) -> str:
    """Escape a literal for a regular expression, and nothing more: xgrammar knows few escapes (re.escape has many)."""
    return _REGEX_SPECIAL.sub(lambda special: "\\" + special[0], literal)
