/* Included twice by routed.c, once for each element type. */

#include "kernels.h"
#include "panels.h"

#ifndef ELEMENT_BF16
/* The `active` largest of score + bias, lowest index first among equals. */
INLINE void choose_experts(const float *score, const float *bias, long experts, long active, int64_t *chosen) {
    for (long a = 0; a < active; a++) {
        long best = -1;
        float most = 0.0f;
        for (long e = 0; e < experts; e++) {
            float value = score[e] + bias[e];
            int is_taken = best >= 0 && !(value > most);
            for (long i = 0; i < a && !is_taken; i++) is_taken = chosen[i] == e;
            if (!is_taken) best = e, most = value;
        }
        chosen[a] = best;
    }
}

/* sqrt(softplus(x)), at least sqrt(SCORE_FLOOR). A NaN stays. */
INLINE Vector score_lanes(Vector x) {
    Vector soft = choose(x > 20.0f, x, larger(log1p_lanes(exp_lanes(x)), SCORE_FLOOR));
#ifdef __AVX512F__
    return (Vector)_mm512_sqrt_ps((__m512)soft);
#elif defined(__AVX__)
    return (Vector)_mm256_sqrt_ps((__m256)soft);
#else
    for (int i = 0; i < VECTOR; i++) soft[i] = sqrtf(soft[i]);
    return soft;
#endif
}

/* Clamped SwiGLU times the routing weight. */
INLINE Vector swiglu_lanes(Vector gate, Vector up, float top, float weight) {
    Vector g = smaller(gate, top), v = smaller(larger(up, -top), top);
    return g * sigmoid_lanes(g) * v * weight;
}
#endif

/* x [T, D], router w [E, D] -> scores [T, E] and weights [T, A] of the experts in chosen [T, A], which are found here when
 * there is a bias [E]. */
void NAME(router)(const T *x, const T *w, const float *bias, long tokens, long d, long experts, long active, float scale,
                  float *scores, int64_t *chosen, float *weights) {
    SHARED_OUT(tokens * d * experts > FORK_FROM, long t = 0; t < tokens; t += LANES, {
        long count = tokens - t < LANES ? tokens - t : LANES;
        NAME(dots)(count, experts, d, x + t * d, NULL, d, w, NULL, d, scores + t * experts, experts);
        float *first = scores + t * experts;
        for (long i = 0; i < count * experts; i += VECTOR)
            store(first + i, count * experts - i, score_lanes(load(first + i, count * experts - i)));
        for (long r = t; r < t + count; r++) {
            float *score = scores + r * experts, total = 0.0f;
            int64_t *mine = chosen + r * active;
            if (bias) choose_experts(score, bias, experts, active, mine);
            for (long a = 0; a < active; a++) total += score[mine[a]];
            for (long a = 0; a < active; a++) weights[r * active + a] = score[mine[a]] / total * scale;
        }
    });
}

/* Up to EXPERT_ROWS rows from `lo` on through one expert, given by the panels of its three matrices. */
static void NAME(expert_panels)(const T *x, const int64_t *token, const float *gate, const PANEL_WORD *p1,
                                const PANEL_WORD *p3, const PANEL_WORD *p2, long lo, long m, long d, long inner, float top,
                                T *hidden, T *out) {
    T *mine = hidden + lo * inner;
    const PANEL_WORD *row[EXPERT_ROWS + PANEL_HEIGHT];
    PANEL_WORD *room = NAME(panel_room)(m, d > inner ? d : inner);
    NAME(panel_rows)(m, d, x, token + lo, d, room, row);
    for (long j = 0; j < inner; j += PANEL)
        for (long i = 0; i < m; i += PANEL_HEIGHT) {
            Vector a[PANEL_HEIGHT][PANEL_VECTORS], u[PANEL_HEIGHT][PANEL_VECTORS];
            NAME(panel_block)(inner - j, row + i, d, p1 + NAME(panel_words)(j, d), a);
            NAME(panel_block)(inner - j, row + i, d, p3 + NAME(panel_words)(j, d), u);
            for (long r = i; r < m && r < i + PANEL_HEIGHT; r++)
                for (long e = 0; e < PANEL && j + e < inner; e += VECTOR)
                    STORE(mine + r * inner + j + e, inner - j - e,
                          swiglu_lanes(a[r - i][e / VECTOR], u[r - i][e / VECTOR], top, gate[lo + r]));
        }
    NAME(panel_rows)(m, inner, mine, NULL, inner, room, row);
    for (long j = 0; j < d; j += PANEL)
        for (long i = 0; i < m; i += PANEL_HEIGHT) {
            Vector y[PANEL_HEIGHT][PANEL_VECTORS];
            NAME(panel_block)(d - j, row + i, inner, p2 + NAME(panel_words)(j, inner), y);
            for (long r = i; r < m && r < i + PANEL_HEIGHT; r++)
                for (long e = 0; e < PANEL && j + e < d; e += VECTOR)
                    STORE(out + (lo + r) * d + j + e, d - j - e, y[r - i][e / VECTOR]);
        }
    free(room);
}

/* Rows sorted by expert, as for experts_forward: x [tokens, d], w1 and w3 [E, inner, d], w2 [E, d, inner], gate [rows]
 * -> out [rows, d]; hidden [rows, inner] is room to work in. */
void NAME(experts_apply)(const T *x, const int64_t *token, const int64_t *bounds, const float *gate, const T *w1,
                         const T *w3, const T *w2, long experts, long d, long inner, float limit, T *hidden, T *out) {
    float top = limit > 0.0f ? limit : INFINITY;
    long rows = bounds[experts], num = 0;
    long (*parts)[3] = malloc(sizeof(*parts) * (experts + rows / EXPERT_ROWS + 1)); /* expert, first row, rows */
    for (long e = 0; e < experts; e++)
        for (long lo = bounds[e]; lo < bounds[e + 1]; lo += EXPERT_ROWS, num++) {
            parts[num][0] = e, parts[num][1] = lo;
            parts[num][2] = bounds[e + 1] - lo < EXPERT_ROWS ? bounds[e + 1] - lo : EXPERT_ROWS;
        }
    long thin = (inner + EXPERT_COLUMNS - 1) / EXPERT_COLUMNS, thick = (d + EXPERT_COLUMNS - 1) / EXPERT_COLUMNS;
    int is_much = rows * d * inner > FORK_FROM;
    if (NAME(panels_fit)(rows / experts, d) && NAME(panels_fit)(rows / experts, inner)) {
        long wide = NAME(panel_words)(inner, d), high = NAME(panel_words)(d, inner), each = 2 * wide + high;
        PANEL_WORD *turned = aligned_alloc(64, sizeof(PANEL_WORD) * experts * each);
        SHARED_OUT(is_much, long e = 0; e < experts; e++, {
            PANEL_WORD *mine = turned + e * each;
            if (bounds[e] == bounds[e + 1]) continue;
            NAME(make_panels)(w1 + e * inner * d, inner, d, mine);
            NAME(make_panels)(w3 + e * inner * d, inner, d, mine + wide);
            NAME(make_panels)(w2 + e * inner * d, d, inner, mine + 2 * wide);
        });
        SHARED_OUT(is_much, long p = 0; p < num; p++, {
            const PANEL_WORD *mine = turned + parts[p][0] * each;
            NAME(expert_panels)(x, token, gate, mine, mine + wide, mine + 2 * wide, parts[p][1], parts[p][2], d, inner,
                                top, hidden, out);
        });
        free(turned), free(parts);
        return;
    }
    SHARED_OUT(is_much, long job = 0; job < num * thin; job++, {
        float a[EXPERT_ROWS * EXPERT_COLUMNS], u[EXPERT_ROWS * EXPERT_COLUMNS];
        long e = parts[job / thin][0], lo = parts[job / thin][1], m = parts[job / thin][2];
        long j = job % thin * EXPERT_COLUMNS, n = inner - j < EXPERT_COLUMNS ? inner - j : EXPERT_COLUMNS;
        NAME(dots)(m, n, d, x, token + lo, d, w1 + (e * inner + j) * d, NULL, d, a, EXPERT_COLUMNS);
        NAME(dots)(m, n, d, x, token + lo, d, w3 + (e * inner + j) * d, NULL, d, u, EXPERT_COLUMNS);
        for (long r = 0; r < m; r++)
            for (long i = 0; i < n; i += VECTOR) {
                Vector g = load(a + r * EXPERT_COLUMNS + i, n - i), v = load(u + r * EXPERT_COLUMNS + i, n - i);
                STORE(hidden + (lo + r) * inner + j + i, n - i, swiglu_lanes(g, v, top, gate[lo + r]));
            }
    });
    SHARED_OUT(is_much, long job = 0; job < num * thick; job++, {
        float y[EXPERT_ROWS * EXPERT_COLUMNS];
        long e = parts[job / thick][0], lo = parts[job / thick][1], m = parts[job / thick][2];
        long j = job % thick * EXPERT_COLUMNS, n = d - j < EXPERT_COLUMNS ? d - j : EXPERT_COLUMNS;
        NAME(dots)(m, n, inner, hidden + lo * inner, NULL, inner, w2 + (e * d + j) * inner, NULL, inner, y,
                   EXPERT_COLUMNS);
        for (long r = 0; r < m; r++)
            for (long i = 0; i < n; i += VECTOR)
                STORE(out + (lo + r) * d + j + i, n - i, load(y + r * EXPERT_COLUMNS + i, n - i));
    });
    free(parts);
}

/* y[t] = the token's rows, in the order of its slots, and its shared part: [rows, d], [T, active], [T, d] -> [T, d]. */
void NAME(experts_join)(const T *rows, const int64_t *slots, const T *shared, long tokens, long active, long d, T *y) {
    SHARED_OUT(tokens * active * d > FORK_FROM, long t = 0; t < tokens; t++, {
        for (long i = 0; i < d; i += VECTOR) {
            Vector s = {0};
            for (long k = 0; k < active; k++) s += LOAD(rows + slots[t * active + k] * d + i, d - i);
            STORE(y + t * d + i, d - i, s + LOAD(shared + t * d + i, d - i));
        }
    });
}
