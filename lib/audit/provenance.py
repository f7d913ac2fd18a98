"""Where the scores come from: which text was scored, that nothing else saw it, and that the evaluation saw nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lib.artifacts.files import read_json
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import SPLIT_FILE, Split
from lib.audit.chronology import Finding
from lib.audit.isolation import Findings, confine
from lib.audit.text import check_text
from lib.data.tokenizer import Tokenizer
from lib.distributed import Process
from lib.params import PARAMS_FILE

PIPELINE = Path("dvc.yaml")
MANIFEST = TOKENIZE_FOLDER / "manifest.json"
READER = "evaluate"


def confine_to_inputs(seeds: Sequence[int], stage: str, process: Process) -> Findings:
    """Leave this process the inputs of an evaluation and the output folders of `stage`, for good.

    Args:
        seeds: what is evaluated.
        stage: the stage that writes; an earlier one's results of the evaluation can be read.
        process: the group it belongs to has been joined.

    Returns:
        What `lib.audit.isolation.confine` found when it tried to read training data and to use the network.
    """
    inputs = [PARAMS_FILE, PIPELINE, MANIFEST, TOKENIZE_FOLDER / "tokenizer.model", TOKENIZE_FOLDER / "val"]
    of_seeds = [folder for seed in seeds for folder in (stage_folder("compress", seed) / "model.ptz", stage_folder(READER, seed))]
    shards = [path for split in ("train", "heldout") for path in sorted((TOKENIZE_FOLDER / split).glob("*.bin"))]
    checkpoints = [stage_folder("train", seed) / "checkpoint.safetensors" for seed in seeds]
    return confine(read=[*inputs, *of_seeds], write=[stage_folder(stage, seed) for seed in seeds], forbidden=[*shards, *checkpoints],
                   network=process.world_size > 1 and process.device.type == "cuda")


def check_data(metrics: Mapping[str, Any], split: Split, tokenizer: Tokenizer, process: Process) -> dict[str, Finding]:
    """That all of the validation text was scored, by its own bytes, that no other split has any of it, and that no other stage reads it.

    Args:
        metrics: figures of the evaluation: ``num_tokens`` and ``num_bytes``, scored.
        split: the validation text.
        tokenizer: the one that counted its bytes.
        process: every process calls this and gets the findings; the main process makes them, as all text is decoded and encoded again.
    """
    return process.broadcast(_check_data(metrics, split, tokenizer) if process.is_main else {})


def _check_data(metrics: Mapping[str, Any], split: Split, tokenizer: Tokenizer) -> dict[str, Finding]:
    manifest = read_json(MANIFEST)
    of_val = manifest["splits"]["val"]
    num_bytes, num_targets, shared = metrics["num_bytes"], metrics["num_tokens"], manifest["shared_documents"]
    same = [(read_json(split.folder / SPLIT_FILE)["shards"], of_val["shards"]), (tokenizer.sha256, manifest["tokenizer"]["sha256"])]
    return {
        **check_text(num_bytes, split, tokenizer, of_val),
        "targets": {"passed": num_targets == split.num_tokens - 1 == of_val["tokens"] - 1, "targets_scored": num_targets,
                    "tokens": split.num_tokens},
        "disjoint": {"passed": not any(shared.values()), "shared_documents": shared,
                     "documents": {name: values["distinct_documents"] for name, values in manifest["splits"].items()}},
        "checksums": {"passed": all(found == stated for found, stated in same), "shards": len(of_val["shards"]),
                      "shards_are_those_of_the_manifest": same[0][0] == same[0][1],
                      "tokenizer_is_that_of_the_manifest": same[1][0] == same[1][1]},
        "validation_readers": check_readers(PIPELINE),
    }


def check_readers(pipeline: Path) -> Finding:
    """That evaluate is the only stage in the file `pipeline` that depends on the validation tokens."""
    if not pipeline.exists():
        return {"passed": None, "why": f"there is no {pipeline}"}
    stages = YAML(typ="safe", pure=True).load(pipeline.read_text(encoding="utf-8"))["stages"]
    tokens = TOKENIZE_FOLDER / "val"
    readers = []
    for name, stage in stages.items():
        entries = stage.get("do", stage).get("deps", [])
        paths = [Path(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]
        if any(tokens.is_relative_to(path) or path.is_relative_to(tokens) for path in paths):
            readers.append(name)
    return {"passed": readers == [READER], "stages": readers}
