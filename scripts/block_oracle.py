#!/usr/bin/env python3
"""Writes what gguf-py reads from blocks of the formats that candle does not have, for the tests.

    pip install gguf==0.19.0
    scripts/block_oracle.py > tests/data/blocks.json

For each format a list of pairs, in hexadecimal: a block's bytes, and its numbers as f32 in little-endian order. Scales reach
from zero and the smallest to infinity; the rest of a block is random.
"""

import json
import random
import struct

import numpy
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

HALVES = [0.0, -0.0, 6e-8, -3e-5, 0.013, -0.7, 1.0, 65504.0, float("inf")]
# Format: scales to try, and bytes of the rest of a block.
FORMATS = {
    "IQ4_NL": ([struct.pack("<e", half) for half in HALVES], 16),
    "IQ4_XS": ([struct.pack("<e", half) for half in [0.0, 6e-8, 0.013, -0.7]], 134),
    "MXFP4": ([bytes([power]) for power in [0, 1, 2, 3, 64, 126, 127, 128, 129, 200, 252, 253, 254, 255]], 16),
}


def main():
    source, known = random.Random(16), {}
    for name, (scales, rest) in FORMATS.items():
        known[name] = []
        for scale in scales:
            block = scale + source.randbytes(rest)
            with numpy.errstate(over="ignore"):
                numbers = dequantize(numpy.frombuffer(block, numpy.uint8), GGMLQuantizationType[name])
            assert numbers.dtype == numpy.float32 and not numpy.isnan(numbers).any()
            known[name].append([block.hex(), numbers.astype("<f4").tobytes().hex()])
    lines = [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(pair)}" for pair in pairs) + "\n ]" for name, pairs in known.items()
    ]
    print("{\n" + ",\n".join(lines) + "\n}")


main()
