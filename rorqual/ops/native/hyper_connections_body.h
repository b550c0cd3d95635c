/* Included twice by hyper_connections.c, once for each element type. */

#include "panels.h"
#include "kernels.h"

#define EACH_VECTOR(i, d) for (long i = 0; i < (d); i += VECTOR)

#ifndef ELEMENT_BF16
/* Columns of the packed `fn`: its rows, and for bf16 streams what rounding them to bf16 lost, so that coefficients
 * keep fp32 precision; padded to whole vectors. */
INLINE long mix_columns(long m, int is_bf16) { return whole(is_bf16 ? 2 * m : m); }
#endif

/* fn [m][k] fp32 -> words [k / PER_WORD][columns]. */
static void NAME(pack_mix)(const float *fn, long m, long k, WORD *out) {
    long columns = mix_columns(m, PER_WORD == 2);
    memset(out, 0, sizeof(WORD) * columns * (k / PER_WORD));
    for (long i = 0; i < m; i++)
        for (long s = 0; s < k / PER_WORD; s++) {
#ifdef ELEMENT_BF16
            float a = fn[i * k + 2 * s], b = fn[i * k + 2 * s + 1];
            uint16_t x = to_bf16(a), y = to_bf16(b);
            out[s * columns + i] = (uint32_t)x | (uint32_t)y << 16;
            out[s * columns + m + i] =
                (uint32_t)to_bf16(a - from_bf16(x)) | (uint32_t)to_bf16(b - from_bf16(y)) << 16;
#else
            out[s * columns + i] = fn[i * k + s];
#endif
        }
}

/* Products of x with the packed fn, for training: [count][k] -> raw [count][m]. */
INLINE void NAME(mix_packed)(const T *x, const WORD *mix, long count, long m, long k, float *raw) {
    long columns = mix_columns(m, PER_WORD == 2);
    float product[LANES * (2 * MAX_MIX + VECTOR)];
    NAME(gemm)(count, columns, k / PER_WORD, (const WORD *)x, NULL, k / PER_WORD, 1, mix, columns, product, columns, 0);
    for (long t = 0; t < count; t++)
        for (long i = 0; i < m; i++)
            raw[t * m + i] = product[t * columns + i] + (PER_WORD == 2 ? product[t * columns + m + i] : 0.0f);
}

/* The same in fp32 and, for inference, in the order of `dots`; by `panels` of fn where there are such. `wide` has room for
 * the streams when they are bf16. */
INLINE void NAME(mix_in_order)(const T *x, const float *fn, const float *panels, long count, long m, long k, float *wide,
                               float *raw) {
#ifdef ELEMENT_BF16
    EACH_VECTOR(i, count * k) store(wide + i, count * k - i, LOAD(x + i, count * k - i));
#else
    wide = (float *)x;
#endif
    if (!panels) {
        dots(count, m, k, wide, NULL, k, fn, NULL, k, raw, m);
        return;
    }
    const float *row[MIX_TOKENS];
    panel_rows(count, k, wide, NULL, k, NULL, row);
    for (long j = 0; j < m; j += PANEL)
        for (long i = 0; i < count; i += PANEL_HEIGHT) {
            Vector sums[PANEL_HEIGHT][PANEL_VECTORS];
            panel_block(m - j, row + i, k, panels + panel_words(j, k), sums);
            for (long r = i; r < count && r < i + PANEL_HEIGHT; r++)
                for (long e = 0; e < PANEL && j + e < m; e += VECTOR)
                    store(raw + r * m + j + e, m - j - e, sums[r - i][e / VECTOR]);
        }
}

/* The RMS factor of each token. */
INLINE void NAME(rms_factors)(const T *x, long count, long k, float norm_eps, float *rs) {
    for (long t = 0; t < count; t++) {
        Vector s = {0};
        EACH_VECTOR(i, k) {
            Vector v = LOAD(x + t * k + i, k - i);
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

/* What follows the products, for up to LANES tokens. */
INLINE void NAME(hc_pre_block)(const T *x, const float *base, const float *scale, long count, int n, long d, int iters,
                               float norm_eps, float eps, T *y, float *post, float *comb, const float *raw, float *rs) {
    Coefficients c;
    NAME(rms_factors)(x, count, n * d, norm_eps, rs);
    coefficients_lanes(&c, raw, load(rs, count), base, scale, count, n, iters, eps, NULL);
    from_lanes(c.post, count, n, post);
    from_lanes(c.comb, count, n * n, comb);
    for (long t = 0; t < count; t++) {
        const T *restrict xt = x + t * n * d;
        T *restrict yt = y + t * d;
        EACH_VECTOR(i, d) {
            Vector s = {0};
            for (int j = 0; j < n; j++) s += c.pre[j][t] * LOAD(xt + j * d + i, d - i);
            STORE(yt + i, d - i, s);
        }
    }
}

/* Sublayer input: x [T, n*D], fn [2n+nn, n*D] -> y [T, D], post [T, n], comb [T, nn]; raw = x fn^T [T, 2n+nn] and rs [T],
 * the RMS factor, are kept for the backward pass. `training` takes the fastest products; without it their bits do not
 * depend on the number of tokens. n*D is even. */
void NAME(hc_pre_forward)(const T *x, const float *fn, const float *base, const float *scale, long tokens, int n, long d,
                          int iters, float norm_eps, float eps, int training, T *y, float *post, float *comb, float *raw,
                          float *rs) {
    int m = 2 * n + n * n;
    long k = n * d;
    WORD *mix = training ? malloc(sizeof(WORD) * mix_columns(m, PER_WORD == 2) * (k / PER_WORD)) : NULL;
    float *panels = !mix && panels_fit(tokens, k) ? aligned_alloc(64, sizeof(float) * panel_words(m, k)) : NULL;
    long each = panels ? MIX_TOKENS : LANES;
    if (mix) NAME(pack_mix)(fn, m, k, mix);
    if (panels) make_panels(fn, m, k, panels);
    SHARED_OUT(tokens * k * m > FORK_FROM, long first = 0; first < tokens; first += each, {
        long all = tokens - first < each ? tokens - first : each;
        float *wide = PER_WORD == 2 && !mix ? malloc(sizeof(float) * all * k) : NULL;
        if (!mix) NAME(mix_in_order)(x + first * k, fn, panels, all, m, k, wide, raw + first * m);
        for (long t = first; t < first + all; t += LANES) {
            long count = first + all - t < LANES ? first + all - t : LANES;
            const T *xt = x + t * k;
            T *yt = y + t * d;
            float *pt = post + t * n, *ct = comb + t * n * n, *w = raw + t * m, *r = rs + t;
            if (mix) NAME(mix_packed)(xt, mix, count, m, k, w);
            if (n == 4) NAME(hc_pre_block)(xt, base, scale, count, 4, d, iters, norm_eps, eps, yt, pt, ct, w, r);
            else NAME(hc_pre_block)(xt, base, scale, count, n, d, iters, norm_eps, eps, yt, pt, ct, w, r);
        }
        free(wide);
    });
    free(mix), free(panels);
}

/* dfn [m][wide] += the products of draw [count][m] and x [count][k] over the tokens; `words` is zero beyond k. */
INLINE void NAME(mix_gradient)(const T *x, const float *draw, long count, long m, long k, long wide, WORD *words,
                               float *dfn) {
    long steps = (count + PER_WORD - 1) / PER_WORD;
    WORD rows[MAX_MIX * LANES / PER_WORD];
    for (long s = 0; s < steps; s++) {
        const T *restrict a = x + PER_WORD * s * k;
        WORD *restrict out = words + s * wide;
#ifdef ELEMENT_BF16
        int is_pair = 2 * s + 1 < count;
        const T *restrict b = is_pair ? a + k : a;
        uint32_t keep = is_pair ? 0xffff0000u : 0;
        for (long i = 0; i < k; i++) out[i] = (uint32_t)a[i] | ((uint32_t)b[i] << 16 & keep);
        for (long i = 0; i < m; i++)
            rows[i * steps + s] = (uint32_t)to_bf16(draw[2 * s * m + i]) |
                                  (is_pair ? (uint32_t)to_bf16(draw[(2 * s + 1) * m + i]) << 16 : 0);
#else
        memcpy(out, a, sizeof(T) * k);
        for (long i = 0; i < m; i++) rows[i * steps + s] = draw[s * m + i];
#endif
    }
    NAME(gemm)(m, wide, steps, rows, NULL, steps, 1, words, wide, dfn, wide, 1);
}

typedef struct {
    const T *x, *dy;
    const WORD *columns;
    const float *raw, *base, *scale, *rs, *dpost, *dcomb;
    float *dlogit, *dmixed, *dfn;
    T *dx;
} NAME(HcPreBackward);

/* Tokens from `first` on; `draw` [LANES][m], `through` [LANES][wide] and `words` are room to work in. */
INLINE void NAME(hc_pre_backward_block)(const NAME(HcPreBackward) *o, long first, long count, int n, long d, int iters,
                                        float eps, float *draw, float *through, WORD *words) {
    int nn = n * n, m = 2 * n + nn;
    long k = n * d, wide = whole(k);
    const T *x = o->x + first * k, *dy = o->dy + first * d;
    Coefficients c;
    Vector divisors[(2 * iters - 1) * n], dl[m], mixed[m], drs = {0}, rs = load(o->rs + first, count);
    coefficients_lanes(&c, o->raw + first * m, rs, o->base, o->scale, count, n, iters, eps, divisors);
    to_lanes(o->dpost + first * n, count, n, dl + n);
    to_lanes(o->dcomb + first * nn, count, nn, dl + 2 * n);
    for (int j = 0; j < n; j++) dl[j] = (Vector){0};
    for (long t = 0; t < count; t++)
        for (int j = 0; j < n; j++) {
            const T *restrict xt = x + t * k + j * d, *restrict dyt = dy + t * d;
            Vector s = {0};
            EACH_VECTOR(i, d) s += LOAD(dyt + i, d - i) * LOAD(xt + i, d - i);
            ((float *)(dl + j))[t] = sum_lanes(s);
        }
    for (int j = 0; j < n; j++) {
        dl[j] *= (c.pre[j] - eps) * (1.0f - (c.pre[j] - eps));
        dl[n + j] *= c.post[j] * (1.0f - 0.5f * c.post[j]);
    }
    sinkhorn_lanes_backward(c.comb, dl + 2 * n, n, iters, eps, divisors);
    from_lanes(dl, count, m, o->dlogit + first * m);
    for (int i = 0; i < m; i++) {
        Vector up = dl[i] * o->scale[i < n ? 0 : i < 2 * n ? 1 : 2];
        mixed[i] = dl[i] * c.mix[i];
        drs += up * c.mix[i]; /* the gradient of the RMS factor, times the factor */
        dl[i] = up * rs;
    }
    from_lanes(mixed, count, m, o->dmixed + first * m);
    from_lanes(dl, count, m, draw);
    NAME(mix_gradient)(x, draw, count, m, k, wide, words, o->dfn);
    NAME(through_mix)(draw, o->columns, count, m, wide, through);
    for (long t = 0; t < count; t++) {
        float to_rms = -((float *)&drs)[t] * o->rs[first + t] * o->rs[first + t] / (float)k;
        const T *restrict dyt = dy + t * d;
        for (int j = 0; j < n; j++) {
            const T *restrict xt = x + t * k + j * d;
            const float *restrict more = through + t * wide + j * d;
            T *restrict out = o->dx + (first + t) * k + j * d;
            float p = ((float *)(c.pre + j))[t];
            EACH_VECTOR(i, d)
            STORE(out + i, d - i, p * LOAD(dyt + i, d - i) + to_rms * LOAD(xt + i, d - i) + load(more + i, d - i));
        }
    }
}

/* Gradients of hc_pre. Outputs: dlogit [T, m] (of mix*scale+base, for base), dmixed [T, m] (dlogit * mix, for scale),
 * dx [T, n*D] and, added to what is there, dfn [parts, m, n*D in whole vectors]; the tokens are cut into `parts`, one a
 * thread. */
void NAME(hc_pre_backward)(const T *x, const float *fn, const float *raw, const float *base, const float *scale,
                           const float *rs, const T *dy, const float *dpost, const float *dcomb, long tokens, int n,
                           long d, int iters, float eps, long parts, float *dlogit, float *dmixed, float *dfn, T *dx) {
    int m = 2 * n + n * n;
    long wide = whole(n * d), blocks = (tokens + LANES - 1) / LANES, each = (blocks + parts - 1) / parts;
    WORD *columns = NAME(mix_rows)(fn, m, n * d);
#pragma omp parallel for schedule(static)
    for (long part = 0; part < parts; part++) {
        NAME(HcPreBackward) o = {x, dy, columns, raw, base, scale, rs, dpost, dcomb, dlogit, dmixed,
                                 dfn + part * m * wide, dx};
        float *through = malloc(sizeof(float) * LANES * wide), *draw = malloc(sizeof(float) * LANES * m);
        WORD *words = calloc(LANES / PER_WORD * wide, sizeof(WORD));
        for (long b = part * each; b < blocks && b < (part + 1) * each; b++) {
            long first = b * LANES, count = tokens - first < LANES ? tokens - first : LANES;
            if (n == 4) NAME(hc_pre_backward_block)(&o, first, count, 4, d, iters, eps, draw, through, words);
            else NAME(hc_pre_backward_block)(&o, first, count, n, d, iters, eps, draw, through, words);
        }
        free(words);
        free(draw);
        free(through);
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
        NAME(mix_in_order)(x + t0 * n * d, fn, NULL, count, n, n * d, wide, raw + t0 * n);
        NAME(rms_factors)(x + t0 * n * d, count, n * d, norm_eps, rs + t0);
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
