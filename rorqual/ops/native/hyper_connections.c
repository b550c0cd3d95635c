/* hyper_connections.py: the two halves of mHC around a sublayer, forward and backward. */

#include <stdlib.h>

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

#include "hyper_connections_body.h"

#define ELEMENT_BF16
#include "hyper_connections_body.h"
