/* Included twice by index_scan.c, once for each element type. */

#include "types.h"
#include "kernels.h"

/* Reads one query [heads, width] and decides which kernel scores it: from its own values alone, so that its scores do
 * not depend on other queries. */
static void NAME(read_query)(const Scan *s, const T *q, Query *query) {
    long size = s->heads * s->width;
#ifdef HAS_BF16_PRODUCTS
    if (PER_WORD == 2 && s->width % 2 == 0 && !s->is_packed) { /* both sides are bf16 numbers */
        query->kernel = PAIRS;
        memcpy(query->halves, q, sizeof(T) * size);
        return;
    }
#endif
    for (long i = 0; i < size; i++) query->floats[i] = GET(q, i);
    query->kernel = FLOATS;
    int is_exact = 0;
#ifdef HAS_CODE_PRODUCTS
    long groups = s->width / GROUP;
    if (s->is_packed && s->width % GROUP == 0) {
        is_exact = 1;
        for (long j = 0; j < s->heads && is_exact; j++)
            is_exact = query_codes(query->floats + j * s->width, s->width, query->bytes + j * s->width,
                                   query->scale + j * groups, query->offset + j * groups);
        if (is_exact) query->kernel = CODES;
    }
#endif
#ifdef HAS_BF16_PRODUCTS
    int is_half = PER_WORD == 2 && s->width % 2 == 0; /* both sides are bf16 numbers */
    if ((is_half && query->kernel == FLOATS) || (is_exact && s->has_tiles)) query->kernel = PAIRS;
#endif
    (void)is_exact;
    for (long i = 0; query->kernel == PAIRS && i < size; i++) query->halves[i] = to_bf16(query->floats[i]);
}

/* The TILE keys that `row` points to, in the form of `kernel`. */
static void NAME(fill_rows)(const Scan *s, const uint8_t *const *given, enum Kernel kernel, Keys *keys) {
    const uint8_t *row[TILE];
    long width = s->width;
    memcpy(row, given, sizeof(row));
#ifdef HAS_NARROW_CODES
    if (kernel == CODES && width == GROUP) {
        fill_narrow(NULL, row, keys->codes, keys->scales);
        return;
    }
#endif
#ifdef HAS_CODE_PRODUCTS
    if (kernel == CODES) {
        fill_codes(row, width, keys->codes, keys->scales);
        return;
    }
#endif
    if (PER_WORD == 2 && !s->is_packed && kernel == FLOATS && width % 2 == 0) {
        turn_halves(row, width, (uint32_t *)keys->floats);
        return;
    }
    for (long r = 0; r < TILE && (s->is_packed || PER_WORD == 2); r++) { /* rows that are not yet what is turned */
        float *floats = keys->rows + r * width;
        uint16_t *halves = keys->half_rows + r * width;
        if (s->is_packed) decode_key(row[r], width, floats);
        else if (kernel == FLOATS)
            for (long i = 0; i < width; i++) floats[i] = GET((const T *)row[r], i);
        else continue;
        for (long i = 0; kernel == PAIRS && i < width; i++) halves[i] = to_bf16(floats[i]);
        row[r] = kernel == PAIRS ? (const uint8_t *)halves : (const uint8_t *)floats;
    }
    if (kernel == PAIRS) turn_words(row, width / 2, keys->pairs);
    else turn_words(row, width, (uint32_t *)keys->floats);
}

/* Entries `first` and on (up to `last`; the last one again where the tile is longer) in the form of `kernel`. */
static void NAME(fill_keys)(const Scan *s, int64_t first, int64_t last, enum Kernel kernel, Keys *keys) {
    const uint8_t *row[TILE];
#ifdef HAS_NARROW_CODES
    if (kernel == CODES && s->width == GROUP) {
        int64_t run;
        const uint8_t *base = row_at(s, first, &run);
        if (run >= TILE && last - first >= TILE) {
            fill_narrow(base, NULL, keys->codes, keys->scales);
            return;
        }
    }
#endif
    rows_from(s, first, last, row);
    NAME(fill_rows)(s, row, kernel, keys);
}

INLINE Scan NAME(scan_of)(const T *keys, const uint8_t *packed, const int64_t *table, long heads, long width,
                          long per_page) {
    return (Scan){.base = packed ? packed : (const uint8_t *)keys, .table = table, .per_page = per_page,
                  .row_bytes = packed ? key_row_bytes(width) : (long)sizeof(T) * width, .heads = heads, .width = width,
                  .is_packed = packed != NULL, .has_tiles = width % GROUP == 0 && tiles_usable()};
}

/* The heads' weights, and whether an upper bound of the scores is cheaper than they are. */
static void NAME(weigh_heads)(const Scan *s, const float *weights, Query *query) {
    query->is_bounded = 0;
#ifdef HAS_NARROW_CODES
    if (query->kernel != CODES || s->width != GROUP) return;
    query->raising = 0;
    for (long j = 0; j < s->heads; j++) {
        query->scale[j] *= weights[j];
        if (weights[j] < 0.0f) continue;
        memcpy(query->raising_bytes + query->raising * GROUP, query->bytes + j * GROUP, GROUP);
        query->raising_weights[query->raising] = query->scale[j];
        query->raising_offset[query->raising++] = query->offset[j];
    }
    query->is_bounded = 5 * (s->heads - query->raising) > s->heads;
    if (query->is_bounded) turn_query(s->heads, query->bytes, query->turned);
#endif
    (void)s, (void)weights;
}

/* Every score: q [queries, heads, width], weights [queries, heads], keys [entries, width] or packed rows (the other NULL),
 * in pages of `per_page` rows if `table` names them -> scores [queries, entries]. */
void NAME(index_scan_scores)(const T *q, const float *weights, const T *keys, const uint8_t *packed, const int64_t *table,
                             long queries, long heads, long width, long per_page, long entries, float *scores) {
    Scan s = NAME(scan_of)(keys, packed, table, heads, width, per_page);
#pragma omp parallel
    {
        Keys tile;
        Query query;
        uint8_t *room = malloc(make_query(&s, &query, NULL));
        make_keys(&s, &tile), make_query(&s, &query, room);
        if (s.has_tiles) tiles_begin();
#pragma omp for schedule(static)
        for (long row = 0; row < queries; row++) {
            NAME(read_query)(&s, q + row * heads * width, &query);
            NAME(weigh_heads)(&s, weights + row * heads, &query);
            for (int64_t first = 0; first < entries; first += TILE) {
                float score[TILE];
                long n = entries - first < TILE ? entries - first : TILE;
                NAME(fill_keys)(&s, first, entries, query.kernel, &tile);
                score_tile(&s, &query, weights + row * heads, &tile, NULL, score);
                memcpy(scores + row * entries + first, score, sizeof(float) * n);
            }
        }
        if (s.has_tiles) tiles_end();
        free_keys(&tile), free(room);
    }
}

/* Offers the tile's entries whose bound exceeds the threshold; false, and nothing is done, where scoring the whole tile
 * is cheaper. */
static int NAME(offer_bounded)(const Scan *s, const Query *query, const Keys *keys, Best *best, int64_t base,
                               int64_t first, int64_t last) {
#ifdef HAS_NARROW_CODES
    float score[TILE];
    narrow_codes(query->raising, query->raising_bytes, query->raising_offset, query->raising_weights, keys->codes,
                 keys->scales, score);
    uint64_t hits = hits_of(best, score, base, first, last);
    if (__builtin_popcountll(hits) > MOST_SINGLE) return 0;
    for (uint64_t left = hits; left; left &= left - 1) {
        long at = __builtin_ctzll(left);
        score[at] = narrow_score(s->heads, query->turned, query->offset, query->scale, keys->codes, keys->scales, at);
    }
    offer_some(best, score, base, hits);
    return 1;
#else
    (void)s, (void)query, (void)keys, (void)best, (void)base, (void)first, (void)last;
    return 0;
#endif
}

/* The best of entries `lo` to `hi` for `count` queries that share their tiles: ranks in ascending order of index. All lists
 * are one piece, which begins with the first one's: to be freed. */
static void NAME(scan_part)(const Scan *s, const T *q, const float *weights, const int64_t *start, const int64_t *end,
                            long count, int64_t lo, int64_t hi, long k, Best *best) {
    Query query[QUERIES];
    Keys keys;
    int all_bounded = 1; /* then a tile is read without waiting */
    long capacity = 2 * k + 4 * TILE;
    size_t size = make_query(s, query, NULL);
    float *scores = malloc(sizeof(float) * count * BLOCK_KEYS);
    uint8_t *room = malloc(size * count);
    uint64_t *lists = malloc(sizeof(uint64_t) * capacity * count), *scratch = malloc(sizeof(uint64_t) * capacity);
    make_keys(s, &keys);
    if (s->has_tiles) tiles_begin();
    for (long i = 0; i < count; i++) {
        make_query(s, query + i, room + i * size);
        NAME(read_query)(s, q + i * s->heads * s->width, query + i);
        NAME(weigh_heads)(s, weights + i * s->heads, query + i);
        all_bounded &= query[i].is_bounded;
        best[i] = (Best){.list = lists + i * capacity, .scratch = scratch, .capacity = capacity, .k = k,
                         .threshold = -INFINITY};
    }
    for (int64_t first = lo; first < hi; first += TILE) {
        int64_t last = first + TILE < hi ? first + TILE : hi;
        int is_filled[3] = {0};
        long tile = (first - lo) / TILE % BLOCK_TILES;
        Ahead next, *ahead = last < hi && !all_bounded ? &next : NULL;
        if (ahead) next.bytes = s->row_bytes, rows_from(s, last, hi, next.row);
        for (long i = 0; i < count; i++) {
            int64_t from = start && start[i] > first ? start[i] : first, to = end[i] < last ? end[i] : last;
            if (to <= from || end[i] - (start ? start[i] : 0) <= k) continue;
            float *score = scores + i * BLOCK_KEYS + tile * TILE;
            if (!is_filled[query[i].kernel]) NAME(fill_keys)(s, first, last, query[i].kernel, &keys);
            is_filled[query[i].kernel] = 1;
            if (query[i].is_bounded && NAME(offer_bounded)(s, query + i, &keys, best + i, first, from, to))
                continue;
            score_tile(s, query + i, weights + i * s->heads, &keys, ahead, score);
            ahead = NULL;
            if (query[i].kernel == CODES) offer(best + i, score, first, from, to);
        }
        int64_t base = first - tile * TILE;
        for (long i = 0; i < count && (tile + 1 == BLOCK_TILES || last == hi); i++) {
            int64_t from = start && start[i] > base ? start[i] : base, to = end[i] < last ? end[i] : last;
            if (query[i].kernel != CODES && to > from && end[i] - (start ? start[i] : 0) > k)
                offer_block(best + i, scores + i * BLOCK_KEYS, base, from, to);
        }
    }
    for (long i = 0; i < count; i++) keep_best(best + i);
    free(scores), free(room), free(scratch);
    if (s->has_tiles) tiles_end();
    free_keys(&keys);
}

/* Visible range [start, end) per query (start may be NULL: 0) -> picks [queries, k]: the best k, ascending, lowest index
 * first among equals, -1 for an empty place. A query that sees no more than k entries gets them all, unscored. Other
 * arguments as above. Work is cut into ranges of keys for `threads` threads when there are few queries; the ranks make
 * the choice the same however it is cut. */
void NAME(index_scan)(const T *q, const float *weights, const T *keys, const uint8_t *packed, const int64_t *table,
                      const int64_t *start, const int64_t *end, long queries, long heads, long width, long per_page, long k,
                      long threads, int64_t *picks) {
    Scan s = NAME(scan_of)(keys, packed, table, heads, width, per_page);
    long groups = (queries + QUERIES - 1) / QUERIES, parts = groups >= threads ? 1 : (2 * threads + groups - 1) / groups;
    Best *best = calloc(groups * parts * QUERIES, sizeof(Best));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long item = 0; item < groups * parts; item++) {
        long first = item / parts * QUERIES, count = queries - first < QUERIES ? queries - first : QUERIES;
        int64_t lo = INT64_MAX, hi = 0;
        for (long i = first; i < first + count; i++) {
            int64_t from = start ? start[i] : 0;
            if (end[i] - from <= k) continue;
            lo = from < lo ? from : lo;
            hi = end[i] > hi ? end[i] : hi;
        }
        if (lo >= hi) continue;
        int64_t each = ((hi - lo + parts - 1) / parts + TILE - 1) / TILE * TILE, at = lo + item % parts * each;
        int64_t stop = at + each < hi ? at + each : hi;
        NAME(scan_part)(&s, q + first * heads * width, weights + first * heads, start ? start + first : NULL, end + first,
                        count, at, stop > at ? stop : at, k, best + item * QUERIES);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < queries; row++) {
        int64_t from = start ? start[row] : 0, n = end[row] - from, *mine = picks + row * k;
        long count = 0;
        if (n <= k) {
            for (; count < n; count++) mine[count] = from + count;
        } else {
            Best *one = best + row / QUERIES * parts * QUERIES + row % QUERIES, all = {.k = k};
            if (parts > 1) all.list = malloc(sizeof(uint64_t) * 2 * parts * k), all.scratch = all.list + parts * k;
            for (long part = 0; part < parts && parts > 1; part++) {
                memcpy(all.list + all.size, one[part * QUERIES].list, sizeof(uint64_t) * one[part * QUERIES].size);
                all.size += one[part * QUERIES].size;
            }
            if (parts > 1) keep_best(&all), one = &all;
            for (; count < one->size; count++) mine[count] = index_of(one->list[count]);
            free(all.list);
        }
        for (; count < k; count++) mine[count] = -1;
    }
    for (long i = 0; i < groups * parts; i++) free(best[i * QUERIES].list);
    free(best);
}
