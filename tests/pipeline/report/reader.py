"""Reads a page as a program would: its elements, their attributes, and the text of each section and table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

_VOID = frozenset(("meta", "br", "img", "link", "input", "hr", "base", "source"))


@dataclass
class Element:
    """One element: its tag, attributes, and all text in it."""

    tag: str
    attributes: dict[str, str]
    inside: tuple[str, ...]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Elements of a tag in it, in order."""
        found = []
        for child in self.children:
            found += [child] if child.tag == tag else []
            found += child.all(tag)
        return found

    def rows(self) -> list[list[str]]:
        """Cells of the rows of a table, each text with single spaces."""
        cells = ([c for c in row.children if c.tag in ("th", "td")] for row in self.all("tr"))
        return [[" ".join(cell.text.split()) for cell in row] for row in cells]


class Page(HTMLParser):
    """A page that was read; refuses elements that are not closed in their order."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.root = Element("", {}, ())
        self._open = [self.root]
        self.elements: list[Element] = []
        self.feed(self.source)
        self.close()
        assert [one.tag for one in self._open] == [""], "elements are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, tuple(one.tag for one in self._open))
        self._open[-1].children.append(element)
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    @property
    def sections(self) -> dict[str, Element]:
        """By id."""
        return {one.attributes["id"]: one for one in self.elements if one.tag == "section"}

    def table(self, label: str) -> list[list[str]]:
        """Rows of the table in the scrolling box of that name."""
        (box,) = [one for one in self.elements if one.attributes.get("aria-label") == label]
        return box.all("table")[0].rows()

    def outside(self) -> list[str]:
        """Addresses that lead out of the page."""
        names = ("src", "href", "srcset", "action", "data", "poster", "formaction", "xlink:href", "background")
        found = [one.attributes[name] for one in self.elements for name in names if name in one.attributes]
        found += re.findall(r"url\(([^)]*)\)|@import", self.source)
        return [address for address in found if not address.startswith(("#", "data:image/png;", "data:audio/wav;"))]

    def active(self) -> list[str]:
        """What could run: elements and attributes."""
        never = (
            "script",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "link",
            "foreignobject",
            "use",
            "animate",
            "set",
        )
        found = [one.tag for one in self.elements if one.tag in never]
        return found + [
            f"{one.tag} {name}"
            for one in self.elements
            for name in one.attributes
            if name.startswith("on") or name == "style"
        ]
