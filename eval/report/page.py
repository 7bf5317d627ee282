"""A page of sections, each a sentence in plain words and the blocks below it, rendered to one self-contained file.

Pictures are inlined, every text is escaped, and the page's own policy forbids it to load or run anything. This module
knows nothing of runs, slides or probes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np

JPEG_QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """An inlined image; ``alt`` says what it shows to those who cannot see it."""

    src: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Words:
    """Lines of text: "plain" paragraphs, a "list", or a "warning" box."""

    lines: list[str]
    style: str = "plain"
    kind: str = "words"


@dataclass(frozen=True)
class Gallery:
    """Pictures in a grid, at least ``width`` CSS pixels each; those wider than the page take all of it."""

    pictures: list[Picture]
    width: int = 220
    kind: str = "gallery"


@dataclass(frozen=True)
class Legend:
    """What the colors of a picture mean: (CSS color, meaning)."""

    entries: list[tuple[str, str]]
    kind: str = "legend"


@dataclass(frozen=True)
class Heading:
    """A line between blocks of a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Cell:
    """A cell that says more than its text.

    Attributes:
        style: "best", "level" or "bad", empty for none of these.
        title: what is shown to a pointer that rests on it.
        shade: in [0, 1], how dark it is painted; None for not at all.
    """

    text: str
    style: str = ""
    title: str = ""
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of text, :class:`Cell` and lists of pictures. Rows of ``quiet`` are set back, such as chance."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell | list[Picture]]]
    caption: str = ""
    quiet: frozenset[int] = frozenset()
    kind: str = "table"


@dataclass(frozen=True)
class Listing:
    """Text as it is, such as a configuration, folded away under a summary where it has one."""

    text: str
    summary: str = ""
    kind: str = "listing"


Block = Words | Heading | Gallery | Legend | Table | Listing


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        anchor: its name in links.
        title: a few words.
        lead: the sentence under the title.
        blocks: what follows.
    """

    anchor: str
    title: str
    lead: str
    blocks: list[Block] = field(default_factory=list)


def render(title: str, subtitle: str, badges: list[str], sections: list[Section]) -> str:
    """The page as HTML. All text is escaped, whatever it holds."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("eosin.eval").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(title=title, subtitle=subtitle, badges=badges, sections=sections)


def photo(image: np.ndarray, alt: str, caption: str = "") -> Picture:
    """Inline an RGB image, uint8 [H, W, 3], as JPEG."""
    import simplejpeg

    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), JPEG_QUALITY, "RGB", "420")
    return Picture(_uri("image/jpeg", data), alt, caption)


def chart(png: bytes, alt: str, caption: str = "") -> Picture:
    """Inline a PNG."""
    return Picture(_uri("image/png", png), alt, caption)


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
