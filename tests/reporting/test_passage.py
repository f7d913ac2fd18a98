import re

from lib.reporting.passage import BACKGROUNDS, HIGHEST, PassagePart, clean_text, color_text, make_page

PARTS = [PassagePart("a", 0.4, 1), PassagePart(" <b\n", 3.2, 1), PassagePart("\n\nc", 40.0, 2)]


def test_a_terminal_gets_the_text_in_colours_that_end_with_each_line() -> None:
    text = color_text(PARTS, colored=True)
    legend, body = text.split("\n\n", 1)
    assert re.sub(r"\x1b\[[^m]*m", "", body) == "a <b\n\n\nc"
    assert body == (f"a\x1b[38;5;16;48;5;{BACKGROUNDS[3]}m <b\x1b[0m\n\n\n\x1b[38;5;16;48;5;{BACKGROUNDS[9]}mc\x1b[0m")
    assert re.sub(r"\x1b\[[^m]*m", "", legend) == "bits per token:  0  1  2  3  4  5  6  7  8  9 or more "
    assert len(BACKGROUNDS) == HIGHEST + 1


def test_without_colours_it_is_the_text_and_nothing_else() -> None:
    assert color_text(PARTS, colored=False) == "a <b\n\n\nc"


def test_no_text_commands_the_terminal() -> None:
    hostile = "a\x1b[2J\x9b\r\x07\tb\n\u20ac\x00"
    assert clean_text(hostile) == "a\ufffd[2J\ufffd\ufffd\ufffd\tb\n\u20ac\ufffd"
    for colored in (True, False):
        assert "\x1b[2J" not in color_text([PassagePart(hostile, 5.0, 1)], colored=colored)


def test_the_page_is_complete_and_escaped() -> None:
    page = make_page("a & b", "1 < 2 bits", PARTS)
    assert "<h1>a &amp; b</h1>" in page and "1 &lt; 2 bits" in page
    assert '<i class="b3" title="3.2 bits"> &lt;b\n</i><i class="b9" title="40.0 bits, 2 tokens">' in page
    assert all(f".b{level} {{" in page for level in range(1, HIGHEST + 1)) and "9 or more" in page
    assert not re.search(r"https?://|src=|<script", page)


def test_the_level_is_that_of_the_bits_for_each_token() -> None:
    values = ((0.9, 1), (1.0, 1), (12.0, 3), (8.99, 1), (9.0, 1), (50.0, 2))
    assert [PassagePart("", bits, num_tokens).level for bits, num_tokens in values] == [0, 1, 4, 8, 9, 9]
