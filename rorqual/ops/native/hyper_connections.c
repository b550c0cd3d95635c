/* hyper_connections.py: the two halves of mHC around a sublayer, forward and backward. */

#include "common.h"

#define EACH_LANE for (int l = 0; l < LANES; l++)

/* Sinkhorn on LANES n x n matrices, entry-major. `path` keeps the matrix before every division, `sums` the divisors. */
INLINE void sinkhorn_lanes(float m[][LANES], int n, int iters, float eps, float (*path)[LANES], float (*sums)[LANES]) {
    for (int j = 0; j < n; j++) {
        float top[LANES], total[LANES];
        EACH_LANE top[l] = m[j * n][l];
        for (int k = 1; k < n; k++) EACH_LANE top[l] = max_(top[l], m[j * n + k][l]);
        EACH_LANE total[l] = 0.0f;
        for (int k = 0; k < n; k++) EACH_LANE total[l] += m[j * n + k][l] = exp_(m[j * n + k][l] - top[l]);
        for (int k = 0; k < n; k++) EACH_LANE m[j * n + k][l] = m[j * n + k][l] / total[l] + eps;
    }
    for (int step = 0; step < 2 * iters - 1; step++) {
        int columns = step % 2 == 0;
        if (path) memcpy(path + step * n * n, m, sizeof(float) * n * n * LANES);
        for (int a = 0; a < n; a++) {
            int first = columns ? a : a * n, stride = columns ? n : 1;
            float s[LANES], r[LANES];
            EACH_LANE s[l] = eps;
            for (int i = 0; i < n; i++) EACH_LANE s[l] += m[first + i * stride][l];
            EACH_LANE r[l] = 1.0f / s[l];
            for (int i = 0; i < n; i++) EACH_LANE m[first + i * stride][l] *= r[l];
            if (sums) memcpy(sums + step * n + a, r, sizeof(r));
        }
    }
}

/* What one block of tokens needs on the way: mix (RMS-scaled) and the coefficients, entry-major. */
typedef struct {
    float mix[MAX_MIX][LANES], pre[MAX_STREAMS][LANES], post[MAX_STREAMS][LANES], comb[MAX_STREAMS * MAX_STREAMS][LANES];
} Coefficients;

INLINE void coefficients_lanes(Coefficients *c, const float *raw, const float *rs, const float *base, const float *scale,
                               long count, int n, int iters, float eps, float (*path)[LANES], float (*sums)[LANES]) {
    int m = 2 * n + n * n;
    for (int i = 0; i < m; i++) EACH_LANE c->mix[i][l] = l < count ? raw[l * m + i] * rs[l] : 0.0f;
    for (int j = 0; j < n; j++) {
        EACH_LANE c->pre[j][l] = sigmoid_(c->mix[j][l] * scale[0] + base[j]) + eps;
        EACH_LANE c->post[j][l] = 2.0f * sigmoid_(c->mix[n + j][l] * scale[1] + base[n + j]);
    }
    for (int i = 0; i < n * n; i++) EACH_LANE c->comb[i][l] = c->mix[2 * n + i][l] * scale[2] + base[2 * n + i];
    sinkhorn_lanes(c->comb, n, iters, eps, path, sums);
}

INLINE void hc_pre_block(const float *x, const float *raw, const float *base, const float *scale, long count, int n,
                         long d, int iters, float norm_eps, float eps, float *y, float *post, float *comb, float *rs) {
    Coefficients c;
    for (long t = 0; t < count; t++) {
        const float *xt = x + t * n * d;
        rs[t] = 1.0f / sqrtf(dot(xt, xt, n * d) / (float)(n * d) + norm_eps);
    }
    coefficients_lanes(&c, raw, rs, base, scale, count, n, iters, eps, NULL, NULL);
    for (long t = 0; t < count; t++) {
        const float *restrict xt = x + t * n * d;
        float *restrict yt = y + t * d;
        for (int j = 0; j < n; j++) post[t * n + j] = c.post[j][t];
        for (int i = 0; i < n * n; i++) comb[t * n * n + i] = c.comb[i][t];
        for (long i = 0; i < d; i++) {
            float s = 0.0f;
            for (int j = 0; j < n; j++) s += c.pre[j][t] * xt[j * d + i];
            yt[i] = s;
        }
    }
}

/* Sublayer input: raw = x fn^T [T, 2n+nn] -> y [T, D], post [T, n], comb [T, nn]; rs [T] is the RMS factor. */
void hc_pre_forward(const float *x, const float *raw, const float *base, const float *scale, long tokens, int n, long d,
                    int iters, float norm_eps, float eps, float *y, float *post, float *comb, float *rs) {
    int m = 2 * n + n * n;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t += LANES) {
        long count = tokens - t < LANES ? tokens - t : LANES;
        const float *xt = x + t * n * d, *rt = raw + t * m;
        float *yt = y + t * d, *pt = post + t * n, *ct = comb + t * n * n;
        if (n == 4) hc_pre_block(xt, rt, base, scale, count, 4, d, iters, norm_eps, eps, yt, pt, ct, rs + t);
        else hc_pre_block(xt, rt, base, scale, count, n, d, iters, norm_eps, eps, yt, pt, ct, rs + t);
    }
}

INLINE void hc_pre_backward_block(const float *x, const float *raw, const float *base, const float *scale,
                                  const float *rs, const float *dy, const float *dpost, const float *dcomb, long count,
                                  int n, long d, int iters, float eps, float *draw, float *dlogit, float *dmixed,
                                  float *dx) {
    int nn = n * n, m = 2 * n + nn;
    Coefficients c;
    float path[(2 * iters - 1) * nn][LANES], sums[(2 * iters - 1) * n][LANES], g[nn][LANES], dl[m][LANES], drs[LANES];
    coefficients_lanes(&c, raw, rs, base, scale, count, n, iters, eps, path, sums);
    memset(dl, 0, sizeof(dl));
    memset(g, 0, sizeof(g));
    for (long t = 0; t < count; t++) {
        for (int j = 0; j < n; j++) {
            dl[j][t] = dot(dy + t * d, x + (t * n + j) * d, d);
            dl[n + j][t] = dpost[t * n + j];
        }
        for (int i = 0; i < nn; i++) g[i][t] = dcomb[t * nn + i];
    }
    for (int j = 0; j < n; j++) {
        EACH_LANE dl[j][l] *= (c.pre[j][l] - eps) * (1.0f - (c.pre[j][l] - eps));
        EACH_LANE dl[n + j][l] *= c.post[j][l] * (1.0f - 0.5f * c.post[j][l]);
    }
    for (int step = 2 * iters - 2; step >= 0; step--) { /* out = in * r, r = 1 / (sum(in) + eps) */
        int columns = step % 2 == 0;
        for (int a = 0; a < n; a++) {
            int first = columns ? a : a * n, stride = columns ? n : 1;
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
    for (long t = 0; t < count; t++) {
        float k = -drs[t] * rs[t] * rs[t] * rs[t] / (float)(n * d);
        for (int j = 0; j < n; j++) {
            const float *restrict xt = x + (t * n + j) * d, *restrict dyt = dy + t * d;
            float *restrict out = dx + (t * n + j) * d, p = c.pre[j][t];
            for (long i = 0; i < d; i++) out[i] = p * dyt[i] + k * xt[i];
        }
    }
}

/* Gradients of hc_pre. Outputs: draw [T, m] (of raw), dlogit [T, m] (of mix*scale+base, for base), dmixed [T, m]
 * (dlogit * mix, for scale), and dx [T, n*D] = pre_j dy + the path through the RMS (the path through raw is a GEMM
 * that the caller adds). */
void hc_pre_backward(const float *x, const float *raw, const float *base, const float *scale, const float *rs,
                     const float *dy, const float *dpost, const float *dcomb, long tokens, int n, long d, int iters,
                     float eps, float *draw, float *dlogit, float *dmixed, float *dx) {
    int nn = n * n, m = 2 * n + nn;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t += LANES) {
        long count = tokens - t < LANES ? tokens - t : LANES;
        const float *xt = x + t * n * d, *rt = raw + t * m, *dyt = dy + t * d, *dpt = dpost + t * n, *dct = dcomb + t * nn;
        float *a = draw + t * m, *b = dlogit + t * m, *c = dmixed + t * m, *dxt = dx + t * n * d;
        if (n == 4)
            hc_pre_backward_block(xt, rt, base, scale, rs + t, dyt, dpt, dct, count, 4, d, iters, eps, a, b, c, dxt);
        else hc_pre_backward_block(xt, rt, base, scale, rs + t, dyt, dpt, dct, count, n, d, iters, eps, a, b, c, dxt);
    }
}

INLINE void hc_post_token(const float *restrict x, const float *restrict y, const float *post, const float *comb, int n,
                          long d, float *restrict out) {
    for (int k = 0; k < n; k++)
        for (long i = 0; i < d; i++) {
            float s = post[k] * y[i];
            for (int j = 0; j < n; j++) s += comb[j * n + k] * x[j * d + i];
            out[k * d + i] = s;
        }
}

void hc_post_forward(const float *x, const float *y, const float *post, const float *comb, long tokens, int n, long d,
                     float *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *xt = x + t * n * d, *yt = y + t * d, *p = post + t * n, *c = comb + t * n * n;
        if (n == 4) hc_post_token(xt, yt, p, c, 4, d, out + t * n * d);
        else hc_post_token(xt, yt, p, c, n, d, out + t * n * d);
    }
}

INLINE void hc_post_token_backward(const float *restrict x, const float *restrict y, const float *post, const float *comb,
                                   const float *restrict g, int n, long d, float *restrict dx, float *restrict dy,
                                   float *dpost, float *dcomb) {
    for (long i = 0; i < d; i++) {
        float s = 0.0f;
        for (int k = 0; k < n; k++) s += post[k] * g[k * d + i];
        dy[i] = s;
    }
    for (int k = 0; k < n; k++) dpost[k] = dot(g + k * d, y, d);
    for (int j = 0; j < n; j++) {
        for (int k = 0; k < n; k++) dcomb[j * n + k] = dot(g + k * d, x + j * d, d);
        for (long i = 0; i < d; i++) {
            float s = 0.0f;
            for (int k = 0; k < n; k++) s += comb[j * n + k] * g[k * d + i];
            dx[j * d + i] = s;
        }
    }
}

void hc_post_backward(const float *x, const float *y, const float *post, const float *comb, const float *dout,
                      long tokens, int n, long d, float *dx, float *dy, float *dpost, float *dcomb) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *xt = x + t * n * d, *yt = y + t * d, *g = dout + t * n * d, *p = post + t * n, *c = comb + t * n * n;
        float *dxt = dx + t * n * d, *dpt = dpost + t * n, *dct = dcomb + t * n * n;
        if (n == 4) hc_post_token_backward(xt, yt, p, c, g, 4, d, dxt, dy + t * d, dpt, dct);
        else hc_post_token_backward(xt, yt, p, c, g, n, d, dxt, dy + t * d, dpt, dct);
    }
}

