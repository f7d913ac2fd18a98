"""Where the loss is: by how much a target's prediction could see, and by length of its document. N targets."""

import math

import numpy as np
import numpy.typing as npt

from lib.evaluation.sheet import Losses
from lib.evaluation.windows import Documents

CONTEXT_BINS = 32


def context_table(nats: Losses, context: npt.NDArray[np.int32]) -> list[tuple[int, int, float]]:
    """Mean loss by the number of inputs before the target's own, in bins of equal width.

    Args:
        nats: (N,) loss of each target.
        context: (N,) inputs that the model saw before each target's own.

    Returns:
        Rows (largest number of inputs of the bin, targets, nats per token) of the bins that have targets.
    """
    width = -(-(int(context.max()) + 1) // CONTEXT_BINS)
    bins = context // width
    count, total = np.bincount(bins), np.bincount(bins, nats.astype(np.float64))
    return [((n + 1) * width - 1, int(count[n]), float(total[n] / count[n])) for n in np.flatnonzero(count).tolist()]


def document_table(nats: Losses, target_bytes: npt.NDArray[np.int64], documents: Documents) -> list[tuple[int, int, int, float]]:
    """Bits per byte by length of document, in bins from one power of two to the next.

    Args:
        nats: (N,) loss of each target.
        target_bytes: (N,) bytes of each target.
        documents: the documents that the targets belong to.

    Returns:
        Rows (largest number of tokens of the bin, documents, bytes, bits per byte) of the bins that have bytes.
    """
    total = np.add.reduceat(nats, documents.start, dtype=np.float64)
    num_bytes = np.add.reduceat(target_bytes, documents.start)
    exponents = np.ceil(np.log2(documents.length)).astype(np.int64)
    rows = []
    for exponent in np.unique(exponents).tolist():
        which = exponents == exponent
        if size := int(num_bytes[which].sum()):
            rows.append((2**exponent, int(which.sum()), size, float(total[which].sum() / math.log(2) / size)))
    return rows
