/* Whole sublayers for a handful of tokens, where one call costs less than the dispatch of its parts. No gradients. */

#include <stdlib.h>

#include "select.h"

#define SCORE_FLOOR 1e-36f /* as in experts.py */

/* ---- sparse_attention.py -------------------------------------------------------------------------------------- */

/* Online softmax state of one query: running maximum and sum per head, value accumulated unnormalised. */
INLINE void attend_key(const float *restrict q, const float *restrict key, float scale, long heads, long width,
                       float *restrict top, float *restrict total, float *restrict value) {
    for (long h = 0; h < heads; h++) {
        float s = dot(q + h * width, key, width) * scale;
        float *restrict v = value + h * width;
        if (s > top[h]) {
            float shrink = exp_(top[h] - s);
            total[h] *= shrink;
            for (long i = 0; i < width; i++) v[i] *= shrink;
            top[h] = s;
        }
        float p = exp_(s - top[h]);
        total[h] += p;
        for (long i = 0; i < width; i++) v[i] += p * key[i];
    }
}

/* q [B, T, H, K], kv [B, W-1+T, K], sink [H], positions [pos_rows, T]; entries rows K apart, batches entry_stride apart;
 * visible range [start, end) per query ([vis_rows, T], start may be NULL), or picks [B, T, num_picks] (-1: none).
 * -> out [B, T, H, K], lse [B, T, H]. */
void attend_small(const float *q, const float *kv, const float *sink, const int64_t *positions, const float *entries,
                  const int64_t *start, const int64_t *end, const int64_t *picks, long batch, long tokens, long heads,
                  long width, long window, long entry_stride, long pos_rows, long vis_rows, long num_picks, float scale,
                  float *out, float *lse) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < batch * tokens; row++) {
        long b = row / tokens, t = row % tokens;
        const float *qr = q + row * heads * width, *keys = kv + (b * (window - 1 + tokens) + t) * width;
        float *value = out + row * heads * width, *norm = lse + row * heads;
        float top[heads], total[heads];
        memset(value, 0, sizeof(float) * heads * width);
        for (long h = 0; h < heads; h++) {
            top[h] = sink[h];
            total[h] = 1.0f; /* the sink itself */
        }
        long position = positions[(pos_rows == 1 ? 0 : b) * tokens + t];
        for (long j = position < window - 1 ? window - 1 - position : 0; j < window; j++)
            attend_key(qr, keys + j * width, scale, heads, width, top, total, value);
        const float *mine = entries ? entries + b * entry_stride : NULL;
        if (picks) {
            for (long i = 0; i < num_picks; i++) {
                int64_t pick = picks[row * num_picks + i];
                if (pick >= 0) attend_key(qr, mine + pick * width, scale, heads, width, top, total, value);
            }
        } else if (mine) {
            long at = (vis_rows == 1 ? 0 : b) * tokens + t;
            for (int64_t i = start ? start[at] : 0; i < end[at]; i++)
                attend_key(qr, mine + i * width, scale, heads, width, top, total, value);
        }
        for (long h = 0; h < heads; h++) {
            float r = 1.0f / total[h];
            for (long i = 0; i < width; i++) value[h * width + i] *= r;
            norm[h] = logf(total[h]) + top[h];
        }
    }
}

/* ---- index_topk.py ---------------------------------------------------------------------------------------------- */

/* Scores of q [B, T, J, K] with head weights [B, T, J] against keys (rows K apart, batches key_stride apart), then the
 * best k of the visible range [start, end) per query, ascending, lowest index first among equals; -1 fills up.
 * -> picks [B, T, k]. */
void index_select_small(const float *q, const float *weights, const float *keys, const int64_t *start,
                        const int64_t *end, long batch, long tokens, long heads, long width, long key_stride,
                        long vis_rows, long k, int64_t *picks) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < batch * tokens; row++) {
        long b = row / tokens, t = row % tokens, at = (vis_rows == 1 ? 0 : b) * tokens + t;
        long from = start ? start[at] : 0, n = end[at] - from, count = 0;
        int64_t *mine = picks + row * k;
        const float *first = keys + b * key_stride + from * width;
        if (n > k) {
            float *score = malloc(sizeof(float) * 2 * n);
            for (long i = 0; i < n; i++) {
                float s = 0.0f;
                for (long j = 0; j < heads; j++)
                    s += weights[row * heads + j] * max_(dot(q + (row * heads + j) * width, first + i * width, width), 0.0f);
                score[i] = score[n + i] = s;
            }
            float threshold = kth_largest(score + n, n, k);
            long equal = k;
            for (long i = 0; i < n; i++) equal -= score[i] > threshold;
            for (long i = 0; i < n; i++)
                if (score[i] > threshold || (score[i] == threshold && equal-- > 0)) mine[count++] = from + i;
            free(score);
        } else {
            for (; count < n; count++) mine[count] = from + count;
        }
        for (; count < k; count++) mine[count] = -1;
    }
}

/* ---- experts.py: router, chosen experts and the shared one ----------------------------------------------------- */

INLINE void expert(const float *x, const float *w1, const float *w3, const float *w2, float gate, float limit, long d,
                   long width, float *hidden, float *y) {
    float top = limit > 0.0f ? limit : INFINITY;
    for (long i = 0; i < width; i++) {
        float a = min_(dot(w1 + i * d, x, d), top), u = min_(max_(dot(w3 + i * d, x, d), -top), top);
        hidden[i] = a * sigmoid_(a) * u * gate;
    }
    for (long i = 0; i < d; i++) y[i] += dot(w2 + i * width, hidden, width);
}

/* x [T, D]; router [E, D]; bias [E] (learned routing) or table [T, A] (hash routing); stacked experts w1, w3 [E, I, D],
 * w2 [E, D, I]; shared expert s1, s3 [I, D], s2 [D, I] -> y [T, D]. */
void moe_small(const float *x, const float *router, const float *bias, const int64_t *table, const float *w1,
               const float *w3, const float *w2, const float *s1, const float *s3, const float *s2, long tokens, long d,
               long experts, long active, long width, float route_scale, float limit, float *y) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *xt = x + t * d;
        float *yt = y + t * d, score[experts], hidden[width], total = 0.0f;
        long chosen[active];
        for (long e = 0; e < experts; e++) {
            float z = dot(router + e * d, xt, d);
            score[e] = sqrtf(z > 20.0f ? z : max_(log1pf(expf(z)), SCORE_FLOOR));
        }
        for (long a = 0; a < active; a++) {
            if (table) {
                chosen[a] = table[t * active + a];
            } else {
                long best = -1;
                for (long e = 0; e < experts; e++) {
                    int taken = 0;
                    for (long i = 0; i < a; i++) taken |= chosen[i] == e;
                    if (!taken && (best < 0 || score[e] + bias[e] > score[best] + bias[best])) best = e;
                }
                chosen[a] = best;
            }
            total += score[chosen[a]];
        }
        memset(yt, 0, sizeof(float) * d);
        for (long e = 0; e < experts; e++) /* ascending expert id, the fixed order of the sum */
            for (long a = 0; a < active; a++)
                if (chosen[a] == e)
                    expert(xt, w1 + e * width * d, w3 + e * width * d, w2 + e * d * width,
                           score[e] / total * route_scale, limit, d, width, hidden, yt);
        expert(xt, s1, s3, s2, 1.0f, limit, d, width, hidden, yt);
    }
}
