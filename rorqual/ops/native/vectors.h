/* Vectors of the processor's own width, written with the compilers' own vector type: 16 floats of AVX-512, 8 of AVX, 4
 * elsewhere. Compilers split wider ones, but then keep them in memory, which costs up to ten times the time. */

#ifndef RORQUAL_VECTORS_H
#define RORQUAL_VECTORS_H

#include "common.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16_PRODUCTS 1
#endif
#endif

#if defined(__AVX512F__)
#define VECTOR 16
#elif defined(__AVX__)
#define VECTOR 8
#else
#define VECTOR 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define HAS_32_REGISTERS 1 /* 16 otherwise */
#endif
#define PADDED 16 /* padded rows are as long on every processor */
#define LANES VECTOR /* tokens whose small matrices are worked on side by side, one per vector lane */

typedef float Vector __attribute__((vector_size(4 * VECTOR), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * VECTOR), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * VECTOR), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * VECTOR), aligned(2)));

INLINE long whole(long n) { return (n + PADDED - 1) / PADDED * PADDED; }

#if VECTOR == 16
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif VECTOR == 8
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#else
#define LANE_NUMBERS {0, 1, 2, 3}
#endif

/* Keeps what was loaded in a register, where gcc would load it again for every use. */
#if defined(__x86_64__)
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#elif defined(__aarch64__)
#define IN_REGISTER(x) __asm__("" : "+w"(x))
#else
#define IN_REGISTER(x) (void)(x)
#endif

/* Lanes in another order, given by as many constants. */
#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (Integers){__VA_ARGS__})
#endif

/* Neighbours at half the width first, then at a quarter, and so on. */
INLINE float sum_lanes(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

/* Where `when` has all bits of a lane set `a`, else `b`. */
INLINE Vector choose(Integers when, Vector a, Vector b) { return (Vector)(((Integers)a & when) | ((Integers)b & ~when)); }

/* The smaller and the larger one; a NaN of `a` stays: of a NaN and a number the processor gives the second operand. */
INLINE Vector smaller(Vector a, float b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps(_mm512_set1_ps(b), (__m512)a);
#elif defined(__AVX__)
    return (Vector)_mm256_min_ps(_mm256_set1_ps(b), (__m256)a);
#else
    return choose(a > b, (Vector){0} + b, a);
#endif
}
INLINE Vector larger(Vector a, float b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps(_mm512_set1_ps(b), (__m512)a);
#elif defined(__AVX__)
    return (Vector)_mm256_max_ps(_mm256_set1_ps(b), (__m256)a);
#else
    return choose(a < b, (Vector){0} + b, a);
#endif
}

/* A bit for each lane whose bits are all set. */
INLINE uint32_t lanes_set(Integers x) {
#if defined(__AVX512F__)
    return _mm512_cmplt_epi32_mask((__m512i)x, _mm512_setzero_si512());
#elif defined(__AVX__)
    return (uint32_t)_mm256_movemask_ps((__m256)x);
#else
    uint32_t bits = 0;
    for (int i = 0; i < VECTOR; i++) bits |= (uint32_t)(x[i] & 1) << i;
    return bits;
#endif
}

/* exp_ of common.h, lane by lane. */
INLINE Vector exp_lanes(Vector x) {
    const float magic = 12582912.0f; /* adding it leaves the nearest whole number in the low bits */
    x = smaller(larger(x, -87.0f), 88.0f);
    Vector n = (x * 1.44269504f + magic) - magic;
    Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (Vector)((__builtin_convertvector(n, Integers) + 127) << 23);
}
INLINE Vector sigmoid_lanes(Vector x) { return 1.0f / (1.0f + exp_lanes(-x)); }

/* Natural logarithm of positive, normal numbers, to about 1e-7 relative but near 1, where it is that of u's distance. */
INLINE Vector log_lanes(Vector u) {
    Integers bits = (Integers)u, power = (bits - 0x3f3504f3) >> 23; /* the rest lies from sqrt(1/2) to sqrt(2) */
    Vector n = __builtin_convertvector(power, Vector), m = (Vector)(bits - (power << 23)) - 1.0f;
    Vector p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    Vector square = m * m;
    return (p * m * square + n * -2.12194440e-4f - 0.5f * square) + m + n * 0.693359375f;
}
/* log(1 + t) of t >= 0, as exact for small t: what rounding did to 1 + t is made good. */
INLINE Vector log1p_lanes(Vector t) {
    Vector u = 1.0f + t, rest = u - 1.0f;
    return choose(rest > 0.0f, log_lanes(u) * (t / choose(rest > 0.0f, rest, u)), t);
}

/* The first `n` (at most VECTOR) elements of a row, the rest 0; and back. */
INLINE Vector load(const float *p, long n) {
    if (n >= VECTOR) return *(const Vector *)p;
    Vector v = {0};
    memcpy(&v, p, sizeof(float) * n);
    return v;
}
INLINE void store(float *p, long n, Vector v) {
    if (n >= VECTOR) *(Vector *)p = v;
    else memcpy(p, &v, sizeof(float) * n);
}
INLINE Vector widen_bf16(Halves h) {
#ifdef HAS_BF16_PRODUCTS
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__) && VECTOR == 8
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16); /* gcc widens by halves */
#else
    return (Vector)(__builtin_convertvector(h, Bits) << 16);
#endif
}
INLINE Vector load_bf16(const uint16_t *p, long n) {
    Halves h = {0};
    if (n >= VECTOR) h = *(const Halves *)p;
    else memcpy(&h, p, sizeof(uint16_t) * n);
    return widen_bf16(h);
}
INLINE Halves round_bf16(Vector v) {
#ifdef HAS_BF16_PRODUCTS
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    Bits i = (Bits)v, rounded = (i + 0x7fffu + (i >> 16 & 1u)) >> 16;
    Integers is_number = v == v;
    return __builtin_convertvector((rounded & (Bits)is_number) | ((i >> 16 | 0x40u) & ~(Bits)is_number), Halves);
#endif
}
INLINE void store_bf16(uint16_t *p, long n, Vector v) {
    Halves h = round_bf16(v);
    if (n >= VECTOR) *(Halves *)p = h;
    else memcpy(p, &h, sizeof(uint16_t) * n);
}

#endif
