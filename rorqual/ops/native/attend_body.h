/* Included twice by attend.c, once for each element type. */

#include "dots.h"
#include "kernels.h"

#ifndef ELEMENT_BF16
#ifdef HAS_32_REGISTERS
#define ADDED 4 /* vectors of channels that four heads add up at once */
#else
#define ADDED 2
#endif

/* Scores [n] of one head -> weights exp(score - top), their sum to `sum`; returns top, the largest of the scores and `top`.
 * Rows are whole vectors, whose last lanes hold anything. */
INLINE float weigh(float *score, long n, float scale, float top, float *sum) {
    const Integers lane = LANE_NUMBERS;
    Vector most = (Vector){0} + top, all = {0};
    for (long j = 0; j < n; j += VECTOR) {
        Vector x = load(score + j, VECTOR) * scale;
        store(score + j, VECTOR, x);
        if (n - j < VECTOR) x = choose(lane < (int32_t)(n - j), x, most); /* what lies beyond the last key must not win */
        most = choose(most < x, x, most);
    }
#ifdef __AVX512F__
    top = _mm512_reduce_max_ps((__m512)most);
#else
    top = most[0];
    for (int i = 1; i < VECTOR; i++) top = max_(top, most[i]);
#endif
    for (long j = 0; j < n; j += VECTOR) {
        Vector weight = exp_lanes(load(score + j, VECTOR) - top);
        store(score + j, VECTOR, weight);
        all += n - j < VECTOR ? choose(lane < (int32_t)(n - j), weight, (Vector){0}) : weight;
    }
    *sum = sum_lanes(all);
    return top;
}
#endif

/* Adds `n` keys, one after the other, each by its weight (rows of weights PIECE apart), to value [heads][padded]: `vectors`
 * of channels (is_whole: all there) from channel `at` on. */
INLINE void NAME(add_keys)(int heads, int vectors, int is_whole, const float *weights, const T *const *keys, long n, long at,
                           long width, float *value, long padded) {
    Vector sum[4][4];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[h][v] = load(value + h * padded + at + v * VECTOR, VECTOR);
    for (long j = 0; j < n; j++) {
        const T *key = keys[j] + at;
        Vector x[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) x[v] = LOAD(key + v * VECTOR, is_whole ? VECTOR : width - at - v * VECTOR);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            float w = weights[h * PIECE + j];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[h][v] = sum[h][v] + w * x[v];
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(value + h * padded + at + v * VECTOR, VECTOR, sum[h][v]);
}

/* The same over all channels from `at` on. */
INLINE void NAME(add_keys_wide)(int heads, int vectors, const float *weights, const T *const *keys, long n, long at,
                                long width, float *value, long padded) {
    for (; width - at >= vectors * VECTOR; at += vectors * VECTOR)
        NAME(add_keys)(heads, vectors, 1, weights, keys, n, at, width, value, padded);
    for (; width - at >= VECTOR; at += VECTOR) NAME(add_keys)(heads, 1, 1, weights, keys, n, at, width, value, padded);
    if (at < width) NAME(add_keys)(heads, 1, 0, weights, keys, n, at, width, value, padded);
}

#if defined(ELEMENT_BF16) && defined(HAS_BF16_PRODUCTS)
/* Keys two at a time by bf16 products, their weights rounded to bf16: `pairs` of 32 channels from channel `at` on. */
INLINE void add_key_pairs(int heads, int pairs, const uint16_t (*weights)[PIECE], const uint16_t *const *keys, long n,
                          long at, float *value, long padded) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    Vector sum[4][4];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * pairs; v++) sum[h][v] = load(value + h * padded + at + v * VECTOR, VECTOR);
    for (long j = 0; j < n; j += 2) {
        const uint16_t *one = keys[j] + at, *two = keys[j + 1 < n ? j + 1 : j] + at; /* an odd one's partner weighs 0 */
        __m512bh x[4];
#pragma GCC unroll 2
        for (int p = 0; p < pairs; p++) {
            __m512i a = _mm512_loadu_si512(one + 32 * p), b = _mm512_loadu_si512(two + 32 * p);
            x[2 * p] = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
            x[2 * p + 1] = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            uint32_t both;
            memcpy(&both, weights[h] + j, sizeof(both));
            __m512bh w = (__m512bh)_mm512_set1_epi32((int)both);
#pragma GCC unroll 4
            for (int v = 0; v < 2 * pairs; v++) sum[h][v] = (Vector)_mm512_dpbf16_ps((__m512)sum[h][v], w, x[v]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * pairs; v++) store(value + h * padded + at + v * VECTOR, VECTOR, sum[h][v]);
}
#endif

/* A piece's keys for `heads` (up to 4) heads. Where the processor multiplies bf16 in pairs, whole 32 channels go that way. */
INLINE void NAME(add_piece)(int heads, const float *weights, const T *const *keys, long n, long width, float *value,
                            long padded) {
    long at = 0;
#if defined(ELEMENT_BF16) && defined(HAS_BF16_PRODUCTS)
    uint16_t rounded[4][PIECE];
    for (int h = 0; h < heads; h++) {
        for (long j = 0; j < n; j += VECTOR) store_bf16(rounded[h] + j, VECTOR, load(weights + h * PIECE + j, VECTOR));
        if (n % 2) rounded[h][n] = 0;
    }
    for (; width - at >= 64; at += 64) add_key_pairs(heads, 2, rounded, keys, n, at, value, padded);
    for (; width - at >= 32; at += 32) add_key_pairs(heads, 1, rounded, keys, n, at, value, padded);
#endif
    NAME(add_keys_wide)(heads, heads == 4 ? ADDED : 4, weights, keys, n, at, width, value, padded);
}

/* Heads [first, last) of one query [H, K] over run `run` of its `n` keys -> left [run_floats]: sums of values [heads]
 * [padded], of weights [heads] and largest scores [heads]. The sink counts in the first run. `weights` has room for PIECE a head. */
void NAME(attend_run)(const T *q, const T *const *keys, long n, long run, const float *sink, long first, long last,
                      long width, float scale, float *weights, float *left) {
    long padded = whole(width), heads = last - first, end = n - run * RUN < RUN ? n : (run + 1) * RUN;
    float *value = left, *total = value + heads * padded, *top = total + heads;
    memset(value, 0, sizeof(float) * heads * padded);
    for (long h = 0; h < heads; h++) top[h] = sink[first + h], total[h] = run ? 0.0f : 1.0f;
    for (long j = run * RUN; j < end; j += PIECE) {
        long count = end - j < PIECE ? end - j : PIECE, h = 0;
        NAME(dots)(heads, count, width, q + first * width, NULL, width, NULL, keys + j, 0, weights, PIECE);
        for (h = 0; h < heads; h++) {
            float sum, before = top[h];
            top[h] = weigh(weights + h * PIECE, count, scale, before, &sum);
            if (top[h] != before) {
                float less = exp_(before - top[h]);
                for (long i = 0; i < padded; i += VECTOR) store(value + h * padded + i, VECTOR, load(value + h * padded + i, VECTOR) * less);
                total[h] *= less;
            }
            total[h] += sum;
        }
        for (h = 0; heads - h >= 4; h += 4)
            NAME(add_piece)(4, weights + h * PIECE, keys + j, count, width, value + h * padded, padded);
        for (; h < heads; h++) NAME(add_piece)(1, weights + h * PIECE, keys + j, count, width, value + h * padded, padded);
    }
}

/* What the runs left, one after the other -> out [H, K], lse [H] of heads [first, last). Changes the first run's. */
void NAME(join_runs)(float *left, long runs, long first, long last, long width, T *out, float *lse) {
    long padded = whole(width), heads = last - first, size = run_floats(heads, width);
    for (long h = 0; h < heads; h++) {
        float *value = left + h * padded, *total = left + heads * padded + h, *top = total + heads;
        for (long run = 1; run < runs; run++) {
            const float *other = value + run * size;
            float most = max_(*top, top[run * size]), mine = exp_(*top - most), others = exp_(top[run * size] - most);
            for (long i = 0; i < padded; i += VECTOR)
                store(value + i, VECTOR, load(value + i, VECTOR) * mine + load(other + i, VECTOR) * others);
            *total = *total * mine + total[run * size] * others;
            *top = most;
        }
        float r = 1.0f / *total;
        T *to = out + (first + h) * width;
        for (long i = 0; i < width; i += VECTOR) STORE(to + i, width - i, load(value + i, VECTOR) * r);
        lse[first + h] = logf(*total) + *top;
    }
}

/* Heads [first, last) of one query [H, K] over `n` keys, oldest first, each both key and value; sink [H] -> out [H, K],
 * lse [H]. `work` has room for attend_work(last - first, n, width) floats. */
void NAME(attend_query)(const T *q, const T *const *keys, long n, const float *sink, long first, long last, long width,
                        float scale, float *work, T *out, float *lse) {
    long runs = runs_of(n), heads = last - first;
    float *left = work + heads * PIECE;
    for (long run = 0; run < runs; run++)
        NAME(attend_run)(q, keys, n, run, sink, first, last, width, scale, work, left + run * run_floats(heads, width));
    NAME(join_runs)(left, runs, first, last, width, out, lse);
}

/* The keys of one query, oldest first: `count` of its window, then the entries it may use, from [from, to) or `picks`. */
INLINE long NAME(collect)(const T *window, long count, const T *entries, const int64_t *table, long page_rows, long width,
                          long from, long to, const int64_t *picks, long num_picks, const T **keys) {
    long n = 0;
    for (; n < count; n++) keys[n] = window + n * width;
    if (num_picks) {
        for (long i = 0; i < num_picks; i++)
            if (picks[i] >= from && picks[i] < to) keys[n++] = entries + entry_row(table, page_rows, picks[i]) * width;
    } else {
        for (long i = from; i < to; i++) keys[n++] = entries + entry_row(table, page_rows, i) * width;
    }
    return n;
}

/* q [B, T, H, K], kv [B, W-1+T, K], sink [H], positions [pos_rows, T]; entries, those of a row entry_stride behind those of
 * the row before (or in pages of `page_rows` named by table, for B = 1); visible range [start, end) per query ([vis_rows,
 * T]; start may be NULL, end too without entries), narrowed by ascending picks [B, T, num_picks] (-1: none)
 * -> out [B, T, H, K], lse [B, T, H]. */
void NAME(attend)(const T *q, const T *kv, const float *sink, const int64_t *positions, const T *entries,
                  const int64_t *table, const int64_t *start, const int64_t *end, const int64_t *picks, long batch,
                  long tokens, long heads, long width, long window, long num_entries, long entry_stride, long page_rows,
                  long pos_rows, long vis_rows, long num_picks, float scale, T *out, float *lse) {
    long most = window + (num_picks ? num_picks : num_entries);
    long parts = batch * tokens > 1 ? 1 : heads / 4 > 1 ? heads / 4 : 1; /* a single query is cut by its heads */
    long each = (heads + parts - 1) / parts;
#pragma omp parallel if (batch * tokens * heads * most * width > FORK_FROM)
    {
        const T **keys = malloc(sizeof(T *) * most);
        float *work = malloc(sizeof(float) * attend_work(each, most, width));
#pragma omp for schedule(static)
        for (long job = 0; job < batch * tokens * parts; job++) {
            long row = job / parts, b = row / tokens, t = row % tokens, at = (vis_rows == 1 ? 0 : b) * tokens + t;
            long first = job % parts * each, last = first + each < heads ? first + each : heads;
            long position = positions[(pos_rows == 1 ? 0 : b) * tokens + t];
            long count = position < window - 1 ? position + 1 : window, oldest = t + window - count;
            long n = NAME(collect)(kv + (b * (window - 1 + tokens) + oldest) * width, count,
                                   entries + b * entry_stride, table, page_rows, width, start ? start[at] : 0,
                                   end ? end[at] : num_entries, picks + row * num_picks, num_picks, keys);
            NAME(attend_query)(q + row * heads * width, keys, n, sink, first, last, width, scale, work,
                               out + row * heads * width, lse + row * heads);
        }
        free(keys), free(work);
    }
}
