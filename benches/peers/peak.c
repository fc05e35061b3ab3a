/* What this machine can do at most: fused multiply-adds in registers, and copies of more than the caches hold.
 *
 * peak.py compiles this file when it is first needed. Both functions start the threads together, and return the sum of
 * what the threads do a second: of copies on the average, as threads share the memory; of multiply-adds in the best of
 * many blocks of a tenth of a millisecond, which other work on the machine does not interrupt. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { STEPS = 20000, MAX_THREADS = 1024 };

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Enough independent chains to hide the latency of two units; what they add up to is returned so that it is computed. */
#define CHAINS(vector, count, set, fma, get)                                                        \
    volatile float factor = 0.999f, term = 0.001f;                                                  \
    const vector x = set(factor), y = set(term);                                                    \
    vector sums[count];                                                                             \
    for (int i = 0; i < count; i++) sums[i] = set((float)i);                                        \
    for (int step = 0; step < STEPS; step++) {                                                      \
        _Pragma("GCC unroll 16") for (int i = 0; i < count; i++) sums[i] = fma(sums[i], x, y);      \
    }                                                                                               \
    for (int i = 1; i < count; i++) sums[0] = fma(sums[0], x, sums[i]);                             \
    *out = get(sums[0]);                                                                            \
    return 2.0 * STEPS * count * sizeof(vector) / sizeof(float)

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static double fma_avx512(volatile float *out) {
    CHAINS(__m512, 16, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_cvtss_f32);
}
__attribute__((target("avx2,fma"))) static double fma_avx2(volatile float *out) {
    CHAINS(__m256, 12, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_cvtss_f32);
}
#endif

/* Four lanes in the compiler's own vectors: what other processors have. */
typedef float lanes __attribute__((vector_size(16)));
#define SET(value) ((lanes){(value), (value), (value), (value)})
#define FMA(a, b, c) ((a) * (b) + (c))
#define GET(value) ((value)[0])
static double fma_plain(volatile float *out) { CHAINS(lanes, 16, SET, FMA, GET); }

/* FLOPs of one block of multiply-adds, of the widest kind that the machine has. */
static double fma_block(void) {
    volatile float out;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return fma_avx512(&out);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma_avx2(&out);
#endif
    return fma_plain(&out);
}

typedef struct {
    pthread_barrier_t *start;
    double seconds;
    size_t bytes; /* 0: multiply-adds */
    char *from, *to;
    double rate;
} job;

static double block(job *work) {
    if (work->bytes == 0) return fma_block();
    memcpy(work->to, work->from, work->bytes);
    __asm__ volatile("" : : "r"(work->to) : "memory");
    return 2.0 * (double)work->bytes;
}

static void *run(void *argument) {
    job *work = argument;
    block(work); /* first touch, and the clock that wide instructions run at */
    pthread_barrier_wait(work->start);
    const double start = now();
    double all = 0.0, best = 0.0, last = start;
    do {
        const double done = block(work), time = now();
        if (done > best * (time - last)) best = done / (time - last);
        all += done;
        last = time;
    } while (last - start < work->seconds);
    work->rate = work->bytes == 0 ? best : all / (last - start);
    return NULL;
}

/* -1: out of memory, or no thread to be had. */
static double together(int threads, double seconds, size_t bytes) {
    if (threads < 1 || threads > MAX_THREADS) return -1.0;
    static job jobs[MAX_THREADS];
    pthread_t handles[MAX_THREADS];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, (unsigned)threads);
    double rate = 0.0;
    for (int i = 0; i < threads; i++) {
        jobs[i] = (job){&start, seconds, bytes, NULL, NULL, 0.0};
        if (bytes == 0) continue;
        jobs[i].from = malloc(bytes);
        jobs[i].to = malloc(bytes);
        if (!jobs[i].from || !jobs[i].to) rate = -1.0;
        else memset(jobs[i].from, 1, bytes);
    }
    if (rate == 0.0) {
        for (int i = 1; i < threads; i++) {
            if (pthread_create(&handles[i], NULL, run, &jobs[i]) != 0) abort();
        }
        run(&jobs[0]);
        for (int i = 1; i < threads; i++) pthread_join(handles[i], NULL);
        for (int i = 0; i < threads; i++) rate += jobs[i].rate;
    }
    for (int i = 0; i < threads; i++) {
        free(jobs[i].from);
        free(jobs[i].to);
    }
    pthread_barrier_destroy(&start);
    return rate;
}

/* FLOP/s of f32 multiply-adds (a multiply-add counts 2). */
double peak_flops(int threads, double seconds) { return together(threads, seconds, 0); }

/* Bytes/s read and written by copies of `bytes` bytes on each thread. */
double peak_copy(int threads, double seconds, size_t bytes) { return together(threads, seconds, bytes); }
