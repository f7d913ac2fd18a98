"""Text from an artifact, and a text coloured by what it costs; the model is tiny and its weights are random."""

import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import write_json
from lib.artifacts.tokens import load_split
from lib.data.encoder import encode_documents
from lib.data.tokenizer import load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.distributed import SINGLE_CPU
from lib.errors import UserError
from lib.evaluation.evaluation import run_strategy
from lib.params import SECTIONS
from tests.evaluation.tiny import make_job, make_model, make_params
from tests.stages.scored import DOCUMENTS, VOCAB_SIZE, write_scored
from tools.talk import color_tokens, main, score_text

ARTIFACT = Path("artifacts/compress/seed3/model.ptz")
TOKENIZER = Path("artifacts/tokenize/tokenizer.model")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    write_json(Path("params.yaml"), dict.fromkeys(SECTIONS) | {"seeds": [3, 4]})  # JSON is YAML
    write_scored(ARTIFACT)


def talk(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    main(list(arguments))
    return capsys.readouterr()


def test_text_goes_on_from_the_prompt_and_is_that_of_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = talk(capsys, "--prompt", "The list", "--tokens", "30")
    assert out.startswith("The list")
    assert len(out) > len("The list") + 10
    assert out.endswith("\n")
    assert re.fullmatch(r"\d+ tokens(, where the document ends)?; \d+ a second, seed 0\n", err)
    assert talk(capsys, str(ARTIFACT), "--prompt", "The list", "--tokens", "30")[0] == out
    assert talk(capsys, "--prompt", "The list", "--tokens", "30", "--seed", "1")[0] != out
    assert talk(capsys, "--tokens", "1")[1].startswith("1 tokens;")


def test_the_tokenizer_beside_the_model_comes_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "handed").mkdir()
    for path in (ARTIFACT, TOKENIZER):
        path.rename(tmp_path / "handed" / path.name)
    assert talk(capsys, "handed/model.ptz", "--prompt", "x", "--tokens", "3")[0].startswith("x")
    Path("handed/tokenizer.model").write_bytes(train_tokenizer(DOCUMENTS, VOCAB_SIZE - 1, 100_000))
    with pytest.raises(UserError, match=f"expected {VOCAB_SIZE} pieces with BOS 1 as the artifact has, found {VOCAB_SIZE - 1} with 1"):
        main(["handed/model.ptz"])


def test_losses_are_those_of_the_strategy_sliding() -> None:
    model = make_model(vocab_size=VOCAB_SIZE)
    tokens = load_split(Path("artifacts/tokenize/val"), VOCAB_SIZE).tokens()
    expected = run_strategy("sliding", make_job(model, tokens, make_params(window_tokens=8, stride_tokens=2))).nats
    np.testing.assert_allclose(score_text(model, tokens, 8, SINGLE_CPU), expected, rtol=1e-5)


def test_every_token_has_its_bits() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    (tokens,) = encode_documents(tokenizer, ["a \u20ac"])
    nats = np.arange(1, len(tokens), dtype=np.float32) * np.float32(np.log(2))
    parts = color_tokens(tokenizer, tokens[1:].tolist(), nats)
    assert "".join(part.text for part in parts) == "a \u20ac"
    assert [part.num_tokens for part in parts][-1] == 3
    assert parts[-1].bits == pytest.approx(sum(range(len(tokens) - 3, len(tokens))))
    assert sum(part.bits for part in parts) == pytest.approx(sum(range(1, len(tokens))))


def test_a_text_is_scored_and_written_as_a_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content = "a <b> list\nof \u20acs & things\n"
    Path("text.txt").write_text(content)
    out, err = talk(capsys, "--hard", "text.txt", "--html", "text.html")
    summary, text = out.split("\n\n", 1)
    found = re.fullmatch(r"(\d+\.\d{4}) bits per byte: (\d+) bytes, (\d+) tokens, windows of 8", summary)
    assert found is not None
    assert int(found[2]) == len(content.encode())
    assert (text, err) == (content + "\n", "")
    page = Path("text.html").read_text()
    assert summary in page and "<b>" not in page and "&lt;" in page
    bits = sum(float(each) for each in re.findall(r'title="([\d.]+) bits', page))
    assert bits == pytest.approx(float(found[1]) * int(found[2]), abs=0.05 * len(content))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    out, err = talk(capsys, "--hard", "-")
    assert out == f"{summary}\n\n{content}\n"
    assert err.startswith("no colours: ")


def test_colours_are_for_terminals_that_want_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("text.txt").write_text("a list")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[" in talk(capsys, "--hard", "text.txt")[0]
    monkeypatch.setitem(os.environ, "NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[" not in talk(capsys, "--hard", "text.txt")[0]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--hard", "none.txt"], "none.txt: expected a file with text, found none"), (["--hard", "empty"], "empty: expected text"),
    (["--hard", "latin"], "latin: expected text in UTF-8, found the byte 0xe9 at 1"), (["none.ptz"], "none.ptz: no such file"),
    (["--context", "9"], "context: expected 1 to 8 tokens"), (["--tokenizer", "none.model"], "none.model: no such file"),
])
def test_files_that_cannot_be_used_are_named(arguments: list[str], message: str) -> None:
    Path("empty").touch()
    Path("latin").write_bytes(b"h\xe9")
    with pytest.raises(UserError, match=re.escape(message)):
        main(arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--top-p", "0"], "--top-p: expected a number from 1e-09 to 1, found 0"), (["--tokens", "0"], "--tokens: expected a number from 1"),
    (["--temperature", "nan"], "found nan"), (["--seed", "x"], "found x"),
    (["--html", "a.html"], "--html: expected --hard FILE beside it")])
def test_options_out_of_range_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
