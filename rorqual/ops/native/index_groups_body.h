/* Groups of index keys and the search by them (ops/index_groups.py); included twice by index_scan.c, once for each element
 * type, behind the scan. */

#ifndef ELEMENT_BF16
/* Cuts the n keys named by `order` in two halves, [lower, upper], along the channel in which they differ most. Each half
 * keeps the order of its keys, and of equal values the first ones go up. */
static void halve(const float *rows, long width, uint16_t *order, long n) {
    float sum[width], square[width], most = -1.0f;
    long widest = 0, up = 0, down = 0, room = n / 2;
    uint32_t value[SEGMENT], limit = 0;
    uint16_t upper[SEGMENT];
    memset(sum, 0, sizeof(sum)), memset(square, 0, sizeof(square));
    for (long i = 0; i < n; i++) {
        const float *x = rows + order[i] * width;
        for (long c = 0; c < width; c++) sum[c] += x[c], square[c] += x[c] * x[c];
    }
    for (long c = 0; c < width; c++) {
        float variance = square[c] - sum[c] * sum[c] / (float)n;
        if (variance > most) most = variance, widest = c;
    }
    for (long i = 0; i < n; i++) value[i] = order_of(rows[order[i] * width + widest]);
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        uint32_t least = limit | bit, count = 0;
        for (long i = 0; i < n; i++) count += value[i] >= least;
        if (count >= n / 2) limit = least;
    }
    for (long i = 0; i < n; i++) room -= value[i] > limit;
    for (long i = 0; i < n; i++) {
        int is_up = value[i] > limit || (value[i] == limit && room-- > 0);
        if (is_up) upper[up++] = order[i];
        else order[down++] = order[i];
    }
    memcpy(order + down, upper, sizeof(uint16_t) * up);
}

/* The keys of the chosen groups and those behind the segments, in ascending order. */
static long candidates(const Best *groups, const uint16_t *order, int64_t tail, int64_t end, int64_t *ids) {
    long n = 0, per_segment = SEGMENT / MEMBERS;
    for (long i = 0; i < groups->size;) {
        uint64_t chosen[SEGMENT / 64] = {0};
        int64_t segment = index_of(groups->list[i]) / per_segment;
        for (; i < groups->size && index_of(groups->list[i]) / per_segment == segment; i++) {
            const uint16_t *members = order + index_of(groups->list[i]) * MEMBERS;
            for (long m = 0; m < MEMBERS; m++) chosen[members[m] / 64] |= (uint64_t)1 << members[m] % 64;
        }
        for (long word = 0; word < SEGMENT / 64; word++)
            for (uint64_t left = chosen[word]; left; left &= left - 1)
                ids[n++] = segment * SEGMENT + word * 64 + __builtin_ctzll(left);
    }
    for (int64_t id = tail; id < end; id++) ids[n++] = id;
    return n;
}
#endif

/* Segments [first, last) of one sequence's keys (see index_scan) -> order [last][SEGMENT] uint16: of each segment the
 * places of its keys, group by group, ascending within a group; means [last][groups][bytes of a row]: packed FP4. */
void NAME(index_groups)(const T *keys, const uint8_t *packed, const int64_t *table, long width, long per_page, long first,
                        long last, uint8_t *order, uint8_t *means) {
    Scan s = NAME(scan_of)(keys, packed, table, 1, width, per_page);
    float *rows = malloc(sizeof(float) * SEGMENT * width), *mean = malloc(sizeof(float) * width + 64);
    for (long segment = first; segment < last; segment++) {
        uint16_t *mine = (uint16_t *)order + segment * SEGMENT;
        for (long i = 0; i < SEGMENT; i++) {
            int64_t run;
            const uint8_t *row = row_at(&s, segment * SEGMENT + i, &run);
            if (s.is_packed) decode_key(row, width, rows + i * width);
            else
                for (long c = 0; c < width; c++) rows[i * width + c] = GET((const T *)row, c);
            mine[i] = (uint16_t)i;
        }
        for (long size = SEGMENT; size > MEMBERS; size /= 2)
            for (long at = 0; at < SEGMENT; at += size) halve(rows, width, mine + at, size);
        for (long group = 0; group < SEGMENT / MEMBERS; group++) {
            memset(mean, 0, sizeof(float) * width);
            for (long m = 0; m < MEMBERS; m++)
                for (long c = 0; c < width; c++) mean[c] += rows[mine[group * MEMBERS + m] * width + c];
            for (long c = 0; c < width; c++) mean[c] /= (float)MEMBERS;
            encode_key(mean, width, means + (segment * (SEGMENT / MEMBERS) + group) * key_row_bytes(width));
        }
    }
    free(rows), free(mean);
}

/* The `budget` best groups of a query, by their means; the query is rounded to FP4 for it. */
static Best NAME(best_groups)(const Scan *s, const T *q, const float *weights, const uint8_t *means, int64_t groups,
                              long budget) {
    Scan by_means = NAME(scan_of)(NULL, means, NULL, s->heads, s->width, 1);
    T *rounded = malloc(sizeof(T) * s->heads * s->width);
    float *row = malloc(sizeof(float) * s->width + 64);
    uint8_t *codes = malloc(key_row_bytes(s->width) + 64);
    for (long j = 0; j < s->heads; j++) {
        for (long c = 0; c < s->width; c++) row[c] = GET(q, j * s->width + c);
        encode_key(row, s->width, codes);
        decode_key(codes, s->width, row);
        for (long c = 0; c < s->width; c++) PUT(rounded, j * s->width + c, row[c]);
    }
    Best best;
    NAME(scan_part)(&by_means, rounded, weights, NULL, &groups, 1, 0, groups, budget, &best);
    free(rounded), free(row), free(codes);
    return best;
}

/* Scores of the entries in `ids` [n] -> the best k of them, ascending. */
static void NAME(best_of_some)(const Scan *s, const T *q, const float *weights, const int64_t *ids, long n, long k,
                               int64_t *picks) {
    Query query;
    Keys keys;
    Best best = {.list = malloc(sizeof(uint64_t) * 2 * (n + 1)), .k = k, .threshold = -INFINITY};
    const uint8_t **row = malloc(sizeof(*row) * (n + TILE));
    best.scratch = best.list + n + 1;
    make_keys(s, &keys), make_query(s, &query);
    if (s->has_tiles) tiles_begin();
    NAME(read_query)(s, q, &query);
    NAME(weigh_heads)(s, weights, &query);
    for (long i = 0; i < n + TILE; i++) {
        int64_t run;
        row[i] = row_at(s, ids[i < n ? i : n - 1], &run);
    }
    for (long at = 0; at < n; at += TILE) {
        float score[TILE];
        Ahead ahead = {.bytes = s->row_bytes};
        int is_more = at + TILE < n;
        for (long r = 0; is_more && r < TILE; r++) ahead.row[r] = row[at + TILE + (at + TILE + r < n + TILE ? r : 0)];
        NAME(fill_rows)(s, row + at, query.kernel, &keys);
        score_tile(s, &query, weights, &keys, is_more ? &ahead : NULL, score);
        for (long r = 0; r < TILE && at + r < n; r++)
            if (!(score[r] <= -INFINITY)) best.list[best.size++] = rank_of(score[r], ids[at + r]);
    }
    if (s->has_tiles) tiles_end();
    keep_best(&best);
    for (long i = 0; i < k; i++) picks[i] = i < best.size ? index_of(best.list[i]) : -1;
    free(best.list), free(row), free_query(&query), free_keys(&keys);
}

/* As `index_scan`, for queries that see entries [0, end) of one sequence, ends ascending: those that see more groups than
 * `budget` score that many groups' keys, and the newest ones, in place of all. order and means: what `index_groups` made of
 * the segments that any of them needs. Every query is searched by itself, so its picks depend on nothing else. */
void NAME(index_search)(const T *q, const float *weights, const T *keys, const uint8_t *packed, const int64_t *table,
                        const uint8_t *order, const uint8_t *means, const int64_t *end, long queries, long heads, long width,
                        long per_page, long k, long budget, long threads, int64_t *picks) {
    const long per_segment = SEGMENT / MEMBERS;
    long plain = 0;
    while (plain < queries && grouped_segments(end[plain]) * per_segment <= budget) plain++;
    if (plain)
        NAME(index_scan)(q, weights, keys, packed, table, NULL, end, plain, heads, width, per_page, k, threads, picks);
    Scan s = NAME(scan_of)(keys, packed, table, heads, width, per_page);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && queries - plain > 1)
    for (long row = plain; row < queries; row++) {
        int64_t segments = grouped_segments(end[row]), tail = segments * SEGMENT;
        Best groups = NAME(best_groups)(&s, q + row * heads * width, weights + row * heads, means, segments * per_segment,
                                        budget);
        int64_t *ids = malloc(sizeof(int64_t) * (budget * MEMBERS + end[row] - tail + 1));
        long n = candidates(&groups, (const uint16_t *)order, tail, end[row], ids);
        NAME(best_of_some)(&s, q + row * heads * width, weights + row * heads, ids, n, k, picks + row * k);
        free(ids), free(groups.list);
    }
}
