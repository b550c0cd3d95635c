/* What the kernels share. fp32, rows contiguous; a loop over rows is split over threads. Every function has its equation,
 * and its reference, in the Python file named above it; tests hold the two together. */

#ifndef RORQUAL_COMMON_H
#define RORQUAL_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MAX_STREAMS 8
#define MAX_MIX (MAX_STREAMS * (MAX_STREAMS + 2))
#define MAX_ITERS 64
#define FORK_FROM 65536 /* multiply-adds below which a second thread costs more than it saves */

#ifdef _OPENMP
extern int omp_in_parallel(void);
#else
static inline int omp_in_parallel(void) { return 0; }
#endif

/* A loop whose rounds are shared out over threads where there is enough to do. A parallel region of one thread would do,
 * but entering it costs as much as many a round of decoding. Within a parallel region a thread goes through the loop by
 * itself. `...` is the body. */
#define SHARED_OUT(is_much, head, ...)                                                                              \
    do {                                                                                                            \
        if ((is_much) && !omp_in_parallel()) {                                                                      \
            _Pragma("omp parallel for schedule(static)") for (head) __VA_ARGS__                                     \
        } else {                                                                                                    \
            for (head) __VA_ARGS__                                                                                  \
        }                                                                                                           \
    } while (0)

#define INLINE static inline __attribute__((always_inline))

/* exp to about 1e-7 relative, written so that compilers vectorise it (calls into libm they do not). */
INLINE float exp_(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    union {
        int32_t i;
        float f;
    } two_n = {.i = ((int32_t)n + 127) << 23};
    return p * two_n.f;
}

INLINE float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }
/* `a` is the data: a NaN there must come out, or a diverged model would look healthy */
INLINE float min_(float a, float b) { return a > b ? b : a; }
INLINE float max_(float a, float b) { return a < b ? b : a; }

/* bf16 is the upper half of a float; rounding is to the nearest, ties to even, and a NaN stays one. */
INLINE float from_bf16(uint16_t x) {
    union {
        uint32_t i;
        float f;
    } u = {.i = (uint32_t)x << 16};
    return u.f;
}
INLINE uint16_t to_bf16(float x) {
    union {
        float f;
        uint32_t i;
    } u = {.f = x};
    uint32_t rounded = (u.i + 0x7fffu + (u.i >> 16 & 1u)) >> 16;
    return (uint16_t)(x == x ? rounded : (u.i >> 16 | 0x40u));
}

INLINE float dot(const float *restrict a, const float *restrict b, long n) {
    float s = 0.0f;
#pragma omp simd reduction(+ : s)
    for (long i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

#endif
