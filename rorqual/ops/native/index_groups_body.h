/* Groups of index keys and the search by them (ops/index_groups.py); included twice by index_scan.c, once for each element
 * type, behind the scan. */

#ifndef ELEMENT_BF16
#define WAYS 6 /* steps towards the direction of largest spread */
#define PARTS (MEMBERS / FINE)
#define SIXTEEN (ABREAST / VECTOR) /* vectors of ABREAST lanes */
#define SIDE (8 / SIXTEEN < 1 ? 1 : 8 / SIXTEEN) /* heads that are scored at once: as many as hide the time of a product */
#define FETCHED 8 /* groups or parts ahead, whose places in memory nothing foretells */
#define COARSE_BIT (1u << 20) /* up to it, limits are sought among all scores */
#define RADIUS 0.3f /* of a group's radius: what its best keys may lie nearer to a query than its mean */

/* The direction in which the rows x [n][wide], whose mean is zero, spread most: by repeated products with their covariance,
 * begun along the channel of largest spread -> along [wide]. */
static void widest_direction(const float *x, long n, long wide, float *along) {
    float next[wide];
    memset(next, 0, sizeof(next));
    for (long i = 0; i < n; i++)
        for (long c = 0; c < wide; c++) next[c] += x[i * wide + c] * x[i * wide + c];
    long widest = 0;
    for (long c = 1; c < wide; c++) widest = next[c] > next[widest] ? c : widest;
    for (long c = 0; c < wide; c++) along[c] = c == widest;
    for (int way = 0; way < WAYS; way++) {
        memset(next, 0, sizeof(next));
        for (long i = 0; i < n; i++) {
            const float *row = x + i * wide;
            Vector sum = {0};
            for (long c = 0; c < wide; c += VECTOR) sum += load(row + c, VECTOR) * load(along + c, VECTOR);
            float dot = sum_lanes(sum);
            for (long c = 0; c < wide; c += VECTOR)
                store(next + c, VECTOR, load(next + c, VECTOR) + dot * load(row + c, VECTOR));
        }
        float most = 0.0f;
        for (long c = 0; c < wide; c++) most = fabsf(next[c]) > most ? fabsf(next[c]) : most;
        for (long c = 0; c < wide && most > 0.0f; c++) along[c] = next[c] / most;
    }
}

/* Cuts the n keys named by `order` (rows [SEGMENT][wide]) in two halves, [lower, upper], along the direction in which they
 * spread most. Each half keeps the order of its keys, and of equal values the first ones go up. `x` has room for n rows. */
static void halve(const float *rows, long wide, uint16_t *order, long n, float *x) {
    float mean[wide], along[wide];
    long up = 0, down = 0, room = n / 2;
    uint32_t value[SEGMENT], limit = 0;
    uint16_t upper[SEGMENT];
    memset(mean, 0, sizeof(mean));
    for (long i = 0; i < n; i++)
        for (long c = 0; c < wide; c++) mean[c] += rows[order[i] * wide + c];
    for (long i = 0; i < n; i++)
        for (long c = 0; c < wide; c++) x[i * wide + c] = rows[order[i] * wide + c] - mean[c] / (float)n;
    widest_direction(x, n, wide, along);
    for (long i = 0; i < n; i++) {
        Vector sum = {0};
        for (long c = 0; c < wide; c += VECTOR) sum += load(x + i * wide + c, VECTOR) * load(along + c, VECTOR);
        value[i] = order_of(sum_lanes(sum));
    }
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

/* The largest whole number that stands for a channel. */
static float most_code(long width) { return width <= 128 ? MOST_CODE : floorf(sqrtf(2147483647.0f / (float)width) - 1.0f); }

/* x [width] as whole numbers up to `most` -> codes, `apart` pairs of channels apart (a last one alone has 0 beside it), and
 * what one is worth. What is no number or infinite has 0 everywhere, worth NaN. */
static float write_codes(const float *x, long width, float most, int16_t *codes, long apart) {
    float amax = 0.0f;
    int is_finite = 1;
    for (long c = 0; c < width; c++) {
        is_finite &= fabsf(x[c]) < INFINITY;
        amax = max_(amax, fabsf(x[c]));
    }
    float per_one = is_finite && amax > 1e-30f ? most / amax : 0.0f;
    for (long c = 0; c < width || c % 2; c++)
        codes[c / 2 * 2 * apart + c % 2] = c < width && is_finite ? (int16_t)rintf(x[c] * per_one) : 0;
    return is_finite ? amax / most : NAN;
}

/* The mean of the n keys named by `members`, and what counts of their radius, to lane `lane` of rows of `lanes` lanes of 32
 * bits: pairs of channels, what one of the mean's whole numbers is worth, and the radius. `mean` has room for `width`. */
static void write_mean(const float *rows, long wide, long width, const uint16_t *members, long n, float *mean, uint32_t *out,
                       long lanes, long lane) {
    float radius = 0.0f;
    for (long c = 0; c < width; c++) {
        float sum = 0.0f;
        for (long m = 0; m < n; m++) sum += rows[members[m] * wide + c];
        mean[c] = sum / (float)n;
        for (long m = 0; m < n; m++) {
            float far = rows[members[m] * wide + c] - mean[c];
            radius += far * far;
        }
    }
    long pairs = (width + 1) / 2;
    out[pairs * lanes + lane] = bits_of(write_codes(mean, width, most_code(width), (int16_t *)(out + lane), lanes));
    out[(pairs + 1) * lanes + lane] = bits_of(RADIUS * sqrtf(radius / (float)n));
}

/* A query as groups are scored with it. */
typedef struct {
    int32_t *codes; /* [pairs][heads]: pairs of channels as whole numbers */
    float *length, *weights; /* [heads]: in the head's whole numbers, and with what one is worth */
    long heads, pairs; /* heads: with copies of the last one up to a multiple of SIDE, whose weights are 0 */
} Coarse;

static void make_coarse(const float *q, const float *weights, long heads, long width, Coarse *coarse) {
    long all = (heads + SIDE - 1) / SIDE * SIDE, pairs = (width + 1) / 2;
    *coarse = (Coarse){malloc(sizeof(int32_t) * all * (pairs + 2)), NULL, NULL, all, pairs};
    coarse->length = (float *)(coarse->codes + pairs * all), coarse->weights = coarse->length + all;
    for (long j = 0; j < all; j++) {
        const float *mine = q + (j < heads ? j : heads - 1) * width;
        float sum = 0.0f, worth = write_codes(mine, width, most_code(width), (int16_t *)(coarse->codes + j), all);
        for (long c = 0; c < width; c++) sum += mine[c] * mine[c];
        coarse->length[j] = worth > 0.0f ? sqrtf(sum) / worth : 0.0f;
        coarse->weights[j] = j < heads ? weights[j] * worth : 0.0f;
    }
}

/* Two products a lane of 16-bit numbers, added to `sum`. */
INLINE Integers add_pairs(Integers sum, Integers a, int32_t b) {
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVX512BW__)
    return sum + (Integers)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVX2__) && VECTOR == 8
    return sum + (Integers)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(b));
#else
    return sum + (a << 16 >> 16) * (int32_t)(int16_t)b + (a >> 16) * (b >> 16);
#endif
}

/* Vector `v` of ABREAST lanes, of which `low` and `high` have half each. */
INLINE Integers half_lanes(const uint8_t *low, const uint8_t *high, int v) {
#if defined(__AVX512F__)
    __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low));
    (void)v;
    return (Integers)_mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)high), 1);
#else
    Integers x;
    const uint8_t *from = v < SIXTEEN / 2 ? low + v * 4 * VECTOR : high + (v - SIXTEEN / 2) * 4 * VECTOR;
    memcpy(&x, from, sizeof(x));
    return x;
#endif
}

/* Scores of ABREAST groups or parts, which lie in rows `stride` bytes apart (see write_mean), half of them at `low`, half at `high`. */
INLINE void score_sixteen(const Coarse *q, const uint8_t *low, const uint8_t *high, long stride, float *score) {
    Vector total[SIXTEEN] = {{0}};
    for (long j = 0; j < q->heads; j += SIDE) {
        Integers sum[SIXTEEN][SIDE] = {{{0}}};
        const int32_t *mine = q->codes + j;
        for (long c = 0; c < q->pairs; c++, mine += q->heads)
#pragma GCC unroll 4
            for (int v = 0; v < SIXTEEN; v++) {
                Integers pair = half_lanes(low + c * stride, high + c * stride, v);
                IN_REGISTER(pair);
#pragma GCC unroll 8
                for (int i = 0; i < SIDE; i++) sum[v][i] = add_pairs(sum[v][i], pair, mine[i]);
            }
#pragma GCC unroll 4
        for (int v = 0; v < SIXTEEN; v++) {
            Vector worth = (Vector)half_lanes(low + q->pairs * stride, high + q->pairs * stride, v);
            Vector radius = (Vector)half_lanes(low + (q->pairs + 1) * stride, high + (q->pairs + 1) * stride, v);
#pragma GCC unroll 8
            for (int i = 0; i < SIDE; i++) {
                Vector dot = __builtin_convertvector(sum[v][i], Vector) * worth + radius * q->length[j + i];
                total[v] += q->weights[j + i] * (Vector)positive((Lanes)dot);
            }
        }
    }
    for (int v = 0; v < SIXTEEN; v++) store(score + v * VECTOR, VECTOR, total[v]);
}

/* The places of the best k of n scores, ascending; of equal ones the first. A NaN counts as the largest number, and what is
 * -INFINITY is not chosen. `order` has room for n; -> how many. */
static long best_places(const float *score, long n, long k, uint32_t *order, int64_t *places) {
    const uint32_t none = 0x007fffffu; /* -INFINITY */
    uint32_t limit = 0;
    long count = 0, kept = 0, room = k;
    for (long i = 0; i < n; i++) {
        uint32_t bits = bits_of(score[i] == score[i] ? score[i] + 0.0f : INFINITY);
        order[i] = bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
    }
    for (uint32_t bit = 1u << 31; bit >= COARSE_BIT; bit >>= 1) { /* as `keep_best`, over all */
        uint32_t least = limit | bit, above = 0;
        for (long i = 0; i < n; i++) above += order[i] >= least;
        if ((long)above >= k) limit = least;
    }
    for (long at = 0; at < n; at += VECTOR) {
        uint32_t hits = 0;
        if (n - at >= VECTOR) {
#ifdef __AVX512F__
            hits = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(order + at), _mm512_set1_epi32((int)limit));
#else
            hits = lanes_set(*(const Bits *)(order + at) >= limit);
#endif
        } else
            for (long i = 0; at + i < n; i++) hits |= (uint32_t)(order[at + i] >= limit) << i;
        for (; hits; hits &= hits - 1) places[count++] = at + __builtin_ctz(hits);
    }
    for (long i = 0; i < count; i++) order[i] = order[places[i]]; /* of the few that are left; a place is never before i */
    for (uint32_t bit = COARSE_BIT >> 1; bit; bit >>= 1) {
        uint32_t least = limit | bit, above = 0;
        for (long i = 0; i < count; i++) above += order[i] >= least;
        if (above >= k) limit = least;
    }
    for (long i = 0; i < count; i++) room -= order[i] > limit;
    for (long i = 0; i < count; i++) {
        int is_equal = order[i] == limit;
        places[kept] = places[i];
        kept += order[i] > none && (order[i] > limit || (is_equal && room > 0));
        room -= is_equal;
    }
    return kept;
}

/* The keys of the chosen parts of groups, part by part, and those behind the segments. */
static long candidates(const int64_t *parts, long count, const uint16_t *order, int64_t tail, int64_t end, int64_t *ids) {
    long n = 0;
    for (long i = 0; i < count; i++) {
        const uint16_t *members = order + parts[i] * FINE;
        int64_t first = parts[i] * FINE / SEGMENT * SEGMENT;
        if (i + FETCHED < count) __builtin_prefetch(order + parts[i + FETCHED] * FINE, 0, 2);
        for (long m = 0; m < FINE; m++) ids[n++] = first + members[m];
    }
    for (int64_t id = tail; id < end; id++) ids[n++] = id;
    return n;
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}
#endif

/* Segments [first, last) of one sequence's keys (see index_scan) -> order [last][SEGMENT] uint16: of each segment the
 * places of its keys, group by group and part by part, ascending within a part; means [last][groups / ABREAST][pairs + 2]
 * [ABREAST] of 32 bits: the groups' means and radii (see write_mean); fine [last][groups][pairs + 2][parts]: the same of each
 * group's parts. */
void NAME(index_groups)(const T *keys, const uint8_t *packed, const int64_t *table, long width, long per_page, long first,
                        long last, uint8_t *order, uint8_t *means, uint8_t *fine) {
    Scan s = NAME(scan_of)(keys, packed, table, 1, width, per_page);
    long wide = whole(width), groups = SEGMENT / MEMBERS, tall = (width + 1) / 2 + 2;
    float *rows = calloc(2 * SEGMENT * wide + width + 1, sizeof(float)), *x = rows + SEGMENT * wide;
    float *mean = x + SEGMENT * wide;
    for (long segment = first; segment < last; segment++) {
        uint16_t *mine = (uint16_t *)order + segment * SEGMENT;
        for (long i = 0; i < SEGMENT; i++) {
            int64_t run;
            const uint8_t *row = row_at(&s, segment * SEGMENT + i, &run);
            if (s.is_packed) decode_key(row, width, rows + i * wide);
            else
                for (long c = 0; c < width; c++) rows[i * wide + c] = GET((const T *)row, c);
            mine[i] = (uint16_t)i;
        }
        for (long size = SEGMENT; size > FINE; size /= 2)
            for (long at = 0; at < SEGMENT; at += size) halve(rows, wide, mine + at, size, x);
        for (long g = 0; g < groups; g++) {
            long at = segment * groups + g;
            write_mean(rows, wide, width, mine + g * MEMBERS, MEMBERS, mean,
                       (uint32_t *)means + at / ABREAST * tall * ABREAST, ABREAST, at % ABREAST);
            for (long part = 0; part < PARTS; part++)
                write_mean(rows, wide, width, mine + g * MEMBERS + part * FINE, FINE, mean,
                           (uint32_t *)fine + at * tall * PARTS, PARTS, part);
        }
    }
    free(rows);
}

/* The `budget` best parts of the `budget` best groups of a query, ascending, to `parts`; -> how many. */
static long NAME(best_parts)(const Scan *s, const T *q, const float *weights, const uint8_t *means, const uint8_t *fine,
                             int64_t groups, long budget, int is_shared, int64_t *parts) {
    long heads = s->heads, width = s->width, size = 4 * ((width + 1) / 2 + 2) * PARTS;
    long most = groups > (budget + 1) * PARTS ? groups : (budget + 1) * PARTS;
    float *score = malloc(sizeof(float) * (2 * most + heads * width) + 64), *floats = score + 2 * most;
    uint32_t *order = (uint32_t *)(score + most);
    int64_t *best = malloc(sizeof(int64_t) * 2 * most), *places = best + most;
    Coarse coarse;
    for (long i = 0; i < heads * width; i++) floats[i] = GET(q, i);
    make_coarse(floats, weights, heads, width, &coarse);
    SHARED_OUT(is_shared, long at = 0; at < groups; at += ABREAST, {
        const uint8_t *block = means + at / PARTS * size;
        score_sixteen(&coarse, block, block + 2 * ABREAST, 4 * ABREAST, score + at);
    });
    long count = best_places(score, groups, budget, order, best);
    SHARED_OUT(is_shared, long i = 0; i < count; i += 2, { /* parts of two groups side by side */
        for (long next = i + FETCHED; next < i + FETCHED + 2 && next < count; next++)
            for (long at = 0; at < size; at += 64) __builtin_prefetch(fine + best[next] * size + at, 0, 2);
        score_sixteen(&coarse, fine + best[i] * size, fine + best[i + 1 < count ? i + 1 : i] * size, 4 * PARTS,
                      score + i * PARTS);
    });
    count = best_places(score, count * PARTS, budget, order, places);
    for (long i = 0; i < count; i++) parts[i] = best[places[i] / PARTS] * PARTS + places[i] % PARTS;
    free(score), free(best), free(coarse.codes);
    return count;
}

/* Scores of the entries in `ids` [n] -> the best k of them, of equal ones those that come first in `ids`; ascending. */
static void NAME(best_of_some)(const Scan *s, const T *q, const float *weights, const int64_t *ids, long n, long k,
                               int64_t *picks) {
    Query query;
    Keys keys;
    const uint8_t **row = malloc(sizeof(*row) * (n + 2 * TILE));
    float *score = malloc(sizeof(float) * 2 * (n + TILE));
    int64_t *places = malloc(sizeof(int64_t) * n);
    uint8_t *room = malloc(make_query(s, &query, NULL));
    make_keys(s, &keys), make_query(s, &query, room);
    if (s->has_tiles) tiles_begin();
    NAME(read_query)(s, q, &query);
    NAME(weigh_heads)(s, weights, &query);
    for (long i = 0; i < n + 2 * TILE; i++) {
        int64_t run;
        row[i] = i < n ? row_at(s, ids[i], &run) : row[n - 1];
    }
    for (long at = 0; at < n; at += TILE) {
        Ahead ahead = {.bytes = s->row_bytes};
        memcpy(ahead.row, row + at + TILE, sizeof(ahead.row));
        NAME(fill_rows)(s, row + at, query.kernel, &keys);
        score_tile(s, &query, weights, &keys, at + TILE < n ? &ahead : NULL, score + at);
    }
    if (s->has_tiles) tiles_end();
    long count = best_places(score, n, k, (uint32_t *)(score + n + TILE), places);
    for (long i = 0; i < k; i++) picks[i] = i < count ? ids[places[i]] : -1;
    qsort(picks, count, sizeof(*picks), by_size);
    free(row), free(score), free(places), free(room), free_keys(&keys);
}

/* One query that sees entries [0, end), by groups of the segments that lie before its newest keys. */
static void NAME(search_one)(const Scan *s, const T *q, const float *weights, const uint8_t *order, const uint8_t *means,
                             const uint8_t *fine, int64_t end, long k, long budget, int is_shared, int64_t *picks) {
    int64_t segments = grouped_segments(end), tail = segments * SEGMENT;
    if (end <= k) {
        for (long i = 0; i < k; i++) picks[i] = i < end ? i : -1;
        return;
    }
    int64_t *ids = malloc(sizeof(int64_t) * (budget * (FINE + 1) + end - tail + 1));
    int64_t *parts = ids + budget * FINE + end - tail + 1;
    long count = NAME(best_parts)(s, q, weights, means, fine, segments * (SEGMENT / MEMBERS), budget, is_shared, parts);
    long n = candidates(parts, count, (const uint16_t *)order, tail, end, ids);
    NAME(best_of_some)(s, q, weights, ids, n, k, picks);
    free(ids);
}

/* As `index_scan`, for queries that see entries [0, end) of one sequence, best with ends ascending: those that see many
 * groups score all groups, all parts of the `budget` best of these, the keys of the `budget` best of those, and the newest
 * keys. order, means and fine: what `index_groups` made of the segments that any of them needs. Every query is searched by
 * itself, so its picks depend on nothing else. */
void NAME(index_search)(const T *q, const float *weights, const T *keys, const uint8_t *packed, const int64_t *table,
                        const uint8_t *order, const uint8_t *means, const uint8_t *fine, const int64_t *end, long queries,
                        long heads, long width, long per_page, long k, long budget, long threads, int64_t *picks) {
    const long per_segment = SEGMENT / MEMBERS;
    long plain = 0;
    while (plain < queries && PLAIN * grouped_segments(end[plain]) * per_segment <= budget) plain++;
    if (plain)
        NAME(index_scan)(q, weights, keys, packed, table, NULL, end, plain, heads, width, per_page, k, threads, picks);
    Scan s = NAME(scan_of)(keys, packed, table, heads, width, per_page);
    int is_alone = threads > 1 && queries - plain == 1; /* then threads share the work on it; no region of one thread around it */
#define SEARCH(row, shared)                                                                                            \
    NAME(search_one)(&s, q + (row) * heads * width, weights + (row) * heads, order, means, fine, end[row], k, budget,    \
                     shared, picks + (row) * k)
    if (threads > 1 && !is_alone) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long row = plain; row < queries; row++) SEARCH(row, 0);
    } else
        for (long row = plain; row < queries; row++) SEARCH(row, is_alone);
#undef SEARCH
}
