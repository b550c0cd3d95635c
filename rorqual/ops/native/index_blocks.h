/* A block of one query's scores, kept until the block is done: then a score that k of them reach is known, and few others
 * need be looked at one by one. */

#ifndef RORQUAL_INDEX_BLOCKS_H
#define RORQUAL_INDEX_BLOCKS_H

#define BLOCK_TILES 16
#define BLOCK_KEYS (BLOCK_TILES * TILE)

/* Bits that order as the scores do. */
INLINE uint32_t order_of(float score) { return (uint32_t)(rank_of(score, 0) >> 32); }

/* A score that at least k of n (n > k) reach, and not many more: the k-th largest of the maxima of groups of them, but for
 * its last bits. */
static float likely_limit(const float *score, long n, long k) {
    uint32_t most[BLOCK_KEYS], limit = 0;
    for (long i = 0; i < n; i++) most[i] = order_of(score[i]);
    for (; n >= 8 * k; n = (n + 1) / 2)
        for (long i = 0; i < n / 2; i++) {
            uint32_t other = most[(n + 1) / 2 + i];
            most[i] = most[i] > other ? most[i] : other;
        }
    for (uint32_t bit = 1u << 31; bit >= 1u << 17; bit >>= 1) {
        uint32_t least = limit | bit, count = 0;
        for (long i = 0; i < n; i++) count += most[i] >= least;
        if (count >= k) limit = least;
        if (count == k) break;
    }
    return score_of((uint64_t)limit << 32);
}

/* Offers entries `from` to `to` of a block that begins with entry `base`; what is at the likely limit may be among the best. */
static void offer_block(Best *best, const float *score, int64_t base, int64_t from, int64_t to) {
    if (best->threshold == -INFINITY && to - from > best->k) {
        float limit = likely_limit(score + (from - base), to - from, best->k), tiny = 0x1p-126f;
        int is_tiny = limit <= tiny && limit >= -tiny; /* below it lie numbers that may count as 0 */
        best->threshold = is_tiny ? -2.0f * tiny : score_of((uint64_t)(order_of(limit) - 1) << 32);
    }
    for (int64_t at = base; at < to; at += TILE)
        if (at + TILE > from)
            offer(best, score + (at - base), at, at > from ? at : from, at + TILE < to ? at + TILE : to);
    keep_best(best);
}

#endif
