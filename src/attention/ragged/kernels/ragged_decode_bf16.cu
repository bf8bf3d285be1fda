// Ragged decoding over keys and values stored as bf16; a file, and so a module, for each format: only one is loaded.
#include "ragged_decode.cuh"

RAGGED_DECODE_KERNELS(RAGGED_DECODE_KERNEL, bf16, BF16)
