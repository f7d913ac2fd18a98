"""A strategy as a compressor: the text comes back in another process, and the file is as long as the score."""

import re
from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import write_json
from lib.audit.compressor import HEADER, decode, encode, next_token, read_header
from lib.distributed import SINGLE_CPU
from lib.evaluation.config import StrategyName
from lib.evaluation.evaluation import run_strategy
from lib.params import SECTIONS
from tests.evaluation.tiny import BOS, EVALUATE, make_job, make_model, make_params, make_tokens
from tests.stages.scored import write_scored
from tools import decode as tool

TOKENS = make_tokens(24, starts=(0, 5, 17))


@pytest.mark.parametrize("name", ["one_pass", "score_first", "lora", "phased"])
def test_the_file_is_as_long_as_the_score_and_gives_the_text_back(name: StrategyName) -> None:
    model, params = make_model(), make_params(phased={"documents": 2})
    distribution = next_token(name, model, params, num_targets=24, bos_id=BOS, process=SINGLE_CPU)
    content = encode(TOKENS, distribution)
    assert decode(content, distribution).tolist() == TOKENS.tolist()
    bits = run_strategy(name, make_job(model, TOKENS, params)).nats.sum() / np.log(2)
    assert bits - 1 <= 8 * (len(content) - HEADER.size) <= 1.01 * bits + 64  # the coder works in words of 32 bits


@pytest.mark.parametrize("name", ["one_pass", "lora"])
def test_a_tilt_is_in_the_file_as_in_the_score(name: StrategyName) -> None:
    tokens = TOKENS.copy()
    tokens[[9, 10, 11, 12, 18, 19, 20, 21]] = [9, 8, 7, 6, 9, 8, 7, 6]
    model, params = make_model(), make_params(tilt={"threshold": 0.8, "boosts": [[4, 3.0], [3, 2.0]]})
    distribution = next_token(name, model, params, num_targets=24, bos_id=BOS, process=SINGLE_CPU)
    assert decode(encode(tokens, distribution), distribution).tolist() == tokens.tolist()
    outcome = run_strategy(name, make_job(model, tokens, params))
    assert outcome.figures["tilted_targets"] >= 2
    coded = [distribution(tokens, known)[tokens[known]] for known in range(1, 25)]
    assert -np.log(coded) == pytest.approx(outcome.nats, abs=1e-4)


@pytest.mark.slow
def test_what_trains_on_the_text_first_has_a_longer_file_than_its_score() -> None:
    model, params = make_model(), make_params(two_phase={"selective": {"epochs": 12, "lr": 0.1}})
    distribution = next_token("two_phase", model, params, num_targets=24, bos_id=BOS, process=SINGLE_CPU)
    bits = run_strategy("two_phase", make_job(model, TOKENS, params)).nats.sum() / np.log(2)
    assert 8 * (len(encode(TOKENS, distribution)) - HEADER.size) > 1.1 * bits + 64


@pytest.mark.parametrize("content", [b"", b"1234567", b"123456789"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="expected a file that"):
        read_header(content)


@pytest.mark.slow
def test_the_tool_writes_and_reads_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(tool.__file__).parents[1]))
    write_json(Path("params.yaml"), dict.fromkeys(SECTIONS) | {"seeds": [3], "evaluate": EVALUATE})  # JSON is YAML
    write_scored(Path("artifacts/compress/seed3/model.ptz"))
    tool.main(["--seed", "3", "--tokens", "10"])
    found = re.search(r"10 tokens by score_first: (\d+) bits in slice.bin, score ([\d.]+) bits; read back", capsys.readouterr().out)
    assert found is not None
    assert float(found[2]) - 1 <= int(found[1]) <= 1.01 * float(found[2]) + 64
    with pytest.raises(SystemExit, match="--strategy: expected one of"):
        tool.main(["--seed", "3", "--strategy", "none"])
