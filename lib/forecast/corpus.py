"""Whether splits are large enough for every later stage, before anything is trained on a corpus that cannot finish.

tokenize asks when it has written them, and train before it starts, because settings may have changed in between. The answer changes
no result: like `lib.forecast.watch`, which says more of this, the module is left out of the code that dvc.yaml declares.
"""

from collections.abc import Mapping
from typing import Any

from lib.calibration.config import CalibrateParams
from lib.data.rows import count_rows
from lib.errors import UserError
from lib.params import load_params
from lib.training.config import TrainParams

MIN_VAL_TOKENS = 2  # one that predicts, one that is scored


def check_corpus(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare what train, calibrate, quantize and evaluate need, by the parameter file, with what was written.

    Args:
        splits: by name, what `SplitWriter.close` returns, which is also what ``split.json`` holds; train and heldout at least.

    Raises:
        UserError: too few sequences or tokens; all shortages in one message.
    """
    train, calibrate = load_params("train", TrainParams), load_params("calibrate", CalibrateParams)
    length, shards, place = train.sequence_tokens, [shard["tokens"] for shard in splits["train"]["shards"]], "train"
    batch_rows, sequences = (int(count_rows(shards, tokens).sum()) for tokens in (train.tokens_per_row, length))
    if train.data_order == "sequential":
        batch_rows, place = max(shards, default=0) // (train.tokens_per_row + 1), "a shard of train"
    key = "row_tokens" if train.row_tokens else "sequence_tokens"
    needs = [
        (train.batch_sequences, batch_rows,
         f"train.batch_sequences: {{}} sequences of train.{key} {train.tokens_per_row} tokens in {place}"),
        (2 * calibrate.num_sequences, sequences,
         f"calibrate.num_sequences {calibrate.num_sequences}, twice: {{}} sequences of train.sequence_tokens {length} tokens in train"),
        (length + 1, splits["heldout"]["tokens"], "quantize: {} tokens in heldout, train.sequence_tokens and one more"),
        (1, splits["heldout"]["accounted_bytes"], "train.averaging.select: {} byte of text in heldout")]
    if "val" in splits:  # which train cannot read; what it needs is in no setting
        needs += [(MIN_VAL_TOKENS, splits["val"]["tokens"], "evaluate: {} tokens in val"),
                  (1, splits["val"]["accounted_bytes"], "evaluate: {} byte of text in val")]
    if short := [f"{what.format(needed)}, found {found}" for needed, found, what in needs if found < needed]:
        raise UserError(f"tokenize: expected splits that every later stage can work with: {'; '.join(short)}. Enlarge the corpus, raise "
                        "tokenize.heldout_fraction and tokenize.val_fraction or add to their files, or lower these keys")
