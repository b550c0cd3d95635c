/* Included twice by attention.c, once for each element type. */

#include "gemm.h"

typedef struct {
    const T *q, *kv, *entries;
    const float *sink;
    const int64_t *positions, *start, *end, *picks;
    long batch, tokens, heads, width, window, num_entries, pos_rows, vis_rows, num_picks;
    float scale;
} NAME(Problem);

/* What a thread works in: the keys of a tile one after the other, who may see them, and the tile's operands. */
typedef struct {
    T *keys, *pairs;                     /* [n][K]; P or dS by key, [n][ROWS] */
    WORD *queries, *columns, *weights;   /* q of the tile [K][ROWS]; keys [n][K]; P or dS [n][ROWS], contraction over n */
    WORD *more, *query_columns;          /* dO [K][ROWS]; q or dO, contraction over the rows [ROWS][K] */
    float *scores, *upstream, *rows;     /* [n][ROWS], [n][ROWS], [max(n, ROWS)][K] */
    uint32_t *seen;                      /* bit l of seen[j]: row l of the tile may see key j */
    int32_t *slot;                       /* entry -> its place among the keys, -1 for none */
    int64_t *entry;                      /* place - window_count -> entry */
    long n, window_first, window_count, num_chosen;
} NAME(Scratch);

static long NAME(most_keys)(const NAME(Problem) * p) {
    long tile = ROWS / p->heads + 2, chosen = p->num_picks ? tile * p->num_picks : p->num_entries;
    return p->window + tile + (chosen < p->num_entries ? chosen : p->num_entries) + 2;
}

static NAME(Scratch) NAME(make_scratch)(const NAME(Problem) * p, int backward) {
    NAME(Scratch) s = {0};
    long n = NAME(most_keys)(p), k = p->width, most = n > ROWS ? n : ROWS;
    s.keys = malloc(sizeof(T) * n * k);
    s.queries = malloc(sizeof(WORD) * k * ROWS);
    s.columns = malloc(sizeof(WORD) * n * k);
    s.weights = malloc(sizeof(WORD) * n * ROWS);
    s.scores = malloc(sizeof(float) * n * ROWS);
    s.rows = malloc(sizeof(float) * most * k);
    s.seen = malloc(sizeof(uint32_t) * n);
    s.slot = malloc(sizeof(int32_t) * (p->num_entries + 1));
    s.entry = malloc(sizeof(int64_t) * n);
    for (long i = 0; i < p->num_entries; i++) s.slot[i] = -1;
    if (backward) {
        s.pairs = malloc(sizeof(T) * n * ROWS);
        s.more = malloc(sizeof(WORD) * k * ROWS);
        s.query_columns = malloc(sizeof(WORD) * k * ROWS);
        s.upstream = malloc(sizeof(float) * n * ROWS);
    }
    return s;
}

static void NAME(free_scratch)(NAME(Scratch) * s) {
    void *all[] = {s->keys, s->pairs, s->queries, s->columns, s->weights, s->more, s->query_columns, s->scores,
                   s->upstream, s->rows, s->seen, s->slot, s->entry};
    for (unsigned i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

/* Every key some row of the tile may see, copied next to each other; an odd one out gets an unseen zero beside it. */
static void NAME(gather)(const NAME(Problem) * p, long b, long first, long count, NAME(Scratch) * s) {
    long h = p->heads, k = p->width, w = p->window, t0 = first / h, t1 = (first + count - 1) / h, n = 0;
    const T *kv = p->kv + b * (w - 1 + p->tokens) * k, *entries = p->entries + b * p->num_entries * k;
    const int64_t *positions = p->positions + (p->pos_rows == 1 ? 0 : b) * p->tokens;
    long visible = (p->vis_rows == 1 ? 0 : b) * p->tokens, low = t1 + w - 1;
    for (long t = t0; t <= t1; t++) {
        long from = t + w - 1 - (positions[t] < w - 1 ? positions[t] : w - 1);
        if (from < low) low = from;
    }
    s->window_first = low;
    s->window_count = n = t1 + w - low;
    memcpy(s->keys, kv + low * k, sizeof(T) * n * k);
    memset(s->seen, 0, sizeof(uint32_t) * n);
    s->num_chosen = 0;
    long e0 = 0, e1 = 0;
    if (p->end && !p->num_picks) {
        e0 = p->num_entries;
        for (long t = t0; t <= t1; t++) {
            long from = p->start ? p->start[visible + t] : 0, to = p->end[visible + t];
            if (from < to && from < e0) e0 = from;
            if (from < to && to > e1) e1 = to;
        }
        if (e0 < e1) {
            memcpy(s->keys + n * k, entries + e0 * k, sizeof(T) * (e1 - e0) * k);
            memset(s->seen + n, 0, sizeof(uint32_t) * (e1 - e0));
            for (long e = e0; e < e1; e++) s->entry[e - e0] = e;
            s->num_chosen = e1 - e0;
        }
    }
    for (long t = t0; t <= t1; t++) {
        long l0 = t * h - first, l1 = l0 + h;
        l0 = l0 < 0 ? 0 : l0;
        l1 = l1 > count ? count : l1;
        uint32_t lanes = (uint32_t)((((uint64_t)1 << l1) - 1) & ~(((uint64_t)1 << l0) - 1));
        long from = t + w - 1 - (positions[t] < w - 1 ? positions[t] : w - 1);
        for (long j = from; j <= t + w - 1; j++) s->seen[j - low] |= lanes;
        if (p->num_picks) {
            const int64_t *picks = p->picks + (b * p->tokens + t) * p->num_picks;
            for (long i = 0; i < p->num_picks; i++) {
                if (picks[i] < 0 || (p->end && picks[i] >= p->end[visible + t])) continue;
                if (p->start && picks[i] < p->start[visible + t]) continue;
                int32_t at = s->slot[picks[i]];
                if (at < 0) {
                    at = s->slot[picks[i]] = (int32_t)(n + s->num_chosen);
                    s->entry[s->num_chosen++] = picks[i];
                    s->seen[at] = 0;
                    memcpy(s->keys + at * k, entries + picks[i] * k, sizeof(T) * k);
                }
                s->seen[at] |= lanes;
            }
        } else if (p->end) {
            long from_e = p->start ? p->start[visible + t] : 0, to = p->end[visible + t];
            for (long e = from_e; e < to; e++) s->seen[n + e - e0] |= lanes;
        }
    }
    if (p->num_picks)
        for (long i = 0; i < s->num_chosen; i++) s->slot[s->entry[i]] = -1;
    n += s->num_chosen;
    if (n % 2) {
        memset(s->keys + n * k, 0, sizeof(T) * k);
        s->seen[n++] = 0;
    }
    s->n = n;
}

/* [n][ROWS] fp32 -> words that pair two keys of one row. */
static void NAME(pair_keys)(const float *x, long n, WORD *out) { NAME(pack_columns_float)(x, n, ROWS, out); }

static void NAME(score)(const NAME(Problem) * p, NAME(Scratch) * s, const WORD *rows, float *out) {
    long words = p->width / PER_WORD;
    NAME(gemm)(s->n, ROWS, words, (const WORD *)s->keys, NULL, words, 1, rows, ROWS, out, ROWS, 0);
}

static const WORD *NAME(key_columns)(const NAME(Problem) * p, NAME(Scratch) * s) {
    if (PER_WORD == 1) return (const WORD *)s->keys;
    NAME(pack_columns)(s->keys, NULL, p->width, s->n, p->width, s->columns);
    return s->columns;
}

static void NAME(forward_tile)(const NAME(Problem) * p, NAME(Scratch) * s, long b, long first, long count, T *out,
                               float *lse) {
    long h = p->heads, k = p->width, row = b * p->tokens * h + first;
    float top[ROWS], total[ROWS];
    NAME(gather)(p, b, first, count, s);
    NAME(pack_rows)(p->q + row * k, k, count, k, ROWS, s->queries);
    NAME(score)(p, s, s->queries, s->scores);
    EACH_ROW top[l] = p->sink[(first + l) % h];
    for (int part = 0; part < ROWS; part += VECTOR) {
        Vector most = load(top + part, VECTOR), sum, none = {0};
        for (long j = 0; j < s->n; j++) {
            Vector x = choose(seeing(s->seen[j] >> part), load(s->scores + j * ROWS + part, VECTOR) * p->scale,
                              none - INFINITY);
            store(s->scores + j * ROWS + part, VECTOR, x);
            most = choose(most < x, x, most);
        }
        sum = exp_lanes(load(top + part, VECTOR) - most);
        for (long j = 0; j < s->n; j++) {
            Vector x = exp_lanes(load(s->scores + j * ROWS + part, VECTOR) - most);
            x = choose(seeing(s->seen[j] >> part), x, none);
            store(s->scores + j * ROWS + part, VECTOR, x);
            sum += x;
        }
        store(top + part, VECTOR, most);
        store(total + part, VECTOR, sum);
    }
    const WORD *weights = (const WORD *)s->scores;
    if (PER_WORD == 2) {
        NAME(pair_keys)(s->scores, s->n, s->weights);
        weights = s->weights;
    }
    NAME(gemm)(count, k, s->n / PER_WORD, weights, NULL, 1, ROWS, NAME(key_columns)(p, s), k, s->rows, k, 0);
    for (long l = 0; l < count; l++) {
        float r = 1.0f / total[l];
        T *restrict o = out + (row + l) * k;
        const float *restrict x = s->rows + l * k;
        for (long i = 0; i < k; i += VECTOR) STORE(o + i, VECTOR, load(x + i, VECTOR) * r);
        lse[row + l] = logf(total[l]) + top[l];
    }
}

/* q [B, T, H, K], kv [B, W-1+T, K], sink [H], positions [pos_rows, T], entries [B, C, K]; visible range [start, end) per
 * query ([vis_rows, T]; start may be NULL, end too when there are picks or no entries), or picks [B, T, num_picks]
 * (-1: none) -> out [B, T, H, K], lse [B, T, H]. K is a multiple of 16. */
void NAME(attention_forward)(const T *q, const T *kv, const float *sink, const int64_t *positions, const T *entries,
                             const int64_t *start, const int64_t *end, const int64_t *picks, long batch, long tokens,
                             long heads, long width, long window, long num_entries, long pos_rows, long vis_rows,
                             long num_picks, float scale, T *out, float *lse) {
    NAME(Problem) p = {q, kv, entries, sink, positions, start, end, picks, batch, tokens, heads, width, window,
                       num_entries, pos_rows, vis_rows, num_picks, scale};
    long per_row = tokens * heads, tiles = (per_row + ROWS - 1) / ROWS;
#pragma omp parallel
    {
        NAME(Scratch) s = NAME(make_scratch)(&p, 0);
#pragma omp for schedule(static)
        for (long i = 0; i < batch * tiles; i++) {
            long first = i % tiles * ROWS, count = per_row - first < ROWS ? per_row - first : ROWS;
            NAME(forward_tile)(&p, &s, i / tiles, first, count, out, lse);
        }
        NAME(free_scratch)(&s);
    }
}

static void NAME(backward_tile)(const NAME(Problem) * p, NAME(Scratch) * s, long b, long first, long count, const T *out,
                                const float *lse, const T *dout, T *dq, float *delta, float *dkv, float *dentries) {
    long h = p->heads, k = p->width, row = b * p->tokens * h + first, half = ROWS / PER_WORD;
    float norm[ROWS], d[ROWS];
    NAME(gather)(p, b, first, count, s);
    NAME(pack_rows)(p->q + row * k, k, count, k, ROWS, s->queries);
    NAME(pack_rows)(dout + row * k, k, count, k, ROWS, s->more);
    EACH_ROW norm[l] = l < count ? lse[row + l] : 0.0f;
    for (long l = 0; l < ROWS; l++) {
        Vector sum = {0};
        const T *restrict g = dout + (row + l) * k, *restrict o = out + (row + l) * k;
        if (l < count) {
            for (long i = 0; i < k; i += VECTOR) sum += LOAD(g + i, VECTOR) * LOAD(o + i, VECTOR);
            delta[row + l] = sum_lanes(sum);
        }
        d[l] = l < count ? delta[row + l] : 0.0f;
    }
    NAME(score)(p, s, s->queries, s->scores);
    NAME(score)(p, s, s->more, s->upstream);
    for (long j = 0; j < s->n; j++) {
        for (int part = 0; part < ROWS; part += VECTOR) {
            long at = j * ROWS + part;
            Vector none = {0}, g = load(s->upstream + at, VECTOR);
            Vector w = exp_lanes(load(s->scores + at, VECTOR) * p->scale - load(norm + part, VECTOR));
            w = choose(seeing(s->seen[j] >> part), w, none);
            STORE(s->pairs + at, VECTOR, w);
            store(s->upstream + at, VECTOR, w * (g - load(d + part, VECTOR)) * p->scale);
        }
    }
    /* dK = P^T dO + dS^T q */
    NAME(pack_columns)(dout + row * k, NULL, k, count, k, s->query_columns);
    long steps = (count + PER_WORD - 1) / PER_WORD;
    NAME(gemm)(s->n, k, steps, (const WORD *)s->pairs, NULL, half, 1, s->query_columns, k, s->rows, k, 0);
    for (long i = 0; i < s->n * ROWS; i += VECTOR) STORE(s->pairs + i, VECTOR, load(s->upstream + i, VECTOR));
    NAME(pack_columns)(p->q + row * k, NULL, k, count, k, s->query_columns);
    NAME(gemm)(s->n, k, steps, (const WORD *)s->pairs, NULL, half, 1, s->query_columns, k, s->rows, k, 1);
    for (long i = 0; i < s->window_count * k; i++) dkv[s->window_first * k + i] += s->rows[i];
    for (long j = 0; j < s->num_chosen; j++) {
        float *restrict to = dentries + s->entry[j] * k;
        const float *restrict from = s->rows + (s->window_count + j) * k;
        for (long i = 0; i < k; i++) to[i] += from[i];
    }
    /* dq = dS K */
    const WORD *weights = (const WORD *)s->upstream;
    if (PER_WORD == 2) {
        NAME(pair_keys)(s->upstream, s->n, s->weights);
        weights = s->weights;
    }
    NAME(gemm)(count, k, s->n / PER_WORD, weights, NULL, 1, ROWS, NAME(key_columns)(p, s), k, s->rows, k, 0);
    for (long i = 0; i < count * k; i += VECTOR) STORE(dq + row * k + i, VECTOR, load(s->rows + i, VECTOR));
}

/* Gradients; delta [B, T, H] is the sum of dout x out, from which the sink's follows. The tiles of a row are dealt out in
 * `parts` runs, each with its own zeroed dkv [parts, B, W-1+T, K] and dentries [parts, B, C, K] (fp32), which the caller
 * adds up. */
void NAME(attention_backward)(const T *q, const T *kv, const float *sink, const int64_t *positions, const T *entries,
                              const int64_t *start, const int64_t *end, const int64_t *picks, long batch, long tokens,
                              long heads, long width, long window, long num_entries, long pos_rows, long vis_rows,
                              long num_picks, float scale, const T *out, const float *lse, const T *dout, long parts,
                              T *dq, float *delta, float *dkv, float *dentries) {
    NAME(Problem) p = {q, kv, entries, sink, positions, start, end, picks, batch, tokens, heads, width, window,
                       num_entries, pos_rows, vis_rows, num_picks, scale};
    long per_row = tokens * heads, tiles = (per_row + ROWS - 1) / ROWS, each = (tiles + parts - 1) / parts;
#pragma omp parallel
    {
        NAME(Scratch) s = NAME(make_scratch)(&p, 1);
#pragma omp for schedule(static)
        for (long i = 0; i < parts * batch; i++) {
            long part = i / batch, b = i % batch, last = (part + 1) * each < tiles ? (part + 1) * each : tiles;
            float *dk = dkv + i * (window - 1 + tokens) * width, *de = dentries + i * num_entries * width;
            for (long tile = part * each; tile < last; tile++) {
                long first = tile * ROWS, count = per_row - first < ROWS ? per_row - first : ROWS;
                NAME(backward_tile)(&p, &s, b, first, count, out, lse, dout, dq, delta, dk, de);
            }
        }
        NAME(free_scratch)(&s);
    }
}
