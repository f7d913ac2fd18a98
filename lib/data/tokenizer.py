"""SentencePiece tokenizers: loading, and how many bytes of text each token stands for."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from lib.artifacts.files import ArtifactError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""U+2581, what SentencePiece writes for a space inside pieces."""

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"
"""What the case transform writes before small letters, see `lib.data.case`; private-use characters, each a piece of its own."""

OPERATOR_BYTES = len(ESC.encode())  # of each of the four
MAX_VOCAB_SIZE = 65536  # tokens are stored as uint16

# Numbers of sentencepiece_model.proto: fields of ModelProto, of SentencePiece and of NormalizerSpec, and a type of piece.
PIECES, NORMALIZER_SPEC = 1, 3
PIECE, TYPE = 1, 3
USER_DEFINED = 4
PRECOMPILED_CHARSMAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 2, 3, 4, 5


class Tokenizer:
    """A SentencePiece model with byte fallback.

    Attributes:
        processor: the model; `lib.data.encoder` encodes with it.
        vocab_size: number of pieces.
        bos_id: the token that starts every document.
        sha256: checksum of the model, 64 hexadecimal digits.
        case_transform: whether the model is for text whose capitals are written as operators: it has all of them as user-defined pieces.
        lossless: whether the normalizer leaves text as it is, so that accounted bytes are its UTF-8 bytes. Only U+2581 and a space at
            the start of a document escape the accounting; `lib.data.corpus` keeps them out.

    Args:
        model: the serialized model.
        path: where it came from, for errors.

    Raises:
        ArtifactError: not a SentencePiece model, or one whose bytes cannot be accounted for or whose tokens cannot be stored.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        self.processor = processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
            pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
            self.lossless, self.case_transform = _keeps_text(model), _has_operators(model)
        except (RuntimeError, UnicodeDecodeError, IndexError) as error:  # the second and third of damaged models only
            raise ArtifactError(f"{path}: not a SentencePiece model ({error})") from None
        self.vocab_size: int = processor.vocab_size()
        self.bos_id: int = processor.bos_id()
        self.sha256 = hashlib.sha256(model).hexdigest()
        ids = range(self.vocab_size)
        if not any(map(processor.is_byte, ids)):
            raise ArtifactError(f"{path}: expected a tokenizer with byte fallback, found one without: it turns text into <unk>, whose "
                                "bytes cannot be counted; train it with byte_fallback=true, or set tokenize.tokenizer: null")
        if self.bos_id < 0:
            raise ArtifactError(f"{path}: expected a BOS piece, which starts every document, found none; train it with bos_id=1")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ArtifactError(f"{path}: expected at most {MAX_VOCAB_SIZE} pieces (tokens are uint16), found {self.vocab_size}")
        if fused := [piece for piece in pieces if len(piece) > 1 and not {*piece}.isdisjoint(OPERATORS)]:
            raise ArtifactError(f"{path}: expected the case operators {OPERATORS!r} as pieces of their own, found the piece {fused[0]!r}, "
                                "whose bytes cannot be counted; train it with the operators as user_defined_symbols, or set "
                                "tokenize.tokenizer: null and tokenize.case_transform: true")
        if [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()] == processor.encode("a b")[-4:-1]:
            raise ArtifactError(f"{path}: expected a piece for the space (U+2581), found none: a space would be three byte pieces, which "
                                "count three bytes; train it with required_chars=\u2581, or set tokenize.tokenizer: null")
        self._is_operator = np.array([self.case_transform and piece in {*OPERATORS} for piece in pieces])
        self._escape = processor.piece_to_id(ESC)
        self._is_boundary = np.array([processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in ids])
        self._starts_with_space = np.array([piece.startswith(SPACE) for piece in pieces]) & ~self._is_boundary
        texts = [piece.removeprefix(SPACE).replace(SPACE, " ") for piece in pieces]
        num_bytes = np.array([1 if processor.is_byte(i) else len(text.encode()) for i, text in enumerate(texts)], np.int64)
        self._num_bytes = np.where(self._is_boundary | self._is_operator, 0, num_bytes)

    def target_bytes(self, tokens: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
        """Bytes of text that each target stands for, by the challenge's accounting.

        A byte piece is 1. Any other piece is its UTF-8 length, spaces counted as 1, except that a leading space does not
        count after a control, unknown or unused piece. Those pieces are 0, and so are the operators of the case transform, except
        one that ESC says is part of the text: the bytes are those of the original text.

        Args:
            tokens: (N + 1,) uint16; the first is only the predecessor of the second, and no escaped ESC.

        Returns:
            (N,) int64, for ``tokens[1:]``.
        """
        targets, predecessors = tokens[1:], tokens[:-1]
        num_bytes: npt.NDArray[np.int64] = self._num_bytes[targets] + (self._starts_with_space[targets] & ~self._is_boundary[predecessors])
        if self.case_transform:
            escapes = np.flatnonzero(predecessors == self._escape)
            order = np.arange(len(escapes))
            first_of_run = np.maximum.accumulate(np.where(np.diff(escapes, prepend=-2) == 1, 0, order))
            active = escapes[(order - first_of_run) % 2 == 0]  # in a run of ESC each second one is escaped itself
            num_bytes[active] += np.where(self._is_operator[targets[active]], OPERATOR_BYTES, 0)
        return num_bytes


def load_tokenizer(path: Path, bos_id: int | None = None) -> Tokenizer:
    """Read a SentencePiece model file.

    Args:
        path: path of the file.
        bos_id: the BOS token that the model expects, if there is a model.

    Raises:
        ArtifactError: missing, refused by `Tokenizer`, or with another BOS token.
    """
    try:
        model = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; expected a SentencePiece model") from None
    tokenizer = Tokenizer(model, path)
    if bos_id not in (None, tokenizer.bos_id):
        raise ArtifactError(f"{path}: expected BOS token {bos_id} as in model.bos_id, found {tokenizer.bos_id}; set model.bos_id to it")
    return tokenizer


def _has_operators(model: bytes) -> bool:
    """Whether all operators of the case transform are user-defined pieces."""
    pieces = [dict(_read_fields(value)) for number, value in _read_fields(model) if number == PIECES and isinstance(value, bytes)]
    return {operator.encode() for operator in OPERATORS} <= {piece[PIECE] for piece in pieces if piece.get(TYPE) == USER_DEFINED}


def _keeps_text(model: bytes) -> bool:
    """Whether the normalizer is the identity, adds no space in front and removes none."""
    spec: dict[int, int | bytes] = {}
    for number, value in _read_fields(model):
        if number == NORMALIZER_SPEC and isinstance(value, bytes):
            spec.update(_read_fields(value))
    changes = spec.get(PRECOMPILED_CHARSMAP) or spec.get(ADD_DUMMY_PREFIX, 1) or spec.get(REMOVE_EXTRA_WHITESPACES, 1)  # 1: the defaults
    return not changes and spec.get(ESCAPE_WHITESPACES, 1) == 1


def _read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a serialized protocol buffer: varints as int, everything else as its bytes."""
    position = 0

    def read_varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        key = read_varint()
        if key & 7 == 0:
            yield key >> 3, read_varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or read_varint()  # fixed64, fixed32, else length-delimited
            yield key >> 3, message[position:position + size]
            position += size
