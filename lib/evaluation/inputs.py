"""What is scored, from the files of an artifact: the same for the pipeline, the audit and the submitted program."""

import torch

from lib.artifacts.files import ArtifactError
from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.tokens import Split
from lib.data.tokenizer import Tokenizer
from lib.evaluation.bpb import check_bytes
from lib.evaluation.evaluation import Text
from lib.model.gpt import GPT, build_model


def open_inputs(artifact: QuantizedModel, tokenizer: Tokenizer, split: Split, device: torch.device) -> tuple[GPT, Text]:
    """The model of an artifact, on a device, and the text that it scores.

    Args:
        artifact: the unpacked ``model.ptz``.
        tokenizer: the one that `split` was made with.
        split: the validation tokens.
        device: where the model computes.

    Raises:
        ArtifactError: the tokens are of another vocabulary than the model's.
        ValueError: tokens and tokenizer do not belong together; no text, or one that does not start with BOS.
    """
    model = build_model(artifact.model, artifact.weights()).to(device)
    if model.params.vocab_size != split.vocab_size:
        raise ArtifactError(f"{split.folder}: expected tokens of a vocabulary of {model.params.vocab_size} as the artifact's, found "
                            f"{split.vocab_size}; take the tokenizer and the shards that the model was trained with")
    tokens = split.tokens()
    text = Text.of(tokens, tokenizer.target_bytes(tokens), tokenizer.bos_id)
    check_bytes(text.target_bytes, split.accounted_bytes, str(split.folder))
    return model, text
