/* Inner products along rows: c[i][j] = a_i . b_j, both operands in their natural layout.
 *
 * Every product has one order of additions, whatever the number of rows: one partial sum a lane over a block of
 * DOT_STEPS vectors of words, added up by the tree of `sum_lanes`, and the blocks one after the other. So a row's result does not depend
 * on its neighbours, and a single row streams the other operand once. */

#include "gemm.h"

#ifndef RORQUAL_DOTS
#define RORQUAL_DOTS
#define DOT_STEPS (1024 / VECTOR) /* 4 KiB of a row */
#ifdef HAS_32_REGISTERS
#define DOT_TILE 16 /* sums kept at once */
#else
#define DOT_TILE 8
#endif

/* sum_lanes of VECTOR vectors at once: lane l of the result is that of x[l]. */
INLINE Vector sum_lanes_of_all(const Vector *x) {
#ifdef __AVX512F__
    __m512 s[8], t[4], u[2];
    for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)x[8 * (i % 2) + i / 2], b = (__m512)x[8 * (i % 2) + 4 + i / 2];
        s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; i++) { /* a group of four lanes each: x[i], x[4 + i], x[8 + i], x[12 + i] */
        __m512 a = s[2 * i], b = s[2 * i + 1];
        t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; i++) {
        __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        u[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    return (Vector)_mm512_add_ps(_mm512_shuffle_ps(u[0], u[1], 0x88), _mm512_shuffle_ps(u[0], u[1], 0xdd));
#elif defined(__AVX__)
    __m256 s[4], t[2];
    for (int i = 0; i < 4; i++) { /* of x[i] and x[i + 4], half a register each */
        __m256 a = (__m256)x[i], b = (__m256)x[i + 4];
        s[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    for (int i = 0; i < 2; i++) {
        __m256d a = (__m256d)s[2 * i], b = (__m256d)s[2 * i + 1];
        t[i] = _mm256_add_ps((__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b));
    }
    return (Vector)_mm256_add_ps(_mm256_shuffle_ps(t[0], t[1], 0x88), _mm256_shuffle_ps(t[0], t[1], 0xdd));
#else
    Vector out;
    for (int i = 0; i < VECTOR; i++) out[i] = sum_lanes(x[i]);
    return out;
#endif
}

/* Up to a vector of words of a row; what lies beyond its `n` elements counts as 0. */
INLINE Vector step_of(const float *p, long n) {
#ifdef __AVX512F__
    if (n < VECTOR) return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#endif
    return load(p, n);
}
INLINE Vector add_products(Vector sum, Vector a, Vector b) { return sum + a * b; }

INLINE Bits step_of_bf16(const uint16_t *p, long n) {
    Bits v = {0};
    if (n >= 2 * VECTOR) memcpy(&v, p, sizeof(v));
#if defined(__AVX512BW__)
    else v = (Bits)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
#else
    else memcpy(&v, p, sizeof(uint16_t) * n);
#endif
    return v;
}
INLINE Vector add_products_bf16(Vector sum, Bits a, Bits b) {
#ifdef HAS_BF16_PRODUCTS
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = sum + (Vector)(a << 16) * (Vector)(b << 16);
    return sum + (Vector)(a & 0xffff0000u) * (Vector)(b & 0xffff0000u);
#endif
}
typedef Vector Step;
typedef Bits Step_bf16;
#endif

/* `height` rows of a times `width` rows of b over k elements (a block at most) -> tile [height][width], with room
 * for DOT_TILE; height * width is no more. */
INLINE void NAME(dot_tile)(int height, int width, const T *const *a, const T *const *b, long k, float *tile) {
    const long each = VECTOR * PER_WORD;
    Vector sum[DOT_TILE] = {0};
    long at = 0;
    enum { AT_ONCE = 3 - PER_WORD }; /* a step of pairs is two already */
#pragma GCC unroll AT_ONCE
    for (; at + each <= k; at += each) {
        NAME(Step) x[4];
#pragma GCC unroll 4
        for (int i = 0; i < height; i++) x[i] = NAME(step_of)(a[i] + at, each);
#pragma GCC unroll 16
        for (int j = 0; j < width; j++) {
            NAME(Step) y = NAME(step_of)(b[j] + at, each);
#pragma GCC unroll 4
            for (int i = 0; i < height; i++) sum[i * width + j] = NAME(add_products)(sum[i * width + j], x[i], y);
        }
    }
    if (at < k) {
#pragma GCC unroll 16
        for (int j = 0; j < width; j++) {
            NAME(Step) y = NAME(step_of)(b[j] + at, k - at);
#pragma GCC unroll 4
            for (int i = 0; i < height; i++)
                sum[i * width + j] = NAME(add_products)(sum[i * width + j], NAME(step_of)(a[i] + at, k - at), y);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < DOT_TILE; i += VECTOR) store(tile + i, VECTOR, sum_lanes_of_all(sum + i));
}

/* One tile into c: rows beyond m and columns beyond n are computed twice and dropped. */
INLINE void NAME(dot_into)(int height, int width, long m, long n, const T *const *a, const T *const *b, long k, float *c,
                           long c_row, int add) {
    float tile[DOT_TILE];
    NAME(dot_tile)(height, width, a, b, k, tile);
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
        if (i < m) {
            float *to = c + i * c_row;
            const float *from = tile + i * width;
            if (add)
                for (long j = 0; j < width && j < n; j++) to[j] += from[j];
            else if (n >= width) memcpy(to, from, sizeof(float) * width);
            else memcpy(to, from, sizeof(float) * n);
        }
}

/* `rows` (1 to height) rows of a, all n of b. */
INLINE void NAME(dot_strip)(int height, int width, long rows, long n, long k, const T *const *a, const T *b,
                            const T *const *b_rows, long b_row, long from, float *c, long c_row, int add) {
    for (long j = 0; j < n; j += width) {
        const T *columns[DOT_TILE];
        for (int i = 0; i < width; i++) {
            long at = j + i < n ? j + i : j;
            columns[i] = (b_rows ? b_rows[at] : b + at * b_row) + from;
        }
        NAME(dot_into)(height, width, rows, n - j, a, columns, k, c + j, c_row, add);
    }
}

/* c [m][n] (row stride c_row) from a [m][k] (row stride a_row, rows chosen by `index` unless NULL) and b [n][k] (row
 * stride b_row, or the rows that `b_rows` points to). */
__attribute__((unused)) static void NAME(dots)(long m, long n, long k, const T *a, const int64_t *index, long a_row,
                                               const T *b, const T *const *b_rows, long b_row, float *c, long c_row) {
    const long block = DOT_STEPS * VECTOR * PER_WORD;
    for (long from = 0; from < k; from += block) {
        long count = k - from < block ? k - from : block, i = 0;
        const T *rows[4];
        int add = from > 0;
#define ROWS_AT(first, number)                                                                                       \
    for (int r = 0; r < 4; r++) {                                                                                    \
        long at = (first) + (r < (number) ? r : 0);                                                                  \
        rows[r] = a + (index ? index[at] : at) * a_row + from;                                                       \
    }
        if (m >= 4)
            for (long j = 0; j < n; j += DOT_TILE / 4) /* a few rows of b stay in cache while those of a pass */
                for (i = 0; i + 4 <= m; i += 4) {
                    ROWS_AT(i, 4)
                    const T *some = b ? b + j * b_row : NULL, *const *chosen = b_rows ? b_rows + j : NULL;
                    NAME(dot_strip)(4, DOT_TILE / 4, 4, n - j < DOT_TILE / 4 ? n - j : DOT_TILE / 4, count, rows, some, chosen, b_row, from,
                                    c + i * c_row + j, c_row, add);
                }
        long rest = m - i;
        if (rest) ROWS_AT(i, rest)
        if (rest == 1) NAME(dot_strip)(1, DOT_TILE, 1, n, count, rows, b, b_rows, b_row, from, c + i * c_row, c_row, add);
        if (rest == 2) NAME(dot_strip)(2, DOT_TILE / 2, 2, n, count, rows, b, b_rows, b_row, from, c + i * c_row, c_row, add);
        if (rest == 3) NAME(dot_strip)(3, DOT_TILE / 3, 3, n, count, rows, b, b_rows, b_row, from, c + i * c_row, c_row, add);
#undef ROWS_AT
    }
}
