/* Included twice by rows.c, once for each element type. */

#include "kernels.h"
#include "vectors.h"

#define EACH_VECTOR(i, d) for (long i = 0; i < (d); i += VECTOR)

INLINE float NAME(sum_products)(const T *restrict a, const T *restrict b, long n) {
    Vector s = {0};
    EACH_VECTOR(i, n) s += LOAD(a + i, n - i) * LOAD(b + i, n - i);
    return sum_lanes(s);
}

/* ---- norms.py: rms_norm -------------------------------------------------------------------------------------- */

/* weight may be NULL; rs [rows] keeps the factor for the backward pass. */
void NAME(rms_norm_forward)(const T *x, const float *weight, long rows, long d, float eps, T *y, float *rs) {
    SHARED_OUT(rows * d > FORK_FROM, long t = 0; t < rows; t++, {
        const T *restrict xt = x + t * d;
        T *restrict yt = y + t * d;
        float r = 1.0f / sqrtf(NAME(sum_products)(xt, xt, d) / (float)d + eps);
        rs[t] = r;
        if (weight) EACH_VECTOR(i, d) STORE(yt + i, d - i, LOAD(xt + i, d - i) * r * load(weight + i, d - i));
        else EACH_VECTOR(i, d) STORE(yt + i, d - i, LOAD(xt + i, d - i) * r);
    });
}

/* dx only; the weight's gradient is a sum over rows that keeps one order whatever the number of threads. */
void NAME(rms_norm_backward)(const T *x, const float *weight, const float *rs, const T *dy, long rows, long d, T *dx) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const T *restrict xt = x + t * d, *restrict g = dy + t * d;
        T *restrict dxt = dx + t * d;
        float r = rs[t];
        if (weight) {
            Vector inner = {0};
            EACH_VECTOR(i, d) inner += LOAD(g + i, d - i) * load(weight + i, d - i) * LOAD(xt + i, d - i);
            float c = sum_lanes(inner) * r * r * r / (float)d;
            EACH_VECTOR(i, d)
            STORE(dxt + i, d - i, LOAD(g + i, d - i) * load(weight + i, d - i) * r - c * LOAD(xt + i, d - i));
        } else {
            float c = NAME(sum_products)(g, xt, d) * r * r * r / (float)d;
            EACH_VECTOR(i, d) STORE(dxt + i, d - i, LOAD(g + i, d - i) * r - c * LOAD(xt + i, d - i));
        }
    }
}

/* dw[i] = sum over rows of dy x rs, rows in ascending order, columns split over threads. */
void NAME(rms_norm_weight_backward)(const T *x, const float *rs, const T *dy, long rows, long d, float *dw) {
    for (long i = 0; i < d; i++) dw[i] = 0.0f;
    for (long t = 0; t < rows; t++) {
        const T *restrict xt = x + t * d, *restrict g = dy + t * d;
        float r = rs[t];
        EACH_VECTOR(i, d)
        store(dw + i, d - i, load(dw + i, d - i) + LOAD(g + i, d - i) * LOAD(xt + i, d - i) * r);
    }
}

/* ---- swiglu.py, experts.py: clamped SwiGLU times a routing weight ---------------------------------------------- */

/* a (gate), u (up) [rows, d]; weight [rows] or NULL; limit 0: no clamp. */
void NAME(swiglu_forward)(const T *a, const T *u, const float *weight, long rows, long d, float limit, T *out) {
    float top = limit > 0.0f ? limit : INFINITY;
    SHARED_OUT(rows * d > FORK_FROM, long t = 0; t < rows; t++, {
        float w = weight ? weight[t] : 1.0f;
        const T *restrict at = a + t * d, *restrict ut = u + t * d;
        T *restrict o = out + t * d;
        EACH_VECTOR(i, d) {
            Vector g = smaller(LOAD(at + i, d - i), top), v = smaller(larger(LOAD(ut + i, d - i), -top), top);
            STORE(o + i, d - i, g * sigmoid_lanes(g) * v * w);
        }
    });
}

void NAME(swiglu_backward)(const T *a, const T *u, const float *weight, const T *dout, long rows, long d, float limit,
                           T *da, T *du, float *dweight) {
    float top = limit > 0.0f ? limit : INFINITY;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        float w = weight ? weight[t] : 1.0f;
        const T *restrict at = a + t * d, *restrict ut = u + t * d, *restrict gt = dout + t * d;
        T *restrict dat = da + t * d, *restrict dut = du + t * d;
        Vector total = {0}, none = {0};
        EACH_VECTOR(i, d) {
            Vector a0 = LOAD(at + i, d - i), u0 = LOAD(ut + i, d - i), go = LOAD(gt + i, d - i);
            Vector g = smaller(a0, top), v = smaller(larger(u0, -top), top);
            Vector s = sigmoid_lanes(g), silu = g * s;
            total += go * silu * v;
            go *= w;
            STORE(dat + i, d - i, choose(a0 > top, none, go * v * (s + silu * (1.0f - s))));
            STORE(dut + i, d - i, choose((u0 > top) | (u0 < -top), none, go * silu));
        }
        if (dweight) dweight[t] = sum_lanes(total);
    }
}

/* ---- index_topk.py: sum_j w_j relu(dots_j) -------------------------------------------------------------------- */

void NAME(index_reduce)(const T *dots, const float *weights, long rows, long heads, long entries, float *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        float *restrict o = out + t * entries;
        for (long c = 0; c < entries; c++) o[c] = 0.0f;
        for (long j = 0; j < heads; j++) {
            const T *restrict s = dots + (t * heads + j) * entries;
            float w = weights[t * heads + j];
            EACH_VECTOR(c, entries)
            store(o + c, entries - c, load(o + c, entries - c) + w * larger(LOAD(s + c, entries - c), 0.0f));
        }
    }
}

/* ddots [rows, heads, entries] and dweights [rows, heads] from dout [rows, entries]. */
void NAME(index_reduce_backward)(const T *dots, const float *weights, const float *dout, long rows, long heads,
                                 long entries, T *ddots, float *dweights) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const float *restrict g = dout + t * entries;
        for (long j = 0; j < heads; j++) {
            const T *restrict s = dots + (t * heads + j) * entries;
            T *restrict d = ddots + (t * heads + j) * entries;
            float w = weights[t * heads + j];
            Vector total = {0}, none = {0};
            EACH_VECTOR(c, entries) {
                Vector x = LOAD(s + c, entries - c), up = load(g + c, entries - c);
                total += up * larger(x, 0.0f);
                STORE(d + c, entries - c, choose(x > 0.0f, up * w, none));
            }
            dweights[t * heads + j] = sum_lanes(total);
        }
    }
}

/* ---- rope.py: rotate the last r channels of rows in place; each table row serves `heads` consecutive rows ------- */

#ifndef RORQUAL_TURN
#define RORQUAL_TURN
/* Complex products of neighbouring pairs (re, im) with pairs (cos, sin) of the table; sign -1 turns back. */
INLINE Vector turn(Vector x, Vector table, float sign) {
#if VECTOR == 16
    Vector cos = SHUFFLE(table, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
    Vector sin = SHUFFLE(table, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
    Vector other = SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    const Vector way = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
#elif VECTOR == 8
    Vector cos = SHUFFLE(table, 0, 0, 2, 2, 4, 4, 6, 6), sin = SHUFFLE(table, 1, 1, 3, 3, 5, 5, 7, 7);
    Vector other = SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6);
    const Vector way = {-1, 1, -1, 1, -1, 1, -1, 1};
#else
    Vector cos = SHUFFLE(table, 0, 0, 2, 2), sin = SHUFFLE(table, 1, 1, 3, 3), other = SHUFFLE(x, 1, 0, 3, 2);
    const Vector way = {-1, 1, -1, 1};
#endif
    return x * cos + other * (sin * (way * sign));
}
#endif

void NAME(rope_rotate)(const T *x, const float *table, long rows, long heads, long table_rows, long k, long r,
                       float sign, T *out) {
    long plain = k - r;
    SHARED_OUT(rows * k > FORK_FROM, long t0 = 0; t0 < rows; t0 += heads, {
        const float *tab = table + t0 / heads % table_rows * r;
        for (long t = t0; t < t0 + heads; t++) {
            const T *restrict xt = x + t * k;
            T *restrict o = out + t * k;
            memcpy(o, xt, sizeof(T) * plain);
            EACH_VECTOR(i, r)
            STORE(o + plain + i, r - i, turn(LOAD(xt + plain + i, r - i), load(tab + i, r - i), sign));
        }
    });
}

/* rope.py: RMS norm (weight may be NULL), then rope, in one pass. */
void NAME(norm_rope_forward)(const T *x, const float *weight, const float *table, long rows, long heads, long table_rows,
                             long k, long r, float eps, T *out, float *rs) {
    long plain = k - r;
    SHARED_OUT(rows * k > FORK_FROM, long t0 = 0; t0 < rows; t0 += heads, {
        const float *tab = table + t0 / heads % table_rows * r;
        for (long t = t0; t < t0 + heads; t++) {
            const T *restrict xt = x + t * k;
            T *restrict o = out + t * k;
            float f = 1.0f / sqrtf(NAME(sum_products)(xt, xt, k) / (float)k + eps);
            rs[t] = f;
            if (weight)
                EACH_VECTOR(i, plain) STORE(o + i, plain - i, LOAD(xt + i, plain - i) * f * load(weight + i, plain - i));
            else EACH_VECTOR(i, plain) STORE(o + i, plain - i, LOAD(xt + i, plain - i) * f);
            EACH_VECTOR(i, r) {
                Vector v = LOAD(xt + plain + i, r - i) * f;
                if (weight) v *= load(weight + plain + i, r - i);
                STORE(o + plain + i, r - i, turn(v, load(tab + i, r - i), 1.0f));
            }
        }
    });
}

#undef EACH_VECTOR
