#!/usr/bin/env python3
"""Writes `q6_k.bin`: what ggml's `quantize_row_q6_K_ref` makes of the numbers below, which the tests of `src/kernels/rounding.rs`
make, too. Every number is exact in f32.

    scripts/fetch_llamacpp.sh
    pip install numpy
    tests/data/rounding/make.py LIBRARY    # libggml-base.so
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

BLOCK, BLOCK_BYTES, BLOCKS = 256, 210, 24


def numbers():
    state, out = 1, np.zeros((BLOCKS, BLOCK), np.float32)
    for block in range(BLOCKS):
        scale = [2.0**-21, 2.0**-36, 2.0**-15][block % 3]
        for at in range(BLOCK):
            total = 0
            for _ in range(4):
                state = (state * 1664525 + 1013904223) % 2**32
                total += (state >> 16) - 32768
            group = at // 16
            if block == 4:
                total = 0
            elif block == 5:
                total = 30000
            elif block == 6 and group % 3 == 0:
                total = 0
            elif block == 7 and group % 2 == 0:
                total /= 2.0**12  # its scale is lost beside the others'
            elif block == 8:
                total = (at % 33 - 16) * 1024  # halves, and two of the largest size
            out[block, at] = total * scale
    return out


def main():
    library = ctypes.CDLL(sys.argv[1])
    x = numbers()
    out = np.zeros(BLOCKS * BLOCK_BYTES, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, out)]
    library.quantize_row_q6_K_ref(*pointers, ctypes.c_int64(x.size))
    (Path(__file__).parent / "q6_k.bin").write_bytes(out.tobytes())


if __name__ == "__main__":
    main()
