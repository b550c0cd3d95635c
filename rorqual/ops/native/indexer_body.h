/* Included twice by indexer.c, once for each element type. */

#include "gemm.h"

#ifndef ELEMENT_BF16
/* sum_j w_j relu(dots_j) of n entries. */
INLINE void reduce_heads(const float *dots, const float *weights, long heads, long n, float *score) {
    for (long c = 0; c < n; c += VECTOR) {
        Vector s = {0};
        for (long j = 0; j < heads; j++) s += weights[j] * larger(load(dots + j * n + c, VECTOR), 0.0f);
        store(score + c, VECTOR, s);
    }
}

/* Best k of scores [n], lowest index first among equals, ascending -> out, with `first` added; returns how many. */
INLINE long select_best(const float *score, float *scratch, long n, long k, long first, int64_t *out) {
    long count = 0;
    if (n <= k) {
        for (; count < n; count++) out[count] = first + count;
        return count;
    }
    memcpy(scratch, score, sizeof(float) * n);
    float threshold = kth_largest(scratch, n, k);
    long equal = k;
    for (long i = 0; i < n; i++) equal -= score[i] > threshold;
    for (long i = 0; i < n; i++)
        if (score[i] > threshold || (score[i] == threshold && equal-- > 0)) out[count++] = first + i;
    return count;
}
#endif

/* KL(attention mass ‖ softmax of index scores) with its gradients. The layer's attention (queries [B, T, H, A], lse
 * [B, T, H], entries [B, C, A], scale) is constant; picks [B, T, num_picks] (num_picks 0: none) narrow what the loss is
 * taken over; valid [B, T] (NULL: all) leaves rows out. -> sums [parts * B, 4]: divergence, queries that see any, recall
 * of the top k, queries it was taken over; dq [B, T, J, K], dweights [B, T, J]; dkeys [parts, B, C, K], zeroed by the
 * caller, who adds the parts up. K is a multiple of 16, A even. */
void NAME(index_loss)(const T *q, const float *weights, const T *keys, const T *queries, const float *lse,
                      const T *attended, const int64_t *start, const int64_t *end, const int64_t *picks,
                      const int64_t *valid, long batch, long tokens, long heads, long width, long entries, long vis_rows,
                      long k, long num_picks, long attention_heads, long attention_width, float scale, long parts,
                      float *sums, T *dq, float *dweights, float *dkeys) {
    long wide = whole(entries), words = width / PER_WORD, thick = attention_width / PER_WORD;
    long each = (tokens + parts - 1) / parts, most = heads > attention_heads ? heads : attention_heads;
#pragma omp parallel for schedule(static)
    for (long part = 0; part < parts * batch; part++) {
        long b = part % batch, last = (part / batch + 1) * each < tokens ? (part / batch + 1) * each : tokens;
        WORD *packed = malloc(sizeof(WORD) * words * wide), *packed_entries = malloc(sizeof(WORD) * thick * wide);
        WORD *columns = malloc(sizeof(WORD) * (wide / PER_WORD) * width);
        WORD *pairs = malloc(sizeof(WORD) * heads * wide), *query_columns = malloc(sizeof(WORD) * heads * width);
        float *dots = malloc(sizeof(float) * most * wide), *mass = malloc(sizeof(float) * 3 * wide);
        float *score = mass + wide, *scratch = score + wide, *back = malloc(sizeof(float) * heads * width);
        T *rows = malloc(sizeof(T) * heads * wide);
        int64_t *best = malloc(sizeof(int64_t) * (k + 1));
        float *total = sums + part * 4, *into = dkeys + part * entries * width;
        /* rows beyond the last entry are zeros */
        T *padded = calloc(wide * width, sizeof(T));
        memcpy(padded, keys + b * entries * width, sizeof(T) * entries * width);
        NAME(pack_rows)(padded, width, wide, width, wide, packed);
        NAME(pack_columns)(padded, NULL, width, wide, width, columns);
        NAME(pack_rows)(attended + b * entries * attention_width, attention_width, entries, attention_width, wide,
                        packed_entries);
        float *spill = calloc(wide * width, sizeof(float));
        for (int i = 0; i < 4; i++) total[i] = 0.0f;
        for (long t = part / batch * each; t < last; t++) {
            long row = b * tokens + t, at = (vis_rows == 1 ? 0 : b) * tokens + t;
            long from = start ? start[at] : 0, to = end[at], base = from / PADDED * PADDED, n = whole(to - base);
            const T *mine = q + row * heads * width;
            memset(dq + row * heads * width, 0, sizeof(T) * heads * width);
            memset(dweights + row * heads, 0, sizeof(float) * heads);
            if (to <= from || (valid && !valid[row])) continue;
            /* attention mass of every visible entry */
            NAME(gemm)(attention_heads, n, thick, (const WORD *)(queries + row * attention_heads * attention_width), NULL,
                       thick, 1, packed_entries + base, wide, dots, n, 0);
            float everything = 0.0f, sum = 0.0f;
            for (long c = 0; c < n; c += VECTOR) {
                Vector s = {0};
                for (long h = 0; h < attention_heads; h++)
                    s += exp_lanes(load(dots + h * n + c, VECTOR) * scale - lse[row * attention_heads + h]);
                store(mass + c, VECTOR, s);
            }
            for (long c = 0; c < n; c++) mass[c] = base + c >= from && base + c < to ? mass[c] : 0.0f;
            for (long c = 0; c < n; c++) everything += mass[c];
            NAME(gemm)(heads, n, words, (const WORD *)mine, NULL, words, 1, packed + base, wide, dots, n, 0);
            reduce_heads(dots, weights + row * heads, heads, n, score);
            if (to - from > k && everything > 0.0f) {
                float caught = 0.0f;
                long count = select_best(score + from - base, scratch, to - from, k, from, best);
                for (long i = 0; i < count; i++) caught += mass[best[i] - base];
                total[2] += caught / max_(everything, 1e-20f);
                total[3] += 1.0f;
            }
            if (num_picks) { /* what the loss is taken over, marked in scratch */
                memset(scratch, 0, sizeof(float) * n);
                for (long i = 0; i < num_picks; i++) {
                    int64_t pick = picks[row * num_picks + i];
                    if (pick >= from && pick < to) scratch[pick - base] = 1.0f;
                }
            } else {
                for (long c = 0; c < n; c++) scratch[c] = base + c >= from && base + c < to ? 1.0f : 0.0f;
            }
            float top = -INFINITY, norm = 0.0f, divergence = 0.0f;
            for (long c = 0; c < n; c++) {
                mass[c] *= scratch[c];
                sum += mass[c];
                if (scratch[c] > 0.0f) top = max_(top, score[c]);
            }
            if (!(sum > 0.0f)) continue;
            for (long c = 0; c < n; c++) norm += scratch[c] * exp_(score[c] - top);
            float log_norm = logf(norm) + top;
            for (long c = 0; c < n; c++) {
                float target = mass[c] / sum;
                if (scratch[c] > 0.0f) divergence += target * (logf(max_(target, 1e-20f)) - (score[c] - log_norm));
                mass[c] = scratch[c] * (exp_(score[c] - log_norm) - target); /* gradient of the score */
            }
            total[0] += divergence;
            total[1] += 1.0f;
            for (long j = 0; j < heads; j++) {
                Vector s = {0}, none = {0};
                float w = weights[row * heads + j];
                for (long c = 0; c < n; c += VECTOR) {
                    Vector x = load(dots + j * n + c, VECTOR), g = load(mass + c, VECTOR);
                    s += g * larger(x, 0.0f);
                    Vector out = choose(x > 0.0f, g * w, none);
                    store(dots + j * n + c, VECTOR, out);
                    STORE(rows + j * n + c, VECTOR, out);
                }
                dweights[row * heads + j] = sum_lanes(s);
            }
            NAME(gemm)(heads, width, n / PER_WORD, (const WORD *)rows, NULL, n / PER_WORD, 1,
                       columns + base / PER_WORD * width, width, back, width, 0);
            for (long i = 0; i < heads * width; i += VECTOR)
                STORE(dq + row * heads * width + i, VECTOR, load(back + i, VECTOR));
            NAME(pack_columns_float)(dots, heads, n, pairs);
            NAME(pack_columns)(mine, NULL, width, heads, width, query_columns);
            NAME(gemm)(n, width, (heads + PER_WORD - 1) / PER_WORD, pairs, NULL, 1, n, query_columns, width,
                       spill + base * width, width, 1);
        }
        memcpy(into, spill, sizeof(float) * entries * width);
        free(packed), free(packed_entries), free(columns), free(pairs), free(query_columns), free(dots), free(mass);
        free(back), free(rows), free(best), free(padded), free(spill);
    }
}
