/* Vectors of 16 floats, written with the compilers' own vector type: one AVX-512 register, two of AVX2, four of NEON. */

#ifndef RORQUAL_VECTORS_H
#define RORQUAL_VECTORS_H

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16_PRODUCTS 1
#endif
#endif

#define VECTOR 16

typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

INLINE long whole(long n) { return (n + VECTOR - 1) / VECTOR * VECTOR; }

/* Lanes in another order, given by 16 constants. */
#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (Integers){__VA_ARGS__})
#endif

INLINE float sum_lanes(Vector x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = x[i] + x[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
#endif
}

/* Where `when` has all bits of a lane set `a`, else `b`. */
INLINE Vector choose(Integers when, Vector a, Vector b) { return (Vector)(((Integers)a & when) | ((Integers)b & ~when)); }
INLINE Vector smaller(Vector a, float b) { return choose(a > b, (Vector){0} + b, a); } /* a NaN of `a` stays */
INLINE Vector larger(Vector a, float b) { return choose(a < b, (Vector){0} + b, a); }

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

/* The first `n` (at most 16) elements of a row, the rest 0; and back. */
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
