from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.artifacts.files import ArtifactError
from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.tokens import Split
from lib.data.encoder import encode_documents
from lib.data.tokenizer import Tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.evaluation.inputs import open_inputs
from tests.artifacts.quantized_models import TRAINING
from tests.evaluation.tiny import make_model

DOCUMENTS = ["a cat and a dog", "one more cat", "dogs and cats and dogs"]
VOCAB_SIZE = 280
CPU = torch.device("cpu")


def make_inputs() -> tuple[QuantizedModel, Tokenizer, Split]:
    tokenizer = Tokenizer(train_tokenizer(DOCUMENTS, VOCAB_SIZE, 10_000), Path("test.model"))
    tokens = np.concatenate(list(encode_documents(tokenizer, DOCUMENTS)))
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    model = make_model(vocab_size=VOCAB_SIZE)
    vectors = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    artifact = QuantizedModel(model.params.model_dump(mode="json"), TRAINING, {}, vectors)
    return artifact, tokenizer, Split(Path("val"), (tokens[:9], tokens[9:]), len(DOCUMENTS), num_bytes, num_bytes, VOCAB_SIZE)


def test_the_model_has_the_weights_of_the_artifact_and_the_text_the_bytes_of_its_documents() -> None:
    artifact, tokenizer, split = make_inputs()
    model, text = open_inputs(artifact, tokenizer, split, CPU)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, artifact.vectors[name].float())
    assert text.tokens.tolist() == split.tokens().tolist()
    assert np.add.reduceat(text.target_bytes, text.documents.start).tolist() == [len(document) for document in DOCUMENTS]


def test_what_does_not_belong_together_is_refused() -> None:
    artifact, tokenizer, split = make_inputs()
    with pytest.raises(ArtifactError, match=r"val: expected tokens of a vocabulary of 280 as the artifact's, found 281"):
        open_inputs(artifact, tokenizer, replace(split, vocab_size=VOCAB_SIZE + 1), CPU)
    with pytest.raises(ValueError, match=r"val: expected 50 bytes of text, found 49"):
        open_inputs(artifact, tokenizer, replace(split, accounted_bytes=50), CPU)
