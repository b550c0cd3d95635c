/* index_scan.py: index scores of one or more queries over all entries of one sequence, and the choice of the best, a tile
 * of keys at a time; no score is kept that cannot be among the best. */

#include <stdlib.h>

#include "index_groups.h"
#include "index_narrow.h"

#define QUERIES 32 /* that share a tile of keys */
#define MOST_SINGLE 24 /* keys of a tile that are scored one by one, not all at once */

enum Kernel { FLOATS, PAIRS, CODES };

/* ---- the best k so far: ranks that order by score, then by lower index; no two are equal ------------------------- */

typedef struct {
    uint64_t *list, *scratch; /* in ascending order of index */
    long size, capacity, k;
    float threshold; /* what a score must exceed: those at it came first */
} Best;

/* A NaN counts as the largest number: an entry that broke is attended to and shows, where it would otherwise vanish. */
INLINE uint64_t rank_of(float score, int64_t index) {
    uint32_t bits = bits_of(score == score ? score + 0.0f : INFINITY); /* -0 and 0 are equal */
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)index;
}
INLINE float score_of(uint64_t rank) {
    uint32_t bits = (uint32_t)(rank >> 32);
    return float_of(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}
INLINE int64_t index_of(uint64_t rank) { return (uint32_t)~(uint32_t)rank; }

/* Leaves the best k. The limit among the ranks' upper halves, the scores, is found bit by bit: counting is done in vectors,
 * where a selection by swaps would wait for mispredicted branches. Among equal scores the first ones stay. */
static void keep_best(Best *best) {
    if (best->size <= best->k) return;
    uint32_t *score = (uint32_t *)best->scratch, limit = 0;
    long size = best->size, kept = 0, room = best->k;
    for (long i = 0; i < size; i++) score[i] = (uint32_t)(best->list[i] >> 32);
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        uint32_t least = limit | bit, count = 0;
        for (long i = 0; i < size; i++) count += score[i] >= least;
        if (count >= best->k) limit = least;
        if (count == best->k) break; /* these are they */
    }
    for (long i = 0; i < size; i++) room -= score[i] > limit;
    for (long i = 0; i < size; i++) {
        int is_equal = score[i] == limit;
        best->list[kept] = best->list[i];
        kept += score[i] > limit || (is_equal && room > 0);
        room -= is_equal;
    }
    best->size = kept;
    best->threshold = score_of((uint64_t)limit << 32);
}

/* Which scores of entries `first` to `last` (not included) exceed the threshold, a bit each; `score` [TILE] begins with entry
 * `base`. */
INLINE uint64_t hits_of(const Best *best, const float *score, int64_t base, int64_t first, int64_t last) {
    uint64_t hits = 0;
    for (int v = 0; v < TILE_VECTORS; v++) {
#ifdef __AVX512F__
        __m512 threshold = _mm512_set1_ps(best->threshold);
        uint64_t found = _mm512_cmp_ps_mask((__m512)lanes_at(score + v * LANE_COUNT), threshold, _CMP_NLE_UQ);
#else
        uint64_t found = lanes_set(~(lanes_at(score + v * LANE_COUNT) <= best->threshold));
#endif
        hits |= found << v * LANE_COUNT;
    }
    return hits & ~(uint64_t)0 << (first - base) & (((uint64_t)1 << (last - base)) - 1); /* a tile is shorter than 64 */
}

/* The same entries' scores, for the list. */
INLINE void offer_some(Best *best, const float *score, int64_t base, uint64_t hits) {
    for (; hits; hits &= hits - 1) {
        long at = __builtin_ctzll(hits);
        if (score[at] <= best->threshold) continue; /* which rises on the way */
        best->list[best->size++] = rank_of(score[at], base + at);
        if (best->size == best->capacity) keep_best(best);
    }
}
INLINE void offer(Best *best, const float *score, int64_t base, int64_t first, int64_t last) {
    offer_some(best, score, base, hits_of(best, score, base, first, last));
}

/* ---- keys and queries ------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *base; /* rows, in pages if there is a table */
    const int64_t *table;
    long per_page, row_bytes, heads, width;
    int is_packed, has_tiles;
} Scan;

typedef struct {
    enum Kernel kernel;
    float *floats; /* [heads][width] */
    uint16_t *halves; /* for PAIRS: with rows of zeros up to a multiple of 16 */
    uint8_t *bytes; /* for CODES, with what follows */
    float *scale; /* with one group of channels, the heads' weights are in it */
    int32_t *offset;
    int is_bounded; /* for one group: many heads can only lower a score; the others, for an upper bound: */
    long raising;
    uint8_t *raising_bytes;
    float *raising_weights;
    int32_t *raising_offset;
    uint32_t *turned; /* bytes as narrow_score reads them */
} Query;

/* A tile of keys in the form of each kernel that asked for it. */
typedef struct {
    float *floats, *scales, *total; /* total: [TILE_HEADS][TILE], room for a block of heads */
    uint32_t *pairs, *codes;
    float *rows; /* [TILE][width]: keys that must be unpacked before they are turned */
    uint16_t *half_rows;
} Keys;

/* Where entry `at` lies, and how many rows stand there one behind the other. */
INLINE const uint8_t *row_at(const Scan *s, int64_t at, int64_t *run) {
    *run = INT64_MAX;
    if (s->table) {
        int64_t page = at / s->per_page, place = at - page * s->per_page;
        at = s->table[page] * s->per_page + place;
        *run = s->per_page - place;
    }
    return s->base + at * s->row_bytes;
}

/* Rows of a tile that begins with entry `first`; the last entry again where the tile is longer. */
INLINE void rows_from(const Scan *s, int64_t first, int64_t last, const uint8_t **row) {
    long n = last - first < TILE ? last - first : TILE, r = 0;
    while (r < n) {
        int64_t run;
        const uint8_t *base = row_at(s, first + r, &run);
        if (run > n - r) run = n - r;
        for (long i = 0; i < run; i++) row[r + i] = base + i * s->row_bytes;
        r += run;
    }
    for (; r < TILE; r++) row[r] = row[n - 1];
}

/* Rows that will be read next, fetched into the cache between the products of the tile at hand: without it a single
 * query waits for memory whenever a tile begins. */
typedef struct {
    const uint8_t *row[TILE];
    long bytes;
} Ahead;

INLINE void look_ahead(const Ahead *ahead, long from, long to) { /* in TILE rows, of which some may be left */
    for (long r = from; r < to; r++)
        for (long at = 0; at < ahead->bytes; at += 64) __builtin_prefetch(ahead->row[r] + at, 0, 2);
}

static void make_keys(const Scan *s, Keys *keys) {
    size_t cells = sizeof(float) * s->width * TILE;
    keys->floats = malloc(cells);
    keys->pairs = malloc(cells / 2);
    keys->codes = malloc(cells / 4 + 64);
    keys->scales = malloc(cells / GROUP + 64 * TILE);
    keys->total = malloc(sizeof(float) * TILE_HEADS * TILE);
    keys->rows = malloc(cells);
    keys->half_rows = malloc(cells / 2);
}
static void free_keys(Keys *keys) {
    free(keys->floats), free(keys->pairs), free(keys->codes), free(keys->scales), free(keys->rows), free(keys->half_rows);
    free(keys->total);
}
/* Room for one query, in one piece at `room` -> how many bytes it takes (only that where `room` is NULL). Zeros in `halves`. */
static size_t make_query(const Scan *s, Query *query, uint8_t *room) {
    size_t rows = (s->heads + 15) / 16 * 16, cells = rows * s->width, groups = rows * (s->width / GROUP + 1), used = 0;
#define PLACE_OF(field, bytes)                      \
    if (room) query->field = (void *)(room + used); \
    used += ((bytes) + 63) / 64 * 64;
    PLACE_OF(floats, sizeof(float) * cells)
    PLACE_OF(halves, sizeof(uint16_t) * cells)
    PLACE_OF(bytes, cells)
    PLACE_OF(turned, cells)
    PLACE_OF(raising_bytes, cells)
    PLACE_OF(raising_weights, sizeof(float) * rows)
    PLACE_OF(raising_offset, sizeof(int32_t) * rows)
    PLACE_OF(scale, sizeof(float) * groups)
    PLACE_OF(offset, sizeof(int32_t) * groups)
#undef PLACE_OF
    if (room) memset(query->halves, 0, sizeof(uint16_t) * cells);
    return used;
}

/* score [TILE] of the keys in `keys`; fetches the rows of `ahead`, if there are any, on the way. */
static void score_tile(const Scan *s, const Query *query, const float *weights, const Keys *keys, const Ahead *ahead,
                       float *score) {
    long heads = s->heads, width = s->width, j = 0, fetched = 0;
    memset(score, 0, sizeof(float) * TILE);
#define FETCH(done)                                         \
    if (ahead) {                                            \
        look_ahead(ahead, fetched, TILE * (done) / heads);  \
        fetched = TILE * (done) / heads;                    \
    }
#define EVERY_HEAD(run)                                  \
    for (; j + TILE_HEADS <= heads; j += TILE_HEADS) {   \
        FETCH(j + TILE_HEADS)                            \
        run(TILE_HEADS);                                 \
    }                                                    \
    for (; j < heads; j++) {                             \
        FETCH(j + 1)                                     \
        run(1);                                          \
    }
#ifdef HAS_MATRIX_TILES
    if (query->kernel == PAIRS && s->has_tiles) {
        FETCH(heads)
        tile_pairs(heads, query->halves, width, keys->pairs, weights, score);
        return;
    }
#endif
#ifdef HAS_BF16_PRODUCTS
    if (query->kernel == PAIRS) {
#define RUN(n) block_pairs(n, (const uint32_t *)query->halves + j * width / 2, width / 2, keys->pairs, weights + j, keys->total, score)
        EVERY_HEAD(RUN)
#undef RUN
        return;
    }
#endif
#ifdef HAS_CODE_PRODUCTS
#ifdef HAS_NARROW_CODES
    if (query->kernel == CODES && width == GROUP) {
        narrow_codes(heads, query->bytes, query->offset, query->scale, keys->codes, keys->scales, score);
        return;
    }
#endif
    if (query->kernel == CODES) {
        long groups = width / GROUP;
#define RUN(n)                                                                                                       \
    block_codes(n, query->bytes + j * width, query->scale + j * groups, query->offset + j * groups, width, keys->codes, \
                keys->scales, weights + j, keys->total, score)
        EVERY_HEAD(RUN)
#undef RUN
        return;
    }
#endif
#define RUN(n) block_floats(n, query->floats + j * width, width, keys->floats, weights + j, keys->total, score)
    EVERY_HEAD(RUN)
#undef RUN
}

#include "index_blocks.h"
#include "index_scan_body.h"
#include "index_groups_body.h"

#define ELEMENT_BF16
#include "index_scan_body.h"
#include "index_groups_body.h"
