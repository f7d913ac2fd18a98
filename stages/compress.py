"""Compress: integer codes and scales -> model.ptz, its size by role. Fails where code and blob exceed the limit."""

import time
from pathlib import Path

from lib.artifacts.files import write_bytes, write_csv
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import stage_folder
from lib.artifacts.quantized import load_quantized
from lib.compression.budget import SizeRow, check_code, check_limit, list_parts, summarize
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.params import load_params, parse_seed
from lib.submission.bundle import code_bytes


def main(seed: int) -> None:
    """Run the stage for one seed."""
    params, folder, start = load_params("compress", CompressParams), stage_folder("compress", seed), time.monotonic()
    quantized = load_quantized(stage_folder("quantize", seed) / "quantized.safetensors")
    roles = {name: part.role for name, part in parts_of(outline(quantized.model)).items()}
    packed = pack(quantized, params.codec, params.level)
    check_code(code := code_bytes(Path()), params.code_bytes)
    parts = list_parts(quantized, packed, roles, code)
    check_limit(parts, params.limit_bytes)
    write_bytes(folder / "model.ptz", packed.blob)
    write_csv(folder / "sizes.csv", SizeRow._fields, parts)
    save_metrics(folder, summarize(parts) | {"limit_bytes": params.limit_bytes}, {"seconds": time.monotonic() - start})


if __name__ == "__main__":
    main(parse_seed(__doc__))
