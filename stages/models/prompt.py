"""From a prompt template to the text a model reads.

A template is plain text with `{question}`-like fields. The filled text becomes the user's message, after the
clips; the model's own chat template turns the messages into one string, ending where the answer starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdpipe.data.errors import ModelError, Rejected
from kdpipe.data.manifest import Sample

_FIELD = re.compile(r"\{(\w+)\}")


def unknown_fields(template: str, allowed: Iterable[str]) -> list[str]:
    """Names in braces that the template may not use."""
    return sorted(set(_FIELD.findall(template)) - set(allowed))


def choices_text(choices: Sequence[str]) -> str:
    """`Choices: A, B, C`, or nothing when there are none."""
    return f"Choices: {', '.join(choices)}" if choices else ""


def fill(template: str, sample: Sample, description: str | None = None) -> str:
    """The template with the sample's question, choices and description put in, outer white space removed."""
    values = {
        "question": sample.question,
        "choices": choices_text(sample.choices),
        "description": description or "",
    }
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), template).strip()


def messages(text: str, *, system: str | None = None, clips: int = 0) -> list[dict[str, Any]]:
    """Chat messages: an optional system message, then the user's clips followed by the text."""
    content: Any = text
    if clips:
        content = [{"type": "audio", "audio": "clip"} for _ in range(clips)] + [{"type": "text", "text": text}]
    turns = [{"role": "user", "content": content}]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def render(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    """Applies the chat template of a tokenizer or processor; the string ends where the answer starts.

    Raises:
        ModelError: the template is broken, wants other arguments, or reaches for what Jinja's sandbox forbids.
    """
    from jinja2 import TemplateError

    others = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **kwargs)
    except (TemplateError, *others) as error:
        name = getattr(tokenizer, "name_or_path", "")
        raise ModelError(f"{name}: the chat template cannot be applied ({error}). Restore it.") from None


def refuse_special(texts: Iterable[str | None], special: Iterable[str]) -> None:
    """Rejects a sample whose own words contain one of the model's special tokens.

    Such a text could open another turn or claim another clip.

    Raises:
        Rejected: `special_token_in_text`, naming the token.
    """
    for text in texts:
        for token in special:
            if text and token in text:
                raise Rejected("special_token_in_text", f"the text contains the special token {token!r}")
