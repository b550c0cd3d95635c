/* Operations on one row at a time: RMS norm, rope, SwiGLU, the indexer's sum over heads. */

#include "common.h"

/* ---- norms.py: rms_norm -------------------------------------------------------------------------------------- */

/* weight may be NULL; rs [rows] keeps the factor for the backward pass. */
void rms_norm_forward(const float *x, const float *weight, long rows, long d, float eps, float *y, float *rs) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const float *xt = x + t * d;
        float *yt = y + t * d, r = 1.0f / sqrtf(dot(xt, xt, d) / (float)d + eps);
        rs[t] = r;
        if (weight)
            for (long i = 0; i < d; i++) yt[i] = xt[i] * r * weight[i];
        else
            for (long i = 0; i < d; i++) yt[i] = xt[i] * r;
    }
}

/* dx only; the weight's gradient is a sum over rows that keeps one order whatever the number of threads. */
void rms_norm_backward(const float *x, const float *weight, const float *rs, const float *dy, long rows, long d,
                       float *dx) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const float *xt = x + t * d, *g = dy + t * d;
        float r = rs[t], inner = 0.0f, *dxt = dx + t * d;
        if (weight) {
#pragma omp simd reduction(+ : inner)
            for (long i = 0; i < d; i++) inner += g[i] * weight[i] * xt[i];
            float c = inner * r * r * r / (float)d;
            for (long i = 0; i < d; i++) dxt[i] = g[i] * weight[i] * r - c * xt[i];
        } else {
            float c = dot(g, xt, d) * r * r * r / (float)d;
            for (long i = 0; i < d; i++) dxt[i] = g[i] * r - c * xt[i];
        }
    }
}

/* dw[i] = sum over rows of dy x rs, rows in ascending order, columns split over threads. */
void rms_norm_weight_backward(const float *x, const float *rs, const float *dy, long rows, long d, float *dw) {
    for (long i = 0; i < d; i++) dw[i] = 0.0f;
    for (long t = 0; t < rows; t++) {
        const float *xt = x + t * d, *g = dy + t * d;
        float r = rs[t];
        for (long i = 0; i < d; i++) dw[i] += g[i] * xt[i] * r;
    }
}

/* ---- swiglu.py, experts.py: clamped SwiGLU times a routing weight ---------------------------------------------- */

/* a (gate), u (up) [rows, d]; weight [rows] or NULL; limit 0: no clamp. */
void swiglu_forward(const float *a, const float *u, const float *weight, long rows, long d, float limit, float *out) {
    float top = limit > 0.0f ? limit : INFINITY;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        float w = weight ? weight[t] : 1.0f;
        for (long i = 0; i < d; i++) {
            float g = min_(a[t * d + i], top), v = min_(max_(u[t * d + i], -top), top);
            out[t * d + i] = g * sigmoid_(g) * v * w;
        }
    }
}

void swiglu_backward(const float *a, const float *u, const float *weight, const float *dout, long rows, long d,
                     float limit, float *da, float *du, float *dweight) {
    float top = limit > 0.0f ? limit : INFINITY;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        float w = weight ? weight[t] : 1.0f, total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (long i = 0; i < d; i++) {
            float a0 = a[t * d + i], u0 = u[t * d + i], go = dout[t * d + i];
            float g = min_(a0, top), v = min_(max_(u0, -top), top);
            float s = sigmoid_(g), silu = g * s;
            total += go * silu * v;
            go *= w;
            da[t * d + i] = a0 > top ? 0.0f : go * v * (s + silu * (1.0f - s));
            du[t * d + i] = (u0 > top || u0 < -top) ? 0.0f : go * silu;
        }
        if (dweight) dweight[t] = total;
    }
}

/* ---- index_topk.py: sum_j w_j relu(dots_j) -------------------------------------------------------------------- */

void index_reduce(const float *dots, const float *weights, long rows, long heads, long entries, float *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        float *o = out + t * entries;
        for (long c = 0; c < entries; c++) o[c] = 0.0f;
        for (long j = 0; j < heads; j++) {
            const float *s = dots + (t * heads + j) * entries;
            float w = weights[t * heads + j];
            for (long c = 0; c < entries; c++) o[c] += w * max_(s[c], 0.0f);
        }
    }
}

/* ddots [rows, heads, entries] and dweights [rows, heads] from dout [rows, entries]. */
void index_reduce_backward(const float *dots, const float *weights, const float *dout, long rows, long heads,
                           long entries, float *ddots, float *dweights) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const float *g = dout + t * entries;
        for (long j = 0; j < heads; j++) {
            const float *s = dots + (t * heads + j) * entries;
            float *d = ddots + (t * heads + j) * entries, w = weights[t * heads + j], total = 0.0f;
#pragma omp simd reduction(+ : total)
            for (long c = 0; c < entries; c++) {
                total += g[c] * max_(s[c], 0.0f);
                d[c] = s[c] > 0.0f ? g[c] * w : 0.0f;
            }
            dweights[t * heads + j] = total;
        }
    }
}

/* ---- rope.py: rotate the last r channels of rows in place; each table row serves `heads` consecutive rows ------- */

void rope_rotate(const float *x, const float *table, long rows, long heads, long table_rows, long k, long r, float sign,
                 float *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const float *xt = x + t * k, *tab = table + (t / heads % table_rows) * r;
        float *o = out + t * k;
        memcpy(o, xt, sizeof(float) * (k - r));
        for (long i = 0; i < r; i += 2) {
            float re = xt[k - r + i], im = xt[k - r + i + 1], c = tab[i], s = sign * tab[i + 1];
            o[k - r + i] = re * c - im * s;
            o[k - r + i + 1] = re * s + im * c;
        }
    }
}

/* rope.py: RMS norm (weight may be NULL), then rope, in one pass. */
void norm_rope_forward(const float *x, const float *weight, const float *table, long rows, long heads, long table_rows,
                       long k, long r, float eps, float *out, float *rs) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const float *restrict xt = x + t * k, *tab = table + (t / heads % table_rows) * r;
        float *restrict o = out + t * k, f = 1.0f / sqrtf(dot(xt, xt, k) / (float)k + eps);
        rs[t] = f;
        if (weight)
            for (long i = 0; i < k; i++) o[i] = xt[i] * f * weight[i];
        else
            for (long i = 0; i < k; i++) o[i] = xt[i] * f;
        for (long i = 0; i < r; i += 2) {
            float re = o[k - r + i], im = o[k - r + i + 1], c = tab[i], s = tab[i + 1];
            o[k - r + i] = re * c - im * s;
            o[k - r + i + 1] = re * s + im * c;
        }
    }
}
