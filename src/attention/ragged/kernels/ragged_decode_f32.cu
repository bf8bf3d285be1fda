// Ragged decoding over keys and values stored as f32; a file, and so a module, for each format: only one is loaded.
#include "ragged_decode.cuh"

RAGGED_DECODE_KERNELS(RAGGED_DECODE_KERNEL, f32, F32)
