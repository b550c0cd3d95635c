/* hyper_connections.py: the two halves of mHC around a sublayer, forward and backward.
 *
 * The small matrices of LANES tokens are worked on side by side, one token a vector lane. */

#include <stdlib.h>

#include "vectors.h"

typedef float Few __attribute__((vector_size(16), aligned(4)));
#define FEW 4 /* tokens of it: narrow vectors are divided faster, and a step of decoding has few tokens */
#define MIX_TOKENS 48 /* that pass over the panels of `fn` together: a multiple of LANES and PANEL_HEIGHT */

/* One division of all columns or rows by their sums: out = in / (sum(in) + eps). The same numbers in either type. */
#define DEFINE_DIVIDE(divide, Lanes)                                                                                \
    INLINE void divide(Lanes *a, int n, int by_column, float eps, Lanes *divisors) {                                \
        _Pragma("GCC unroll 4") for (int j = 0; j < n; j++) {                                                       \
            int first = by_column ? j : j * n, stride = by_column ? n : 1;                                          \
            Lanes s = (Lanes){0} + eps;                                                                             \
            _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) s += a[first + i * stride];                         \
            Lanes r = 1.0f / s;                                                                                     \
            _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) a[first + i * stride] *= r;                         \
            if (divisors) divisors[j] = s;                                                                          \
        }                                                                                                           \
    }
DEFINE_DIVIDE(divide_lanes, Vector)
DEFINE_DIVIDE(divide_few, Few)
#undef DEFINE_DIVIDE

/* Its gradient, in place of that of `out`; `a` goes from `out` back to `in`. */
INLINE void divide_lanes_backward(Vector *a, Vector *g, int n, int by_column, const Vector *divisors) {
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
        int first = by_column ? j : j * n, stride = by_column ? n : 1;
        Vector s = divisors[j], r = 1.0f / s, inner = {0};
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) inner += g[first + i * stride] * a[first + i * stride];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            g[first + i * stride] = (g[first + i * stride] - inner) * r;
            a[first + i * stride] *= s;
        }
    }
}

/* Columns and rows by turns, of the first FEW tokens. */
INLINE void divide_by_turns_few(Vector *a, int n, int iters, float eps) {
    Few few[MAX_STREAMS * MAX_STREAMS];
#pragma GCC unroll 16
    for (int i = 0; i < n * n; i++) memcpy(few + i, a + i, sizeof(Few));
    divide_few(few, n, 1, eps, NULL);
    for (int i = 1; i < iters; i++) {
        divide_few(few, n, 0, eps, NULL);
        divide_few(few, n, 1, eps, NULL);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n * n; i++) memcpy(a + i, few + i, sizeof(Few));
}

/* Softmax of the rows, then columns and rows by turns, of `count` tokens. `divisors` [2 * iters - 1][n] keeps what was
 * divided by, unless it is NULL. */
INLINE void sinkhorn_lanes(Vector *m, long count, int n, int iters, float eps, Vector *divisors) {
    Vector a[MAX_STREAMS * MAX_STREAMS];
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
        Vector top = m[j * n], total = {0};
#pragma GCC unroll 4
        for (int k = 1; k < n; k++) top = choose(top < m[j * n + k], m[j * n + k], top);
#pragma GCC unroll 4
        for (int k = 0; k < n; k++) total += a[j * n + k] = exp_lanes(m[j * n + k] - top);
#pragma GCC unroll 4
        for (int k = 0; k < n; k++) a[j * n + k] = a[j * n + k] / total + eps;
    }
    if (count <= FEW && !divisors) divide_by_turns_few(a, n, iters, eps);
    else {
        divide_lanes(a, n, 1, eps, divisors);
        for (int i = 1; i < iters; i++) {
            divide_lanes(a, n, 0, eps, divisors ? divisors + (2 * i - 1) * n : NULL);
            divide_lanes(a, n, 1, eps, divisors ? divisors + 2 * i * n : NULL);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < n * n; i++) m[i] = a[i];
}

/* `m` is what sinkhorn_lanes gave and `g` its gradient -> that of what it was given. */
INLINE void sinkhorn_lanes_backward(const Vector *m, Vector *g, int n, int iters, float eps, const Vector *divisors) {
    Vector a[MAX_STREAMS * MAX_STREAMS], d[MAX_STREAMS * MAX_STREAMS];
#pragma GCC unroll 16
    for (int i = 0; i < n * n; i++) a[i] = m[i], d[i] = g[i];
    for (int i = iters - 1; i > 0; i--) {
        divide_lanes_backward(a, d, n, 1, divisors + 2 * i * n);
        divide_lanes_backward(a, d, n, 0, divisors + (2 * i - 1) * n);
    }
    divide_lanes_backward(a, d, n, 1, divisors);
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
        Vector inner = {0};
#pragma GCC unroll 4
        for (int k = 0; k < n; k++) inner += d[j * n + k] * (a[j * n + k] - eps);
#pragma GCC unroll 4
        for (int k = 0; k < n; k++) g[j * n + k] = (a[j * n + k] - eps) * (d[j * n + k] - inner);
    }
}

/* What one block of tokens needs on the way: mix (RMS-scaled) and the coefficients. */
typedef struct {
    Vector mix[MAX_MIX], pre[MAX_STREAMS], post[MAX_STREAMS], comb[MAX_STREAMS * MAX_STREAMS];
} Coefficients;

/* Rows of `count` (up to LANES) tokens [count][m] -> a vector of tokens for each of the m; and back. */
INLINE void to_lanes(const float *rows, long count, int m, Vector *out) {
    float *lanes = (float *)out;
    if (count < LANES) memset(out, 0, sizeof(Vector) * m);
    for (long t = 0; t < count; t++)
        for (int i = 0; i < m; i++) lanes[i * LANES + t] = rows[t * m + i];
}
INLINE void from_lanes(const Vector *in, long count, int m, float *rows) {
    const float *lanes = (const float *)in;
    for (long t = 0; t < count; t++)
        for (int i = 0; i < m; i++) rows[t * m + i] = lanes[i * LANES + t];
}

INLINE void coefficients_lanes(Coefficients *c, const float *raw, Vector rs, const float *base, const float *scale,
                               long count, int n, int iters, float eps, Vector *divisors) {
    int m = 2 * n + n * n;
    to_lanes(raw, count, m, c->mix);
    for (int i = 0; i < m; i++) c->mix[i] *= rs;
    for (int j = 0; j < n; j++) {
        c->pre[j] = sigmoid_lanes(c->mix[j] * scale[0] + base[j]) + eps;
        c->post[j] = 2.0f * sigmoid_lanes(c->mix[n + j] * scale[1] + base[n + j]);
    }
    for (int i = 0; i < n * n; i++) c->comb[i] = c->mix[2 * n + i] * scale[2] + base[2 * n + i];
    sinkhorn_lanes(c->comb, count, n, iters, eps, divisors);
}

#include "hyper_connections_body.h"

#define ELEMENT_BF16
#include "hyper_connections_body.h"
