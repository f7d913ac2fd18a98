"""A text coloured by how many bits its tokens cost: in a terminal, and as HTML, of which the report has passages too."""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HIGHEST = 9
"""The last of the levels 0, 1, 2, ...: so many bits for each token, or more; the legend says so."""
BACKGROUNDS = (None, 230, 229, 228, 222, 221, 215, 209, 203, 196)
"""Colours of the levels in a terminal of 256 colours: none, then pale yellow to red, under black."""
RESET = "\x1b[0m"


class PassagePart(NamedTuple):
    """Neighbouring tokens that have a text together.

    Attributes:
        text: text of the tokens.
        bits: bits of all of them together.
        num_tokens: their number.
    """

    text: str
    bits: float
    num_tokens: int

    @property
    def level(self) -> int:
        """Whole bits for each token, at most `HIGHEST`."""
        return max(0, min(HIGHEST, int(self.bits / self.num_tokens)))

    @property
    def label(self) -> str:
        """The bits in words."""
        return f"{self.bits:.1f} bits" + (f", {self.num_tokens} tokens" if self.num_tokens > 1 else "")


def templates() -> Environment:
    """The templates of this package: everything that is put into HTML is escaped."""
    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)


def make_page(title: str, summary: str, parts: Sequence[PassagePart]) -> str:
    """A coloured text as an HTML file that needs no other, for light and dark screens.

    Args:
        title: title of the page.
        summary: bits per byte of the whole text, in words.
        parts: parts of the text.
    """
    return templates().get_template("text.html.j2").render(title=title, summary=summary, parts=parts, highest=HIGHEST)


def color_text(parts: Sequence[PassagePart], *, colored: bool) -> str:
    """A text for a terminal, with a legend.

    Args:
        parts: parts of the text.
        colored: whether escape sequences may be used; without them only the text is left.
    """
    if not colored:
        return "".join(clean_text(part.text) for part in parts)
    legend = [_color(f" {level} ", level) for level in range(HIGHEST)] + [_color(f" {HIGHEST} or more ", HIGHEST)]
    return "".join(["bits per token: ", *legend, "\n\n", *(piece for part in parts for piece in _color_lines(part))])


def clean_text(text: str) -> str:
    """`text` without control characters other than line ends and tabs, by which it could command the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(each) == "Cc" and each not in "\n\t" else each for each in text)


def _color_lines(part: PassagePart) -> Iterator[str]:
    for number, line in enumerate(clean_text(part.text).split("\n")):
        yield ("\n" if number else "") + _color(line, part.level)  # a background would go on to the end of the line


def _color(text: str, level: int) -> str:
    background = BACKGROUNDS[level]
    return text if background is None or not text else f"\x1b[38;5;16;48;5;{background}m{text}{RESET}"
