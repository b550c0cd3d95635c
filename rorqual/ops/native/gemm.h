/* Small matrix products on one core: C[m][n] (+)= sum_s A[m][s] * B[s][n], in words (see types.h).
 *
 * A is read a word at a time and broadcast, so any strides will do; rows of B and C are whole vectors. */

#include "types.h"
#include "vectors.h"

#ifndef RORQUAL_PRODUCTS
#define RORQUAL_PRODUCTS
INLINE Vector multiply_add(Vector sum, float a, const float *b) { return sum + a * *(const Vector *)b; }

/* Two products of bf16 a lane. */
INLINE Vector multiply_add_bf16(Vector sum, uint32_t a, const uint32_t *b) {
#ifdef HAS_BF16_PRODUCTS
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
#else
    Bits pair = *(const Bits *)b, low = pair << 16, high = pair & 0xffff0000u;
    uint32_t a_low = a << 16, a_high = a & 0xffff0000u;
    float f, g;
    memcpy(&f, &a_low, 4);
    memcpy(&g, &a_high, 4);
    return sum + f * (Vector)low + g * (Vector)high;
#endif
}
#endif

/* One register block: `rows` (up to `height`) rows of A by `vectors` vectors of B. `index` picks rows of A (NULL: in order). */
INLINE void NAME(block)(int height, int vectors, long rows, long steps, const WORD *a, const int64_t *index, long a_row,
                        long a_step, const WORD *b, long b_row, float *c, long c_row, int add) {
    Vector sum[8][4];
    const WORD *from[8];
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
        long at = i < rows ? i : 0;
        from[i] = a + (index ? index[at] : at) * a_row;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[i][v] = (Vector){0};
    }
    for (long s = 0; s < steps; s++) {
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[i][v] = NAME(multiply_add)(sum[i][v], from[i][s * a_step], b + s * b_row + v * VECTOR);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
        if (i < rows) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                Vector *out = (Vector *)(c + i * c_row + v * VECTOR);
                *out = add ? *out + sum[i][v] : sum[i][v];
            }
        }
    }
}

/* C [m][n] from A [m][steps] (row stride a_row, step stride a_step, in words) and B [steps][n]; n a multiple of 16. */
__attribute__((unused)) static void NAME(gemm)(long m, long n, long steps, const WORD *a, const int64_t *index, long a_row, long a_step,
                       const WORD *b, long b_row, float *c, long c_row, int add) {
    long done = 0;
#define BLOCKS(HEIGHT, VECTORS)                                                                                     \
    for (; n - done >= (VECTORS) * VECTOR; done += (VECTORS) * VECTOR)                                              \
        for (long i = 0; i < m; i += HEIGHT)                                                                        \
            NAME(block)(HEIGHT, VECTORS, m - i < HEIGHT ? m - i : HEIGHT, steps, index ? a : a + i * a_row,               \
                        index ? index + i : NULL, a_row, a_step, b + done, b_row, c + i * c_row + done, c_row, add);
#ifdef HAS_32_REGISTERS
    BLOCKS(6, 4)
    BLOCKS(8, 3)
    BLOCKS(8, 2)
    BLOCKS(8, 1)
#else
    BLOCKS(6, 2)
    BLOCKS(8, 1)
#endif
#undef BLOCKS
}

/* Rows of a matrix [rows][k] -> words [k / PER_WORD][rows, padded with zeros to n]: contraction along a row. */
INLINE void NAME(pack_rows)(const T *x, long stride, long rows, long k, long n, WORD *out) {
    for (long s = 0; s < k / PER_WORD; s++) {
        for (long r = 0; r < rows; r++) memcpy(out + s * n + r, x + r * stride + s * PER_WORD, sizeof(WORD));
        for (long r = rows; r < n; r++) out[s * n + r] = 0;
    }
}

/* Rows of a matrix [rows][k] -> words [ceil(rows / PER_WORD)][k]: contraction down the rows (missing rows count as 0). */
INLINE void NAME(pack_columns)(const T *x, const int64_t *index, long stride, long rows, long k, WORD *out) {
#ifdef ELEMENT_BF16
    for (long s = 0; 2 * s < rows; s++) {
        const T *restrict a = x + (index ? index[2 * s] : 2 * s) * stride, *restrict b = NULL;
        uint32_t *restrict o = out + s * k;
        if (2 * s + 1 < rows) b = x + (index ? index[2 * s + 1] : 2 * s + 1) * stride;
        if (b)
            for (long i = 0; i < k; i++) o[i] = (uint32_t)a[i] | (uint32_t)b[i] << 16;
        else
            for (long i = 0; i < k; i++) o[i] = a[i];
    }
#else
    for (long s = 0; s < rows; s++) memcpy(out + s * k, x + (index ? index[s] : s) * stride, sizeof(T) * k);
#endif
}

/* fp32 rows [rows][k] -> words [ceil(rows / PER_WORD)][k], rounded to T: contraction down the rows. */
INLINE void NAME(pack_columns_float)(const float *x, long rows, long k, WORD *out) {
#ifdef ELEMENT_BF16
    for (long s = 0; 2 * s < rows; s++) {
        const float *restrict a = x + 2 * s * k, *restrict b = x + (2 * s + 1) * k;
        uint32_t *restrict o = out + s * k;
        if (2 * s + 1 < rows)
            for (long i = 0; i < k; i += VECTOR) {
                Bits low = __builtin_convertvector(round_bf16(load(a + i, k - i)), Bits);
                Bits high = __builtin_convertvector(round_bf16(load(b + i, k - i)), Bits);
                store((float *)o + i, k - i, (Vector)(low | high << 16));
            }
        else
            for (long i = 0; i < k; i++) o[i] = to_bf16(a[i]);
    }
#else
    memcpy(out, x, sizeof(float) * rows * k);
#endif
}
