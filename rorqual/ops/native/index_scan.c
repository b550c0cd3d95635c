/* index_scan.py: index scores of one or more queries over all entries of one sequence, and the choice of the best, a tile
 * of keys at a time; no score is kept that cannot be among the best. */

#include <stdlib.h>

#include "index_narrow.h"
#include "select.h"

#define QUERIES 8 /* that share a tile of keys */

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

static void keep_best(Best *best) {
    if (best->size <= best->k) return;
    memcpy(best->scratch, best->list, sizeof(uint64_t) * best->size);
    uint64_t limit = kth_rank(best->scratch, best->size, best->k);
    long kept = 0;
    for (long i = 0; i < best->size; i++)
        if (best->list[i] >= limit) best->list[kept++] = best->list[i];
    best->size = kept;
    best->threshold = score_of(limit);
}

/* Whether any score of entries `first` to `last` (not included) exceeds the threshold; `score` begins with entry `base`. */
INLINE int any_exceeds(const Best *best, const float *score, int64_t base, int64_t first, int64_t last) {
    int any = 0;
    for (int64_t i = first - base; i < last - base; i++) any |= !(score[i] <= best->threshold);
    return any;
}

/* The same entries' scores, for the list. */
INLINE void offer(Best *best, const float *score, int64_t base, int64_t first, int64_t last) {
    if (!any_exceeds(best, score, base, first, last)) return;
    for (int64_t i = first; i < last; i++) {
        if (score[i - base] <= best->threshold) continue;
        best->list[best->size++] = rank_of(score[i - base], i);
        if (best->size == best->capacity) keep_best(best);
    }
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
    float *scale;
    int32_t *offset;
    int is_bounded; /* for CODES: some heads can only lower a score */
} Query;

/* A tile of keys in the form of each kernel that asked for it. */
typedef struct {
    float *floats, *scales, *total; /* total: [TILE_HEADS][TILE], room for a block of heads */
    uint32_t *pairs, *codes;
    float *rows; /* [TILE][width]: keys that must be unpacked before they are turned */
    uint16_t *half_rows;
} Keys;

/* Rows of a tile that begins with entry `first`; the last entry again where the tile is longer. */
INLINE void rows_from(const Scan *s, int64_t first, int64_t last, const uint8_t **row) {
    long n = last - first < TILE ? last - first : TILE, r = 0;
    while (r < n) {
        int64_t at = first + r, run = n - r;
        if (s->table) {
            int64_t page = at / s->per_page, place = at - page * s->per_page;
            at = s->table[page] * s->per_page + place;
            if (run > s->per_page - place) run = s->per_page - place;
        }
        const uint8_t *base = s->base + at * s->row_bytes;
        for (long i = 0; i < run; i++) row[r + i] = base + i * s->row_bytes;
        r += run;
    }
    for (; r < TILE; r++) row[r] = row[n - 1];
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
static void make_query(const Scan *s, Query *query) {
    long rows = (s->heads + 15) / 16 * 16;
    query->floats = malloc(sizeof(float) * rows * s->width);
    query->halves = calloc(rows * s->width, sizeof(uint16_t));
    query->bytes = malloc(rows * s->width);
    query->scale = malloc(sizeof(float) * rows * (s->width / GROUP + 1));
    query->offset = malloc(sizeof(int32_t) * rows * (s->width / GROUP + 1));
}
static void free_query(Query *query) {
    free(query->floats), free(query->halves), free(query->bytes), free(query->scale), free(query->offset);
}

/* score [TILE] of the keys in `keys`. */
static void score_tile(const Scan *s, const Query *query, const float *weights, const Keys *keys, float *score) {
    long heads = s->heads, width = s->width, j = 0;
    memset(score, 0, sizeof(float) * TILE);
#define EVERY_HEAD(run)                                                  \
    for (; j + TILE_HEADS <= heads; j += TILE_HEADS) run(TILE_HEADS);    \
    for (; j < heads; j++) run(1);
#ifdef HAS_MATRIX_TILES
    if (query->kernel == PAIRS && s->has_tiles) {
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
        narrow_codes(heads, 0, query->bytes, query->scale, query->offset, keys->codes, keys->scales, weights, score);
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

#include "index_scan_body.h"

#define ELEMENT_BF16
#include "index_scan_body.h"
