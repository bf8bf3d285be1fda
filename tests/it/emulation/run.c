// Runs a grid of the kernels for ragged heads on the host, one block after the other; a shared library that the tests load.

#define _XOPEN_SOURCE 700
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include "ragged_decode_bf16.cu"
#include "ragged_decode_f16.cu"
#include "ragged_decode_f32.cu"

#define STACK_BYTES 65536

// Bytes `first..end` that the kernel may read and, if `writable`, write.
struct region {
    uintptr_t first, end;
    int writable;
};

struct barrier {
    unsigned arrived, rounds;
};

dim3 threadIdx, blockIdx;

static struct {
    ucontext_t start;
    jmp_buf resume;
    int started, done;
    char *stack;
} threads[THREADS];
static jmp_buf all_done;
static unsigned step;        // from a thread to the one that takes the next turn
static unsigned idle_turns;  // since a thread last passed a barrier or ended
static unsigned alive;
static struct barrier block_barrier, warp_barriers[WARPS];
static float exchanged[2][THREADS]; // two: a thread may be one exchange ahead of another

static void (*kernel)(struct ragged_decode);
static struct ragged_decode arguments;
static const struct region *regions;
static size_t num_regions;
static char *message; // of the first error; empty if there is none
static size_t message_bytes;

static void report(const char *what, const void *address, size_t bytes) {
    if (!message[0]) {
        snprintf(message, message_bytes, "block (%u, %u), thread %u: %s (address %p, %zu bytes)", blockIdx.x, blockIdx.y,
                 threadIdx.x, what, address, bytes);
    }
}

void check_access(const void *address, size_t bytes, int write) {
    const uintptr_t first = (uintptr_t)address;
    if (first % bytes) {
        report("access that is not aligned", address, bytes);
    }
    for (size_t i = 0; i < num_regions; ++i) {
        if (regions[i].first <= first && first + bytes <= regions[i].end && (regions[i].writable || !write)) {
            return;
        }
    }
    report(write ? "write outside the regions" : "read outside the regions", address, bytes);
    longjmp(all_done, 1); // memory that need not exist
}

__attribute__((noinline)) static void run_thread(unsigned thread) {
    threadIdx.x = thread;
    if (threads[thread].started) {
        _longjmp(threads[thread].resume, 1);
    }
    threads[thread].started = 1;
    setcontext(&threads[thread].start);
}

static void next_turn(void) {
    unsigned next = threadIdx.x;
    do {
        next = (next + step) % THREADS;
    } while (threads[next].done);
    if (next != threadIdx.x) {
        run_thread(next);
    }
}

__attribute__((noinline)) static void yield_turn(void) {
    if (++idle_turns > 4 * THREADS) {
        report("threads wait for each other in different places", NULL, 0);
        longjmp(all_done, 1);
    }
    if (!_setjmp(threads[threadIdx.x].resume)) {
        next_turn();
    }
}

static void wait_for(struct barrier *barrier, unsigned expected) {
    const unsigned round = barrier->rounds;
    if (++barrier->arrived == expected) {
        barrier->arrived = 0;
        ++barrier->rounds;
        idle_turns = 0;
    }
    while (barrier->rounds == round) {
        yield_turn();
    }
}

void __syncthreads(void) {
#ifndef WITHOUT_BARRIERS // a test of the emulation
    wait_for(&block_barrier, THREADS);
#endif
}

float __shfl_xor_sync(unsigned lanes, float value, int distance) {
    const unsigned thread = threadIdx.x;
    struct barrier *barrier = &warp_barriers[thread / WARP];
    if (lanes != ALL_LANES || distance < 1 || distance >= WARP) {
        report("exchange with lanes that a warp has not", NULL, 0);
    }
    float *slots = exchanged[barrier->rounds % 2];
    slots[thread] = value;
    wait_for(barrier, WARP);
    return slots[thread ^ distance];
}

static void thread_main(void) {
    kernel(arguments);
    threads[threadIdx.x].done = 1;
    idle_turns = 0;
    if (--alive == 0) {
        longjmp(all_done, 1);
    }
    next_turn();
}

#ifdef __ELF__
extern char __start_emulated_shared[], __stop_emulated_shared[];
#endif

static void run_block(void) {
#ifdef __ELF__
    // NaN: a block finds nothing of use in shared memory.
    memset(__start_emulated_shared, 0xff, (size_t)(__stop_emulated_shared - __start_emulated_shared));
#endif
    alive = THREADS;
    idle_turns = 0;
    memset(&block_barrier, 0, sizeof block_barrier);
    memset(warp_barriers, 0, sizeof warp_barriers);
    for (unsigned thread = 0; thread < THREADS; ++thread) {
        threads[thread].started = threads[thread].done = 0;
        getcontext(&threads[thread].start);
        threads[thread].start.uc_stack.ss_sp = threads[thread].stack;
        threads[thread].start.uc_stack.ss_size = STACK_BYTES;
        threads[thread].start.uc_link = NULL;
        makecontext(&threads[thread].start, thread_main, 0);
    }
    if (!setjmp(all_done)) {
        run_thread(0);
    }
}

#define TABLE_ENTRY(name, format, width, lanes, vec, group, unroll)                                                    \
    {"ragged_decode_" #name "_w" #width "_g" #group, ragged_decode_##name##_w##width##_g##group},

static const struct {
    const char *name;
    void (*kernel)(struct ragged_decode);
} kernels[] = {
    RAGGED_DECODE_KERNELS(TABLE_ENTRY, f32, F32)
    RAGGED_DECODE_KERNELS(TABLE_ENTRY, f16, F16)
    RAGGED_DECODE_KERNELS(TABLE_ENTRY, bf16, BF16)
};

// Runs `grid_x * grid_y` blocks of the kernel called `name`.
//
// `block_step`, `thread_step`: from a block, or thread, to the next one in turn; they must have no divisor in common with
// the number of blocks, and with THREADS.
// `error`: at least one byte; what went wrong first, or empty.
void emulate(const char *name, const struct ragged_decode *args, unsigned grid_x, unsigned grid_y, unsigned block_step,
             unsigned thread_step, const struct region *allowed, size_t num_allowed, char *error, size_t error_bytes) {
    arguments = *args;
    step = thread_step;
    regions = allowed;
    num_regions = num_allowed;
    message = error;
    message_bytes = error_bytes;
    message[0] = 0;
    kernel = NULL;
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; ++i) {
        if (!strcmp(kernels[i].name, name)) {
            kernel = kernels[i].kernel;
        }
    }
    if (!kernel) {
        snprintf(message, message_bytes, "no kernel `%s`", name);
        return;
    }
    for (unsigned thread = 0; thread < THREADS; ++thread) {
        threads[thread].stack = malloc(STACK_BYTES);
    }
    const unsigned blocks = grid_x * grid_y;
    for (unsigned count = 0, block = 0; count < blocks && !message[0]; ++count, block = (block + block_step) % blocks) {
        blockIdx.x = block % grid_x;
        blockIdx.y = block / grid_x;
        run_block();
    }
    for (unsigned thread = 0; thread < THREADS; ++thread) {
        free(threads[thread].stack);
    }
}
