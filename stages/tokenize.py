"""Documents -> tokenizer, shards of the train, heldout and val splits, and a manifest of what they hold."""

import time

from lib.artifacts.files import write_json
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.data.config import TokenizeParams
from lib.data.corpus import open_source
from lib.data.tokenization import make_manifest, provide_tokenizer, summarize, write_splits
from lib.forecast.corpus import check_corpus
from lib.params import load_params


def main() -> None:
    """Run the stage."""
    start = time.monotonic()
    params = load_params("tokenize", TokenizeParams)
    source = open_source(params)
    tokenizer = provide_tokenizer(params, source, TOKENIZE_FOLDER / "tokenizer.model")
    splits = write_splits(params, source, tokenizer, TOKENIZE_FOLDER)
    check_corpus(splits["splits"])
    manifest = make_manifest(params, source, tokenizer, splits)
    write_json(TOKENIZE_FOLDER / "manifest.json", manifest)
    save_metrics(TOKENIZE_FOLDER, summarize(manifest), {"seconds": time.monotonic() - start})


if __name__ == "__main__":
    main()
