/* Included twice by hyper_connections.c, once for each element type. */

#include "dots.h"
#include "kernels.h"

#define EACH_VECTOR(i, d) for (long i = 0; i < (d); i += VECTOR)

/* x fn^T of `count` tokens in fp32 -> raw [count][m], and the RMS factor of each token. `wide` has room for the streams of
 * LANES tokens when they are bf16. */
INLINE void NAME(mix_block)(const T *x, const float *fn, long count, long m, long k, float norm_eps, float *wide,
                            float *raw, float *rs) {
#ifdef ELEMENT_BF16
    for (long t = 0; t < count; t++)
        EACH_VECTOR(i, k) store(wide + t * k + i, k - i, LOAD(x + t * k + i, k - i));
    const float *streams = wide;
#else
    const float *streams = x;
    (void)wide;
#endif
    dots(count, m, k, streams, NULL, k, fn, NULL, k, raw, m);
    for (long t = 0; t < count; t++) {
        Vector s = {0};
        EACH_VECTOR(i, k) {
            Vector v = load(streams + t * k + i, k - i);
            s += v * v;
        }
        rs[t] = 1.0f / sqrtf(sum_lanes(s) / (float)k + norm_eps);
    }
}

/* The gradient of x through raw: draw [count][m] times fn (packed down its rows, `wide` columns) -> buffer. */
INLINE void NAME(through_mix)(const float *draw, const WORD *columns, long count, long m, long wide, float *buffer) {
    WORD words[LANES * (MAX_MIX / PER_WORD + 1)];
    long steps = (m + PER_WORD - 1) / PER_WORD;
    for (long t = 0; t < count; t++)
        for (long s = 0; s < steps; s++) {
#ifdef ELEMENT_BF16
            float high = 2 * s + 1 < m ? draw[t * m + 2 * s + 1] : 0.0f;
            words[t * steps + s] = (uint32_t)to_bf16(draw[t * m + 2 * s]) | (uint32_t)to_bf16(high) << 16;
#else
            words[t * steps + s] = draw[t * m + s];
#endif
        }
    NAME(gemm)(count, wide, steps, words, NULL, steps, 1, columns, wide, buffer, wide, 0);
}

/* fn [m][k] fp32 packed down its rows, each padded to whole vectors. */
static WORD *NAME(mix_rows)(const float *fn, long m, long k) {
    long wide = whole(k);
    WORD *columns = calloc((m / PER_WORD + 1) * wide, sizeof(WORD));
    for (long i = 0; i < m; i += PER_WORD)
        NAME(pack_columns_float)(fn + i * k, m - i < PER_WORD ? m - i : PER_WORD, k, columns + i / PER_WORD * wide);
    return columns;
}

INLINE void NAME(hc_pre_block)(const T *x, const float *fn, float *wide, const float *base, const float *scale,
                               long count, int n, long d, int iters, float norm_eps, float eps, T *y, float *post,
                               float *comb, float *raw, float *rs) {
    Coefficients c;
    int m = 2 * n + n * n;
    NAME(mix_block)(x, fn, count, m, n * d, norm_eps, wide, raw, rs);
    coefficients_lanes(&c, raw, rs, base, scale, count, n, iters, eps, NULL, NULL);
    for (long t = 0; t < count; t++) {
        const T *restrict xt = x + t * n * d;
        T *restrict yt = y + t * d;
        for (int j = 0; j < n; j++) post[t * n + j] = c.post[j][t];
        for (int i = 0; i < n * n; i++) comb[t * n * n + i] = c.comb[i][t];
        EACH_VECTOR(i, d) {
            Vector s = {0};
            for (int j = 0; j < n; j++) s += c.pre[j][t] * LOAD(xt + j * d + i, d - i);
            STORE(yt + i, d - i, s);
        }
    }
}

/* Sublayer input: x [T, n*D], fn [2n+nn, n*D] -> y [T, D], post [T, n], comb [T, nn]; raw = x fn^T [T, 2n+nn] and rs [T],
 * the RMS factor, are kept for the backward pass. n*D is even. */
void NAME(hc_pre_forward)(const T *x, const float *fn, const float *base, const float *scale, long tokens, int n, long d,
                          int iters, float norm_eps, float eps, T *y, float *post, float *comb, float *raw, float *rs) {
    int m = 2 * n + n * n;
    SHARED_OUT(tokens * n * d * m > FORK_FROM, long t = 0; t < tokens; t += LANES, {
        long count = tokens - t < LANES ? tokens - t : LANES;
        float *wide = PER_WORD == 2 ? malloc(sizeof(float) * count * n * d) : NULL;
        const T *xt = x + t * n * d;
        T *yt = y + t * d;
        float *pt = post + t * n, *ct = comb + t * n * n, *w = raw + t * m, *r = rs + t;
        if (n == 4) NAME(hc_pre_block)(xt, fn, wide, base, scale, count, 4, d, iters, norm_eps, eps, yt, pt, ct, w, r);
        else NAME(hc_pre_block)(xt, fn, wide, base, scale, count, n, d, iters, norm_eps, eps, yt, pt, ct, w, r);
        free(wide);
    });
}

INLINE void NAME(hc_pre_backward_block)(const T *x, const WORD *columns, const float *raw, const float *base,
                                        const float *scale, const float *rs, const T *dy, const float *dpost,
                                        const float *dcomb, long count, int n, long d, int iters, float eps, float *draw,
                                        float *dlogit, float *dmixed, float *buffer, T *dx) {
    int nn = n * n, m = 2 * n + nn;
    Coefficients c;
    float path[(2 * iters - 1) * nn][LANES], sums[(2 * iters - 1) * n][LANES], g[nn][LANES], dl[m][LANES], drs[LANES];
    coefficients_lanes(&c, raw, rs, base, scale, count, n, iters, eps, path, sums);
    memset(dl, 0, sizeof(dl));
    memset(g, 0, sizeof(g));
    for (long t = 0; t < count; t++) {
        const T *restrict dyt = dy + t * d;
        for (int j = 0; j < n; j++) {
            const T *restrict xt = x + (t * n + j) * d;
            Vector s = {0};
            EACH_VECTOR(i, d) s += LOAD(dyt + i, d - i) * LOAD(xt + i, d - i);
            dl[j][t] = sum_lanes(s);
            dl[n + j][t] = dpost[t * n + j];
        }
        for (int i = 0; i < nn; i++) g[i][t] = dcomb[t * nn + i];
    }
    for (int j = 0; j < n; j++) {
        EACH_LANE dl[j][l] *= (c.pre[j][l] - eps) * (1.0f - (c.pre[j][l] - eps));
        EACH_LANE dl[n + j][l] *= c.post[j][l] * (1.0f - 0.5f * c.post[j][l]);
    }
    for (int step = 2 * iters - 2; step >= 0; step--) { /* out = in * r, r = 1 / (sum(in) + eps) */
        int by_column = step % 2 == 0;
        for (int a = 0; a < n; a++) {
            int first = by_column ? a : a * n, stride = by_column ? n : 1;
            float inner[LANES], (*in)[LANES] = path + step * nn, *r = sums[step * n + a];
            EACH_LANE inner[l] = 0.0f;
            for (int i = 0; i < n; i++) EACH_LANE inner[l] += g[first + i * stride][l] * in[first + i * stride][l];
            for (int i = 0; i < n; i++)
                EACH_LANE g[first + i * stride][l] = (g[first + i * stride][l] - inner[l] * r[l]) * r[l];
        }
    }
    for (int j = 0; j < n; j++) { /* softmax of a row: the first step's input minus eps */
        float inner[LANES];
        EACH_LANE inner[l] = 0.0f;
        for (int k = 0; k < n; k++) EACH_LANE inner[l] += g[j * n + k][l] * (path[j * n + k][l] - eps);
        for (int k = 0; k < n; k++)
            EACH_LANE dl[2 * n + j * n + k][l] = (path[j * n + k][l] - eps) * (g[j * n + k][l] - inner[l]);
    }
    EACH_LANE drs[l] = 0.0f;
    for (long t = 0; t < count; t++)
        for (int i = 0; i < m; i++) {
            float dm = dl[i][t] * scale[i < n ? 0 : i < 2 * n ? 1 : 2];
            dlogit[t * m + i] = dl[i][t];
            dmixed[t * m + i] = dl[i][t] * c.mix[i][t];
            draw[t * m + i] = dm * rs[t];
            drs[t] += dm * raw[t * m + i];
        }
    long wide = whole(n * d);
    NAME(through_mix)(draw, columns, count, m, wide, buffer);
    for (long t = 0; t < count; t++) {
        float k = -drs[t] * rs[t] * rs[t] * rs[t] / (float)(n * d);
        const T *restrict dyt = dy + t * d;
        for (int j = 0; j < n; j++) {
            const T *restrict xt = x + (t * n + j) * d;
            const float *restrict through = buffer + t * wide + j * d;
            T *restrict out = dx + (t * n + j) * d;
            float p = c.pre[j][t];
            EACH_VECTOR(i, d)
            STORE(out + i, d - i, p * LOAD(dyt + i, d - i) + k * LOAD(xt + i, d - i) + load(through + i, d - i));
        }
    }
}

/* Gradients of hc_pre. Outputs: draw [T, m] (of raw; the caller takes fn's from it), dlogit [T, m] (of mix*scale+base, for
 * base), dmixed [T, m] (dlogit * mix, for scale), and dx [T, n*D]. */
void NAME(hc_pre_backward)(const T *x, const float *fn, const float *raw, const float *base, const float *scale,
                           const float *rs, const T *dy, const float *dpost, const float *dcomb, long tokens, int n,
                           long d, int iters, float eps, float *draw, float *dlogit, float *dmixed, T *dx) {
    int nn = n * n, m = 2 * n + nn;
    long wide = whole(n * d);
    WORD *columns = NAME(mix_rows)(fn, m, n * d);
#pragma omp parallel
    {
        float *buffer = malloc(sizeof(float) * LANES * wide);
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t += LANES) {
            long count = tokens - t < LANES ? tokens - t : LANES;
            const T *xt = x + t * n * d, *dyt = dy + t * d;
            const float *rt = raw + t * m, *dpt = dpost + t * n, *dct = dcomb + t * nn;
            float *a = draw + t * m, *b = dlogit + t * m, *c = dmixed + t * m;
            T *dxt = dx + t * n * d;
            if (n == 4)
                NAME(hc_pre_backward_block)(xt, columns, rt, base, scale, rs + t, dyt, dpt, dct, count, 4, d, iters, eps,
                                            a, b, c, buffer, dxt);
            else
                NAME(hc_pre_backward_block)(xt, columns, rt, base, scale, rs + t, dyt, dpt, dct, count, n, d, iters, eps,
                                            a, b, c, buffer, dxt);
        }
        free(buffer);
    }
    free(columns);
}

INLINE void NAME(hc_post_token)(const T *restrict x, const T *restrict y, const float *post, const float *comb, int n,
                                long d, T *restrict out) {
    EACH_VECTOR(i, d) {
        Vector in[MAX_STREAMS], add = LOAD(y + i, d - i);
        for (int j = 0; j < n; j++) in[j] = LOAD(x + j * d + i, d - i);
        for (int k = 0; k < n; k++) {
            Vector s = post[k] * add;
            for (int j = 0; j < n; j++) s += comb[j * n + k] * in[j];
            STORE(out + k * d + i, d - i, s);
        }
    }
}

void NAME(hc_post_forward)(const T *x, const T *y, const float *post, const float *comb, long tokens, int n, long d,
                           T *out) {
    SHARED_OUT(tokens * n * d > FORK_FROM, long t = 0; t < tokens; t++, {
        const T *xt = x + t * n * d, *yt = y + t * d;
        const float *p = post + t * n, *c = comb + t * n * n;
        if (n == 4) NAME(hc_post_token)(xt, yt, p, c, 4, d, out + t * n * d);
        else NAME(hc_post_token)(xt, yt, p, c, n, d, out + t * n * d);
    });
}

INLINE void NAME(hc_post_token_backward)(const T *restrict x, const T *restrict y, const float *post, const float *comb,
                                         const T *restrict g, int n, long d, T *restrict dx, T *restrict dy,
                                         float *dpost, float *dcomb) {
    Vector to_post[MAX_STREAMS], to_comb[MAX_STREAMS * MAX_STREAMS];
    for (int k = 0; k < n; k++) to_post[k] = (Vector){0};
    for (int i = 0; i < n * n; i++) to_comb[i] = (Vector){0};
    EACH_VECTOR(i, d) {
        Vector up[MAX_STREAMS], s = {0}, add = LOAD(y + i, d - i);
        for (int k = 0; k < n; k++) {
            up[k] = LOAD(g + k * d + i, d - i);
            s += post[k] * up[k];
            to_post[k] += up[k] * add;
        }
        STORE(dy + i, d - i, s);
        for (int j = 0; j < n; j++) {
            Vector in = LOAD(x + j * d + i, d - i), out = {0};
            for (int k = 0; k < n; k++) {
                to_comb[j * n + k] += up[k] * in;
                out += comb[j * n + k] * up[k];
            }
            STORE(dx + j * d + i, d - i, out);
        }
    }
    for (int k = 0; k < n; k++) dpost[k] = sum_lanes(to_post[k]);
    for (int i = 0; i < n * n; i++) dcomb[i] = sum_lanes(to_comb[i]);
}

void NAME(hc_post_backward)(const T *x, const T *y, const float *post, const float *comb, const T *dout, long tokens,
                            int n, long d, T *dx, T *dy, float *dpost, float *dcomb) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const T *xt = x + t * n * d, *yt = y + t * d, *g = dout + t * n * d;
        const float *p = post + t * n, *c = comb + t * n * n;
        T *dxt = dx + t * n * d;
        float *dpt = dpost + t * n, *dct = dcomb + t * n * n;
        if (n == 4) NAME(hc_post_token_backward)(xt, yt, p, c, g, 4, d, dxt, dy + t * d, dpt, dct);
        else NAME(hc_post_token_backward)(xt, yt, p, c, g, n, d, dxt, dy + t * d, dpt, dct);
    }
}

/* The head that collapses the streams: pre = sigmoid(x fn^T rs * scale + base) + eps, y = sum_j pre_j x_j. x [T, n*D],
 * fn [n, n*D], base [n], scale [1] -> y [T, D]; pre, raw [T, n] and rs [T] are kept. */
void NAME(hc_head_forward)(const T *x, const float *fn, const float *base, const float *scale, long tokens, int n, long d,
                           float norm_eps, float eps, T *y, float *pre, float *raw, float *rs) {
    SHARED_OUT(tokens * n * d * n > FORK_FROM, long t0 = 0; t0 < tokens; t0 += LANES, {
        long count = tokens - t0 < LANES ? tokens - t0 : LANES;
        float *wide = PER_WORD == 2 ? malloc(sizeof(float) * count * n * d) : NULL;
        NAME(mix_block)(x + t0 * n * d, fn, count, n, n * d, norm_eps, wide, raw + t0 * n, rs + t0);
        for (long t = t0; t < t0 + count; t++) {
            const T *restrict xt = x + t * n * d;
            T *restrict yt = y + t * d;
            for (int j = 0; j < n; j++) pre[t * n + j] = sigmoid_(raw[t * n + j] * rs[t] * scale[0] + base[j]) + eps;
            EACH_VECTOR(i, d) {
                Vector s = {0};
                for (int j = 0; j < n; j++) s += pre[t * n + j] * LOAD(xt + j * d + i, d - i);
                STORE(yt + i, d - i, s);
            }
        }
        free(wide);
    });
}

/* Gradients: draw [T, n] (of raw; the caller takes fn's from it), dlogit [T, n] (for base), dmixed [T, n] (for scale), dx. */
void NAME(hc_head_backward)(const T *x, const float *fn, const float *scale, const float *pre, const float *raw,
                            const float *rs, const T *dy, long tokens, int n, long d, float eps, float *draw,
                            float *dlogit, float *dmixed, T *dx) {
    long wide = whole(n * d);
    WORD *columns = NAME(mix_rows)(fn, n, n * d);
#pragma omp parallel
    {
        float *buffer = malloc(sizeof(float) * LANES * wide);
#pragma omp for schedule(static)
        for (long t0 = 0; t0 < tokens; t0 += LANES) {
            long count = tokens - t0 < LANES ? tokens - t0 : LANES;
            float drs[LANES] = {0};
            for (long t = t0; t < t0 + count; t++)
                for (int j = 0; j < n; j++) {
                    const T *restrict xt = x + (t * n + j) * d, *restrict g = dy + t * d;
                    float s = pre[t * n + j] - eps;
                    Vector sum = {0};
                    EACH_VECTOR(i, d) sum += LOAD(g + i, d - i) * LOAD(xt + i, d - i);
                    float up = sum_lanes(sum) * s * (1.0f - s);
                    dlogit[t * n + j] = up;
                    dmixed[t * n + j] = up * raw[t * n + j] * rs[t];
                    draw[t * n + j] = up * scale[0] * rs[t];
                    drs[t - t0] += up * scale[0] * raw[t * n + j];
                }
            NAME(through_mix)(draw + t0 * n, columns, count, n, wide, buffer);
            for (long t = t0; t < t0 + count; t++) {
                float k = -drs[t - t0] * rs[t] * rs[t] * rs[t] / (float)(n * d);
                const T *restrict g = dy + t * d;
                for (int j = 0; j < n; j++) {
                    const T *restrict xt = x + (t * n + j) * d;
                    const float *restrict through = buffer + (t - t0) * wide + j * d;
                    T *restrict out = dx + (t * n + j) * d;
                    float p = pre[t * n + j];
                    EACH_VECTOR(i, d)
                    STORE(out + i, d - i, p * LOAD(g + i, d - i) + k * LOAD(xt + i, d - i) + load(through + i, d - i));
                }
            }
        }
        free(buffer);
    }
    free(columns);
}

#undef EACH_VECTOR
