/* Included twice by experts.c, once for each element type. */

#include "gemm.h"

/* Row r of the sorted order belongs to token[r] and expert e where bounds[e] <= r < bounds[e + 1]; gate [rows] is its
 * routing weight. x [tokens, d], w1 and w3 [E, inner, d], w2 [E, d, inner] -> a (gate) and u (up) [rows, inner] for the
 * backward pass, out [rows, d]. d and inner are multiples of 16; limit 0: no clamp. */
void NAME(experts_forward)(const T *x, const int64_t *token, const int64_t *bounds, const float *gate, const T *w1,
                           const T *w3, const T *w2, long experts, long d, long inner, float limit, T *a, T *u, T *out) {
    float top = limit > 0.0f ? limit : INFINITY;
#pragma omp parallel
    {
        WORD *p1 = malloc(sizeof(WORD) * d * inner), *p3 = malloc(sizeof(WORD) * d * inner);
        WORD *p2 = malloc(sizeof(WORD) * d * inner);
        float *wide = malloc(sizeof(float) * BLOCK * (2 * inner + d));
        T *hidden = malloc(sizeof(T) * BLOCK * inner);
#pragma omp for schedule(dynamic)
        for (long e = 0; e < experts; e++) {
            long first = bounds[e], last = bounds[e + 1], size = d * inner;
            if (first == last) continue;
            NAME(pack_rows)(w1 + e * size, d, inner, d, inner, p1);
            NAME(pack_rows)(w3 + e * size, d, inner, d, inner, p3);
            NAME(pack_rows)(w2 + e * size, inner, d, inner, d, p2);
            for (long lo = first; lo < last; lo += BLOCK) {
                long m = last - lo < BLOCK ? last - lo : BLOCK, words = d / PER_WORD;
                float *ga = wide, *up = wide + BLOCK * inner, *y = up + BLOCK * inner;
                NAME(gemm)(m, inner, words, (const WORD *)x, token + lo, words, 1, p1, inner, ga, inner, 0);
                NAME(gemm)(m, inner, words, (const WORD *)x, token + lo, words, 1, p3, inner, up, inner, 0);
                for (long r = 0; r < m; r++)
                    for (long i = 0; i < inner; i += VECTOR) {
                        Vector a0 = load(ga + r * inner + i, VECTOR), u0 = load(up + r * inner + i, VECTOR);
                        Vector g = smaller(a0, top), v = smaller(larger(u0, -top), top);
                        STORE(a + (lo + r) * inner + i, VECTOR, a0);
                        STORE(u + (lo + r) * inner + i, VECTOR, u0);
                        STORE(hidden + r * inner + i, VECTOR, g * sigmoid_lanes(g) * v * gate[lo + r]);
                    }
                NAME(gemm)(m, d, inner / PER_WORD, (const WORD *)hidden, NULL, inner / PER_WORD, 1, p2, d, y, d, 0);
                for (long i = 0; i < m * d; i += VECTOR) STORE(out + lo * d + i, VECTOR, load(y + i, VECTOR));
            }
        }
        free(p1), free(p2), free(p3), free(wide), free(hidden);
    }
}

/* Gradients from dy [tokens, d]: dxs [rows, d] (of each row's copy of x), dgate [rows], and dw1, dw3 [E, inner, d], dw2
 * [E, d, inner] in fp32, zero where an expert has no rows. */
void NAME(experts_backward)(const T *x, const int64_t *token, const int64_t *bounds, const float *gate, const T *w1,
                            const T *w3, const T *w2, const T *a, const T *u, const T *dy, long experts, long d,
                            long inner, float limit, T *dxs, float *dgate, float *dw1, float *dw3, float *dw2) {
    float top = limit > 0.0f ? limit : INFINITY;
#pragma omp parallel
    {
        WORD *c1 = malloc(sizeof(WORD) * d * inner), *c3 = malloc(sizeof(WORD) * d * inner);
        WORD *c2 = malloc(sizeof(WORD) * d * inner);
        WORD *x_columns = malloc(sizeof(WORD) * BLOCK * d), *dy_columns = malloc(sizeof(WORD) * BLOCK * d);
        WORD *columns = malloc(sizeof(WORD) * BLOCK * inner);
        float *dh = malloc(sizeof(float) * BLOCK * inner), *hidden = malloc(sizeof(float) * BLOCK * inner);
        float *da = malloc(sizeof(float) * BLOCK * inner), *du = malloc(sizeof(float) * BLOCK * inner);
        float *dx = malloc(sizeof(float) * BLOCK * d);
        T *rounded = malloc(sizeof(T) * BLOCK * inner);
#pragma omp for schedule(dynamic)
        for (long e = 0; e < experts; e++) {
            long first = bounds[e], last = bounds[e + 1], size = d * inner, words = d / PER_WORD;
            if (first == last) {
                memset(dw1 + e * size, 0, sizeof(float) * size);
                memset(dw3 + e * size, 0, sizeof(float) * size);
                memset(dw2 + e * size, 0, sizeof(float) * size);
                continue;
            }
            NAME(pack_columns)(w1 + e * size, NULL, d, inner, d, c1);
            NAME(pack_columns)(w3 + e * size, NULL, d, inner, d, c3);
            NAME(pack_columns)(w2 + e * size, NULL, inner, d, inner, c2);
            for (long lo = first; lo < last; lo += BLOCK) {
                long m = last - lo < BLOCK ? last - lo : BLOCK, steps = (m + PER_WORD - 1) / PER_WORD;
                long thin = inner / PER_WORD;
                int add = lo > first;
                NAME(gemm)(m, inner, words, (const WORD *)dy, token + lo, words, 1, c2, inner, dh, inner, 0);
                for (long r = 0; r < m; r++) {
                    Vector total = {0}, none = {0};
                    float w = gate[lo + r];
                    for (long i = 0; i < inner; i += VECTOR) {
                        long at = (lo + r) * inner + i, to = r * inner + i;
                        Vector a0 = LOAD(a + at, VECTOR), u0 = LOAD(u + at, VECTOR), go = load(dh + to, VECTOR);
                        Vector g = smaller(a0, top), v = smaller(larger(u0, -top), top);
                        Vector s = sigmoid_lanes(g), silu = g * s;
                        total += go * silu * v;
                        go *= w;
                        store(hidden + to, VECTOR, silu * v * w);
                        store(da + to, VECTOR, choose(a0 > top, none, go * v * (s + silu * (1.0f - s))));
                        store(du + to, VECTOR, choose((u0 > top) | (u0 < -top), none, go * silu));
                    }
                    dgate[lo + r] = sum_lanes(total);
                }
                NAME(pack_columns)(x, token + lo, d, m, d, x_columns);
                NAME(pack_columns)(dy, token + lo, d, m, d, dy_columns);
                NAME(pack_columns_float)(hidden, m, inner, columns);
                NAME(gemm)(d, inner, steps, dy_columns, NULL, 1, d, columns, inner, dw2 + e * size, inner, add);
                NAME(pack_columns_float)(da, m, inner, columns);
                NAME(gemm)(inner, d, steps, columns, NULL, 1, inner, x_columns, d, dw1 + e * size, d, add);
                for (long i = 0; i < m * inner; i += VECTOR) STORE(rounded + i, VECTOR, load(da + i, VECTOR));
                NAME(gemm)(m, d, thin, (const WORD *)rounded, NULL, thin, 1, c1, d, dx, d, 0);
                NAME(pack_columns_float)(du, m, inner, columns);
                NAME(gemm)(inner, d, steps, columns, NULL, 1, inner, x_columns, d, dw3 + e * size, d, add);
                for (long i = 0; i < m * inner; i += VECTOR) STORE(rounded + i, VECTOR, load(du + i, VECTOR));
                NAME(gemm)(m, d, thin, (const WORD *)rounded, NULL, thin, 1, c3, d, dx, d, 1);
                for (long i = 0; i < m * d; i += VECTOR) STORE(dxs + lo * d + i, VECTOR, load(dx + i, VECTOR));
            }
        }
        free(c1), free(c2), free(c3), free(x_columns), free(dy_columns), free(columns), free(dh), free(hidden), free(da);
        free(du), free(dx), free(rounded);
    }
}

/* y[t] = sum over slots, in their order, of rows[slot[t][k]]: [rows, d], [tokens, active] -> fp32 [tokens, d]. */
void NAME(experts_combine)(const T *rows, const int64_t *slots, long tokens, long active, long d, float *y) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < d; i += VECTOR) {
            Vector s = {0};
            for (long k = 0; k < active; k++) s += LOAD(rows + slots[t * active + k] * d + i, d - i);
            store(y + t * d + i, d - i, s);
        }
}
