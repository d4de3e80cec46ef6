"""Documents with sections that are written by programs, between marks; the text around them is people's."""

from __future__ import annotations


def section_of(document: str, name: str) -> str:
    """What stands between a section's marks. Raises ValueError without them."""
    begin, end = _marks(name)
    start = document.index(begin) + len(begin)
    return document[start : document.index(end, start)]


def with_section(document: str, name: str, text: str) -> str:
    """The document with another text between the marks. Raises ValueError without them."""
    begin, _ = _marks(name)
    start = document.index(begin) + len(begin)
    return document[:start] + text + document[start + len(section_of(document, name)) :]


def fenced(name: str, text: str) -> str:
    """A new section."""
    begin, end = _marks(name)
    return f"{begin}{text}{end}\n"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- end of {name} -->"
