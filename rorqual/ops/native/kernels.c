/* Native twins of the small operations that cost eager PyTorch more in dispatch and memory passes than in arithmetic.
 *
 * Every function here has its equation, and its reference, in the Python file named above it; tests hold the two
 * together. fp32 only, rows contiguous, one row per token; a loop over rows is split over threads. The backward
 * functions recompute what is cheap instead of saving it.
 */

#include <math.h>
#include <stddef.h>
#include <string.h>

#define MAX_STREAMS 8
#define MAX_ITERS 64

static inline float sigmoidf_(float x) { return 1.0f / (1.0f + expf(-x)); }

static inline float dot(const float *a, const float *b, long n) {
    float s = 0.0f;
    for (long i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

/* ---- hyper_connections.py: coefficients --------------------------------------------------------------------- */

/* Sinkhorn on one n x n matrix. `path`, if given, keeps the matrix before every division and `sums` its divisors. */
static void sinkhorn_one(float *m, int n, int iters, float eps, float *path, float *sums) {
    int nn = n * n, step = 0;
    for (int j = 0; j < n; j++) {
        float top = m[j * n], total = 0.0f;
        for (int k = 1; k < n; k++) top = fmaxf(top, m[j * n + k]);
        for (int k = 0; k < n; k++) total += m[j * n + k] = expf(m[j * n + k] - top);
        for (int k = 0; k < n; k++) m[j * n + k] = m[j * n + k] / total + eps;
    }
    for (int it = 0; it < 2 * iters - 1; it++) {
        float s[MAX_STREAMS];
        int columns = it % 2 == 0;
        for (int a = 0; a < n; a++) s[a] = eps;
        for (int j = 0; j < n; j++)
            for (int k = 0; k < n; k++) s[columns ? k : j] += m[j * n + k];
        if (path) {
            memcpy(path + step * nn, m, sizeof(float) * nn);
            memcpy(sums + step * n, s, sizeof(float) * n);
        }
        for (int a = 0; a < n; a++) s[a] = 1.0f / s[a];
        for (int j = 0; j < n; j++)
            for (int k = 0; k < n; k++) m[j * n + k] *= s[columns ? k : j];
        step++;
    }
}

/* mix [T, 2n+nn] (already scaled by the RMS) -> pre [T, n], post [T, n], comb [T, nn]. */
static void coefficients_one(const float *mix, const float *base, const float *scale, int n, int iters, float eps,
                             float *pre, float *post, float *comb, float *path, float *sums) {
    for (int j = 0; j < n; j++) pre[j] = sigmoidf_(mix[j] * scale[0] + base[j]) + eps;
    for (int j = 0; j < n; j++) post[j] = 2.0f * sigmoidf_(mix[n + j] * scale[1] + base[n + j]);
    for (int i = 0; i < n * n; i++) comb[i] = mix[2 * n + i] * scale[2] + base[2 * n + i];
    sinkhorn_one(comb, n, iters, eps, path, sums);
}

/* Sublayer input: raw = x fn^T [T, m] -> y [T, D] and the coefficients; rs [T] is the RMS factor. */
void hc_pre_forward(const float *x, const float *raw, const float *base, const float *scale, long tokens, int n, long d,
                    int iters, float norm_eps, float eps, float *y, float *pre, float *post, float *comb, float *rs) {
    int m = 2 * n + n * n;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *xt = x + t * n * d;
        float mix[MAX_STREAMS * (MAX_STREAMS + 2)];
        float r = 1.0f / sqrtf(dot(xt, xt, n * d) / (float)(n * d) + norm_eps);
        rs[t] = r;
        for (int i = 0; i < m; i++) mix[i] = raw[t * m + i] * r;
        float *p = pre + t * n, *yt = y + t * d;
        coefficients_one(mix, base, scale, n, iters, eps, p, post + t * n, comb + t * n * n, NULL, NULL);
        for (long i = 0; i < d; i++) yt[i] = p[0] * xt[i];
        for (int j = 1; j < n; j++)
            for (long i = 0; i < d; i++) yt[i] += p[j] * xt[j * d + i];
    }
}

/* Gradients of hc_pre. Outputs: draw [T, m] (of raw), dlogit [T, m] (of mix*scale+base, for base), dmixed [T, m]
 * (dlogit * mix, for scale), and dx [T, n*D] = pre_j dy + the path through the RMS (the path through raw is a GEMM
 * that the caller adds). */
void hc_pre_backward(const float *x, const float *raw, const float *base, const float *scale, const float *rs,
                     const float *dy, const float *dpost, const float *dcomb, long tokens, int n, long d, int iters,
                     float eps, float *draw, float *dlogit, float *dmixed, float *dx) {
    int nn = n * n, m = 2 * n + nn, steps = 2 * iters - 1;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *xt = x + t * n * d, *dyt = dy + t * d;
        float mix[MAX_STREAMS * (MAX_STREAMS + 2)], pre[MAX_STREAMS], post[MAX_STREAMS], comb[MAX_STREAMS * MAX_STREAMS];
        float path[2 * MAX_ITERS * MAX_STREAMS * MAX_STREAMS], sums[2 * MAX_ITERS * MAX_STREAMS], g[MAX_STREAMS * MAX_STREAMS];
        float r = rs[t];
        for (int i = 0; i < m; i++) mix[i] = raw[t * m + i] * r;
        coefficients_one(mix, base, scale, n, iters, eps, pre, post, comb, path, sums);
        float *dl = dlogit + t * m;
        for (int j = 0; j < n; j++) {
            float s = pre[j] - eps;
            dl[j] = dot(dyt, xt + j * d, d) * s * (1.0f - s);
        }
        for (int j = 0; j < n; j++) {
            float s = 0.5f * post[j];
            dl[n + j] = dpost[t * n + j] * 2.0f * s * (1.0f - s);
        }
        memcpy(g, dcomb + t * nn, sizeof(float) * nn);
        for (int it = steps - 1; it >= 0; it--) { /* out = in / s, s = sum(in) + eps */
            int columns = it % 2 == 0;
            const float *in = path + it * nn, *s = sums + it * n;
            float inner[MAX_STREAMS] = {0};
            for (int j = 0; j < n; j++)
                for (int k = 0; k < n; k++) inner[columns ? k : j] += g[j * n + k] * in[j * n + k];
            for (int j = 0; j < n; j++)
                for (int k = 0; k < n; k++) {
                    int a = columns ? k : j;
                    g[j * n + k] = (g[j * n + k] - inner[a] / s[a]) / s[a];
                }
        }
        for (int j = 0; j < n; j++) { /* softmax rows: the first step's input minus eps */
            float inner = 0.0f;
            for (int k = 0; k < n; k++) inner += g[j * n + k] * (path[j * n + k] - eps);
            for (int k = 0; k < n; k++) dl[2 * n + j * n + k] = (path[j * n + k] - eps) * (g[j * n + k] - inner);
        }
        float drs = 0.0f;
        for (int i = 0; i < m; i++) {
            float dm = dl[i] * scale[i < n ? 0 : i < 2 * n ? 1 : 2];
            dmixed[t * m + i] = dl[i] * mix[i];
            draw[t * m + i] = dm * r;
            drs += dm * raw[t * m + i];
        }
        float c = -drs * r * r * r / (float)(n * d);
        for (int j = 0; j < n; j++)
            for (long i = 0; i < d; i++) dx[t * n * d + j * d + i] = pre[j] * dyt[i] + c * xt[j * d + i];
    }
}

/* ---- hyper_connections.py: expand ---------------------------------------------------------------------------- */

void hc_post_forward(const float *x, const float *y, const float *post, const float *comb, long tokens, int n, long d,
                     float *out) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *xt = x + t * n * d, *yt = y + t * d;
        for (int k = 0; k < n; k++) {
            float *o = out + (t * n + k) * d, p = post[t * n + k];
            for (long i = 0; i < d; i++) o[i] = p * yt[i];
            for (int j = 0; j < n; j++) {
                float c = comb[t * n * n + j * n + k];
                for (long i = 0; i < d; i++) o[i] += c * xt[j * d + i];
            }
        }
    }
}

void hc_post_backward(const float *x, const float *y, const float *post, const float *comb, const float *dout,
                      long tokens, int n, long d, float *dx, float *dy, float *dpost, float *dcomb) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *xt = x + t * n * d, *yt = y + t * d, *g = dout + t * n * d, *c = comb + t * n * n;
        float *dyt = dy + t * d;
        for (long i = 0; i < d; i++) dyt[i] = 0.0f;
        for (int k = 0; k < n; k++) {
            float p = post[t * n + k];
            dpost[t * n + k] = dot(g + k * d, yt, d);
            for (long i = 0; i < d; i++) dyt[i] += p * g[k * d + i];
        }
        for (int j = 0; j < n; j++) {
            float *dxt = dx + (t * n + j) * d;
            for (long i = 0; i < d; i++) dxt[i] = 0.0f;
            for (int k = 0; k < n; k++) {
                dcomb[t * n * n + j * n + k] = dot(g + k * d, xt + j * d, d);
                float w = c[j * n + k];
                for (long i = 0; i < d; i++) dxt[i] += w * g[k * d + i];
            }
        }
    }
}

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
            float g = fminf(a[t * d + i], top), v = fminf(fmaxf(u[t * d + i], -top), top);
            out[t * d + i] = g / (1.0f + expf(-g)) * v * w;
        }
    }
}

void swiglu_backward(const float *a, const float *u, const float *weight, const float *dout, long rows, long d,
                     float limit, float *da, float *du, float *dweight) {
    float top = limit > 0.0f ? limit : INFINITY;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        float w = weight ? weight[t] : 1.0f, total = 0.0f;
        for (long i = 0; i < d; i++) {
            float a0 = a[t * d + i], u0 = u[t * d + i], go = dout[t * d + i];
            float g = fminf(a0, top), v = fminf(fmaxf(u0, -top), top);
            float s = 1.0f / (1.0f + expf(-g)), silu = g * s;
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
            for (long c = 0; c < entries; c++) o[c] += w * fmaxf(s[c], 0.0f);
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
            for (long c = 0; c < entries; c++) {
                total += g[c] * fmaxf(s[c], 0.0f);
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
