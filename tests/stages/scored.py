"""What evaluate reads besides params.yaml: a tokenizer, the validation shards of a few documents, an artifact of random weights."""

import json
import textwrap
from pathlib import Path

import numpy as np

from lib.artifacts.files import write_bytes
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.tokens import SplitWriter
from lib.compression.container import pack
from lib.data.encoder import encode_documents
from lib.data.tokenizer import load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from tests.artifacts.quantized_models import TRAINING
from tests.evaluation.tiny import make_model

DOCUMENTS = [textwrap.dedent(str(kind.__doc__)) for kind in (str, list, dict, json, textwrap, np.ndarray)]
VOCAB_SIZE = 400


def write_scored(artifact: Path) -> None:
    """Write all that below the working directory, the artifact to the given path."""
    write_bytes(TOKENIZE_FOLDER / "tokenizer.model", train_tokenizer(DOCUMENTS, VOCAB_SIZE, 100_000))
    tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
    writer = SplitWriter(TOKENIZE_FOLDER / "val", VOCAB_SIZE, shard_tokens=150)
    for text, tokens in zip(DOCUMENTS, encode_documents(tokenizer, DOCUMENTS), strict=True):
        writer.add(tokens[:70], len(text.encode()), int(tokenizer.target_bytes(tokens[:70]).sum()))
    writer.close()
    model = make_model(vocab_size=VOCAB_SIZE)
    vectors = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    write_bytes(artifact, pack(QuantizedModel(model.params.model_dump(mode="json"), TRAINING, {}, vectors), "zstd", 3).blob)
