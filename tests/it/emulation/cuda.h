// The part of CUDA that `ragged_decode.cuh` uses, for a C compiler, so that tests can run the same file on the host. Every thread of a block is a coroutine that runs until it waits for others: what a thread would read too early or
// too late, because a barrier is missing, differs between the orders in which threads take turns. Reads and writes are
// only allowed within the regions that the test names.
//
// Not for: speed, nor finding what only many threads at the same moment can do wrong.

#ifndef CUDA_EMULATION
#define CUDA_EMULATION

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline
#define UNROLL
#ifdef __ELF__
#define __shared__ static __attribute__((section("emulated_shared"))) // to be found and overwritten between blocks
#else
#define __shared__ static
#endif
#define KERNEL static void

typedef struct {
    unsigned x, y;
} uint2;
typedef struct {
    unsigned x, y, z, w;
} uint4;
typedef struct {
    unsigned x, y, z;
} dim3;

extern dim3 threadIdx, blockIdx;

// Waits until every thread of the block is here.
void __syncthreads(void);

// The value that the thread `distance` away (in the sense of exclusive or) gives at the same time; all of a warp take part.
float __shfl_xor_sync(unsigned lanes, float value, int distance);

// Reports an access of `bytes` at `address` outside the regions, or not at a multiple of its size.
void check_access(const void *address, size_t bytes, int write);

static inline void __threadfence(void) {}

static inline unsigned atomicAdd(unsigned *address, unsigned value) {
    check_access(address, sizeof *address, 1);
    const unsigned before = *address;
    *address += value;
    return before;
}

static inline void emulated_read(void *to, const void *from, size_t bytes) {
    check_access(from, bytes, 0);
    memcpy(to, from, bytes);
}

static inline uint4 load_16(const void *from) {
    uint4 value = {0, 0, 0, 0};
    emulated_read(&value, from, sizeof value);
    return value;
}

static inline uint2 load_8(const void *from) {
    uint2 value = {0, 0};
    emulated_read(&value, from, sizeof value);
    return value;
}

static inline unsigned load_4(const void *from) {
    uint32_t value = 0;
    emulated_read(&value, from, sizeof value);
    return value;
}

static inline unsigned load_2(const void *from) {
    uint16_t value = 0;
    emulated_read(&value, from, sizeof value);
    return value;
}

static inline float load_fresh(const float *from) {
    float value = 0;
    emulated_read(&value, from, sizeof value);
    return value;
}

static inline void store_4(void *to, unsigned bits) {
    const uint32_t value = bits;
    check_access(to, sizeof value, 1);
    memcpy(to, &value, sizeof value);
}

static inline void store_2(void *to, unsigned bits) {
    const uint16_t value = (uint16_t)bits;
    check_access(to, sizeof value, 1);
    memcpy(to, &value, sizeof value);
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float widen_f16(unsigned bits) {
    const unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf((float)fraction, -24)
                                       : ldexpf((float)(fraction + 1024), (int)exponent - 25);
    return bits & 0x8000 ? -size : size;
}

// To the nearest, ties to even: rounding of the current mode, which is the default one.
static inline unsigned narrow_f16(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    const float size = fabsf(value);
    if (isnan(value)) {
        return sign | 0x7e00;
    }
    if (size >= 65520.0f) {
        return sign | 0x7c00;
    }
    int exponent;
    frexpf(size, &exponent); // size = [0.5, 1) * 2^exponent
    if (size == 0.0f || exponent < -13) {
        return sign | (unsigned)nearbyintf(ldexpf(size, 24));
    }
    // An 11-bit integer; one that rounds up to 2048 carries into the exponent.
    return sign | (((unsigned)(exponent + 13) << 10) + (unsigned)nearbyintf(ldexpf(size, 11 - exponent)));
}

static inline unsigned narrow_bf16(float value) {
    const unsigned bits = __float_as_uint(value);
    if (isnan(value)) {
        return bits >> 16 | 0x40;
    }
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#endif
