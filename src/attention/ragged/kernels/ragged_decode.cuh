// Attention from one new token over ragged heads: one launch for all KV heads of a layer.
//
// A block takes one KV head and one range of its rows, for all query heads that share them: every key and value is read
// once. A row is spread over `lanes` threads, which hold `vec` numbers each; threads keep their own running maximum, sum
// and weighted values (an online softmax), and nothing is exchanged until the range is done but the scores of a row. A
// range's result goes to memory, and the block that finishes last for a head merges those of all its ranges, so that no
// second launch is needed.
//
// The common subset of CUDA and C: the tests compile the same file for the host, with a `cuda.h` of their own (see
// tests/it/emulation). Memory is therefore only read and written through the functions below.
//
// Not for: choosing the grid (see ../launch.rs).

#ifndef RAGGED_DECODE
#define RAGGED_DECODE

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 2)
#define INLINE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#include "cuda.h"
#endif

#define THREADS 128 // of a block; as in ../launch.rs
#define WARP 32
#define WARPS (THREADS / WARP)
#define MAX_HEAD_DIM 256
#define MAX_GROUP 16
#define MAX_VEC 8
#define MAX_UNROLL 4
#define MAX_RANGES 64 // of a head; as in ../launch.rs
#define ALL_LANES 0xffffffffu
#define LOWEST (-3.402823466e+38f)

// Formats of numbers; as in ../launch.rs.
#define F32 0
#define F16 1
#define BF16 2

// As `Arguments` in ../launch.rs.
struct ragged_decode {
    const void *queries;     // [num_kv_heads, group_size, head_dim], of `query_format`, in the heads' order
    const void *kept_keys;   // [rows, head_dim]
    const void *kept_values; // [rows, head_dim]
    const unsigned *slots;   // [num_kv_heads, 3]: first kept row, number of kept rows, KV head
    const void *tail_keys;   // [num_kv_heads, tail_capacity, head_dim], in the slots' order
    const void *tail_values; // [num_kv_heads, tail_capacity, head_dim]
    void *out;               // as the queries
    float *partial_sums;     // [num_kv_heads, max_ranges, group_size, head_dim]
    float *partial_stats;    // [num_kv_heads, max_ranges, group_size, 2]: maximum, and sum of exponentials
    unsigned *counters;      // [num_kv_heads]: ranges done; zero before and after
    unsigned group_size;
    unsigned head_dim;
    unsigned tail_capacity;
    unsigned tail_len;
    unsigned range_rows;
    unsigned max_ranges;
    unsigned query_format;
    unsigned aligned; // whether rows start at multiples of 16 bytes
    float scale;      // of scores, to the base of 2: log2(e) / sqrt(head_dim)
};

#ifdef __CUDACC__
INLINE uint4 load_16(const void *from) { return __ldg((const uint4 *)from); }
INLINE uint2 load_8(const void *from) { return __ldg((const uint2 *)from); }
INLINE unsigned load_4(const void *from) { return __ldg((const unsigned *)from); }
INLINE unsigned load_2(const void *from) { return __ldg((const unsigned short *)from); }
// What another block has written: not from this processor's own cache.
INLINE float load_fresh(const float *from) { return __ldcg(from); }
INLINE void store_4(void *to, unsigned bits) { *(unsigned *)to = bits; }
INLINE void store_2(void *to, unsigned bits) { *(unsigned short *)to = (unsigned short)bits; }
INLINE float widen_f16(unsigned bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }
INLINE unsigned narrow_f16(float number) { return __half_as_ushort(__float2half_rn(number)); }
INLINE unsigned narrow_bf16(float number) { return __bfloat16_as_ushort(__float2bfloat16_rn(number)); }
#endif

INLINE unsigned size_of(int format) { return format == F32 ? 4 : 2; }

INLINE const void *number_at(const void *numbers, size_t index, int format) {
    return (const char *)numbers + index * size_of(format);
}

INLINE float widen_16(unsigned bits, int format) {
    return format == F16 ? widen_f16(bits) : __uint_as_float(bits << 16);
}

INLINE float load_number(const void *numbers, size_t index, int format) {
    const void *from = number_at(numbers, index, format);
    return format == F32 ? __uint_as_float(load_4(from)) : widen_16(load_2(from), format);
}

INLINE void store_number(void *numbers, size_t index, int format, float number) {
    void *to = (char *)numbers + index * size_of(format);
    if (format == F32) {
        store_4(to, __float_as_uint(number));
    } else {
        store_2(to, format == F16 ? narrow_f16(number) : narrow_bf16(number));
    }
}

// The first `count` of `vec` numbers of a row, as they are stored; zeros after them.
INLINE void load_raw(unsigned *raw, const void *row, unsigned first, unsigned count, int whole, int vec, int format) {
    const int words = format == F32 ? vec : vec / 2;
    const char *from = (const char *)number_at(row, first, format);
    if (whole) {
        if (words == 2) {
            const uint2 part = load_8(from);
            raw[0] = part.x;
            raw[1] = part.y;
        } else {
            UNROLL
            for (int word = 0; word < words; word += 4) {
                const uint4 part = load_16(from + 4 * word);
                raw[word] = part.x;
                raw[word + 1] = part.y;
                raw[word + 2] = part.z;
                raw[word + 3] = part.w;
            }
        }
        return;
    }
    UNROLL
    for (int word = 0; word < words; ++word) {
        raw[word] = 0;
        if (format == F32) {
            if (word < count) {
                raw[word] = load_4(from + 4 * word);
            }
        } else {
            if (2 * word < count) {
                raw[word] = load_2(from + 4 * word);
            }
            if (2 * word + 1 < count) {
                raw[word] |= load_2(from + 4 * word + 2) << 16;
            }
        }
    }
}

INLINE float widen_raw(const unsigned *raw, int index, int format) {
    if (format == F32) {
        return __uint_as_float(raw[index]);
    }
    const unsigned word = raw[index / 2];
    return widen_16(index % 2 ? word >> 16 : word & 0xffff, format);
}

// What a block does. After inlining, everything but `args` is a constant: loops are unrolled, arrays live in registers.
//
// * `lanes`: threads of a row, a power of two up to 32; `lanes * vec` is at least the head dimension
// * `group`: at least the group size; query heads above it are computed as zeros and not stored
// * `unroll`: rows that a thread has in flight
INLINE void attend(const struct ragged_decode args, int format, int lanes, int vec, int group, int unroll) {
    __shared__ float warp_sums[WARPS][MAX_HEAD_DIM];
    __shared__ float warp_stats[WARPS][2];
    __shared__ float shared_queries[MAX_GROUP * MAX_HEAD_DIM]; // only where registers do not suffice
    __shared__ float weights[MAX_GROUP][MAX_RANGES];
    __shared__ unsigned is_last;

    const unsigned slot = blockIdx.y, range = blockIdx.x;
    const unsigned head_dim = args.head_dim, group_size = args.group_size;
    const unsigned kept_start = load_4(args.slots + 3 * slot), kept_len = load_4(args.slots + 3 * slot + 1);
    const unsigned len = kept_len + args.tail_len;
    const unsigned ranges = (len + args.range_rows - 1) / args.range_rows;
    if (range >= ranges) {
        return; // the whole block: other heads are longer
    }
    const unsigned begin = range * args.range_rows;
    const unsigned end = len - begin < args.range_rows ? len : begin + args.range_rows;

    const int lane = threadIdx.x % lanes, warp = threadIdx.x / WARP;
    const unsigned rows_at_once = THREADS / lanes, own_row = threadIdx.x / lanes;
    const unsigned first = lane * vec; // of a row's numbers
    const unsigned count = first >= head_dim ? 0 : head_dim - first < vec ? head_dim - first : vec;
    const int whole = args.aligned && count == vec;
    const int in_registers = group * vec <= 64;
    const size_t first_query = (size_t)load_4(args.slots + 3 * slot + 2) * group_size;

    float query[MAX_GROUP * MAX_VEC], sum[MAX_GROUP * MAX_VEC], max[MAX_GROUP], total[MAX_GROUP];
    UNROLL
    for (int g = 0; g < group; ++g) {
        max[g] = LOWEST;
        total[g] = 0.0f;
        UNROLL
        for (int i = 0; i < vec; ++i) {
            sum[g * vec + i] = 0.0f;
            if (in_registers) {
                query[g * vec + i] = 0.0f;
                if (g < group_size && i < count) {
                    const size_t index = (first_query + g) * head_dim + first + i;
                    query[g * vec + i] = args.scale * load_number(args.queries, index, args.query_format);
                }
            }
        }
    }
    if (!in_registers) {
        for (unsigned item = threadIdx.x; item < group * MAX_HEAD_DIM; item += THREADS) {
            const unsigned g = item / MAX_HEAD_DIM, number = item % MAX_HEAD_DIM;
            float value = 0.0f;
            if (g < group_size && number < head_dim) {
                const size_t index = (first_query + g) * head_dim + number;
                value = args.scale * load_number(args.queries, index, args.query_format);
            }
            shared_queries[item] = value;
        }
        __syncthreads();
    }

    for (unsigned base = begin; base < end; base += rows_at_once * unroll) {
        unsigned keys[MAX_UNROLL][MAX_VEC], values[MAX_UNROLL][MAX_VEC];
        UNROLL
        for (int u = 0; u < unroll; ++u) {
            const unsigned row = base + u * rows_at_once + own_row;
            const int in_tail = row >= kept_len;
            const size_t place = in_tail ? (size_t)slot * args.tail_capacity + (row - kept_len) : (size_t)kept_start + row;
            const int inside = row < end; // rows past the range are zeros, and weigh nothing
            const void *key = number_at(in_tail ? args.tail_keys : args.kept_keys, place * head_dim, format);
            const void *value = number_at(in_tail ? args.tail_values : args.kept_values, place * head_dim, format);
            load_raw(keys[u], key, first, inside ? count : 0, inside && whole, vec, format);
            load_raw(values[u], value, first, inside ? count : 0, inside && whole, vec, format);
        }
        UNROLL
        for (int g = 0; g < group; ++g) {
            float score[MAX_UNROLL];
            float new_max = max[g];
            UNROLL
            for (int u = 0; u < unroll; ++u) {
                float dot = 0.0f;
                UNROLL
                for (int i = 0; i < vec; ++i) {
                    const float number =
                        in_registers ? query[g * vec + i] : shared_queries[g * MAX_HEAD_DIM + first + i];
                    dot += number * widen_raw(keys[u], i, format);
                }
                UNROLL
                for (int distance = lanes / 2; distance > 0; distance /= 2) {
                    dot += __shfl_xor_sync(ALL_LANES, dot, distance);
                }
                score[u] = base + u * rows_at_once + own_row < end ? dot : -INFINITY;
                new_max = fmaxf(new_max, score[u]);
            }
            const float fade = exp2f(max[g] - new_max);
            max[g] = new_max;
            total[g] *= fade;
            UNROLL
            for (int i = 0; i < vec; ++i) {
                sum[g * vec + i] *= fade;
            }
            UNROLL
            for (int u = 0; u < unroll; ++u) {
                const float weight = exp2f(score[u] - new_max);
                total[g] += weight;
                UNROLL
                for (int i = 0; i < vec; ++i) {
                    sum[g * vec + i] += weight * widen_raw(values[u], i, format);
                }
            }
        }
    }

    // The rows of a warp, then the warps of the block.
    UNROLL
    for (int g = 0; g < group; ++g) {
        UNROLL
        for (int distance = lanes; distance < WARP; distance *= 2) {
            const float new_max = fmaxf(max[g], __shfl_xor_sync(ALL_LANES, max[g], distance));
            const float fade = exp2f(max[g] - new_max);
            max[g] = new_max;
            total[g] *= fade;
            total[g] += __shfl_xor_sync(ALL_LANES, total[g], distance);
            UNROLL
            for (int i = 0; i < vec; ++i) {
                sum[g * vec + i] *= fade;
                sum[g * vec + i] += __shfl_xor_sync(ALL_LANES, sum[g * vec + i], distance);
            }
        }
    }
    const size_t range_place = ((size_t)slot * args.max_ranges + range) * group_size;
    UNROLL
    for (int g = 0; g < group; ++g) {
        if (g < group_size) {
            if (threadIdx.x % WARP < lanes) {
                UNROLL
                for (int i = 0; i < vec; ++i) {
                    if (i < count) {
                        warp_sums[warp][first + i] = sum[g * vec + i];
                    }
                }
            }
            if (threadIdx.x % WARP == 0) {
                warp_stats[warp][0] = max[g];
                warp_stats[warp][1] = total[g];
            }
            __syncthreads();
            float block_max = LOWEST, block_total = 0.0f, fade[WARPS];
            UNROLL
            for (int w = 0; w < WARPS; ++w) {
                block_max = fmaxf(block_max, warp_stats[w][0]);
            }
            UNROLL
            for (int w = 0; w < WARPS; ++w) {
                fade[w] = exp2f(warp_stats[w][0] - block_max);
                block_total += fade[w] * warp_stats[w][1];
            }
            for (unsigned number = threadIdx.x; number < head_dim; number += THREADS) {
                float block_sum = 0.0f;
                UNROLL
                for (int w = 0; w < WARPS; ++w) {
                    block_sum += fade[w] * warp_sums[w][number];
                }
                if (ranges == 1) {
                    const size_t index = (first_query + g) * head_dim + number;
                    store_number(args.out, index, args.query_format, block_sum / block_total);
                } else {
                    store_number(args.partial_sums, (range_place + g) * head_dim + number, F32, block_sum);
                }
            }
            if (ranges > 1 && threadIdx.x == 0) {
                store_number(args.partial_stats, 2 * (range_place + g), F32, block_max);
                store_number(args.partial_stats, 2 * (range_place + g) + 1, F32, block_total);
            }
            __syncthreads();
        }
    }
    if (ranges == 1) {
        return;
    }

    // The ranges of the head: by the block that is last to get here, when all others have written theirs.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(args.counters + slot, 1u) == ranges - 1;
    }
    __syncthreads();
    if (!is_last) {
        return;
    }
    __threadfence();
    const size_t head_place = (size_t)slot * args.max_ranges * group_size;
    for (unsigned g = warp; g < group_size; g += WARPS) {
        const float *stats = args.partial_stats + 2 * (head_place + g);
        float head_max = LOWEST, head_total = 0.0f;
        for (unsigned r = threadIdx.x % WARP; r < ranges; r += WARP) {
            head_max = fmaxf(head_max, load_fresh(stats + 2 * (size_t)r * group_size));
        }
        UNROLL
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            head_max = fmaxf(head_max, __shfl_xor_sync(ALL_LANES, head_max, distance));
        }
        for (unsigned r = threadIdx.x % WARP; r < ranges; r += WARP) {
            const float weight = exp2f(load_fresh(stats + 2 * (size_t)r * group_size) - head_max);
            weights[g][r] = weight;
            head_total += weight * load_fresh(stats + 2 * (size_t)r * group_size + 1);
        }
        UNROLL
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            head_total += __shfl_xor_sync(ALL_LANES, head_total, distance);
        }
        for (unsigned r = threadIdx.x % WARP; r < ranges; r += WARP) {
            weights[g][r] /= head_total;
        }
    }
    __syncthreads();
    for (unsigned item = threadIdx.x; item < group_size * head_dim; item += THREADS) {
        const float *sums = args.partial_sums + head_place * head_dim + item;
        float value = 0.0f;
        for (unsigned r = 0; r < ranges; ++r) {
            value += weights[item / head_dim][r] * load_fresh(sums + (size_t)r * group_size * head_dim);
        }
        store_number(args.out, first_query * head_dim + item, args.query_format, value);
    }
    if (threadIdx.x == 0) {
        store_4(args.counters + slot, 0);
    }
}

#define RAGGED_DECODE_KERNEL(name, format, width, lanes, vec, group, unroll)                                           \
    KERNEL ragged_decode_##name##_w##width##_g##group(const struct ragged_decode args) {                               \
        attend(args, format, lanes, vec, group, unroll);                                                               \
    }

// Every kernel of one storage format: `width` is the largest head dimension, `group` the largest group size.
#define RAGGED_DECODE_KERNELS(EACH, name, format)                                                                      \
    EACH(name, format, 64, 8, 8, 1, 4)                                                                                 \
    EACH(name, format, 64, 8, 8, 2, 4)                                                                                 \
    EACH(name, format, 64, 8, 8, 4, 4)                                                                                 \
    EACH(name, format, 64, 8, 8, 8, 2)                                                                                 \
    EACH(name, format, 64, 16, 4, 16, 2)                                                                               \
    EACH(name, format, 128, 16, 8, 1, 4)                                                                               \
    EACH(name, format, 128, 16, 8, 2, 4)                                                                               \
    EACH(name, format, 128, 16, 8, 4, 4)                                                                               \
    EACH(name, format, 128, 16, 8, 8, 2)                                                                               \
    EACH(name, format, 128, 32, 4, 16, 2)                                                                              \
    EACH(name, format, 256, 32, 8, 1, 4)                                                                               \
    EACH(name, format, 256, 32, 8, 2, 4)                                                                               \
    EACH(name, format, 256, 32, 8, 4, 4)                                                                               \
    EACH(name, format, 256, 32, 8, 8, 2)                                                                               \
    EACH(name, format, 256, 32, 8, 16, 1)

#endif
