/* FP4 keys and queries of one group (32 channels): the kernel `codes` of index_tiles.h with a tile's keys in registers for
 * all heads, and an upper bound of the scores from the heads that can raise them.
 *
 * With one group the key's scale s is the same for all heads, and it is a power of two, as the query's are: so
 *   sum_j w_j relu(n_j s s_j) = s sum_j (w_j s_j) relu(n_j)      (n_j whole numbers)
 * in every bit, every rounding on the way being scaled with the numbers. Leaving out heads of negative weight can only
 * make a partial sum larger, rounded or not, so a key whose bound is not above the threshold has no score above it. The few
 * others are scored one by one, or with their tile where they are many. */

#ifndef RORQUAL_INDEX_NARROW_H
#define RORQUAL_INDEX_NARROW_H

#include "index_tiles.h"

#if defined(__AVX512VNNI__) && defined(HAS_CODE_PRODUCTS)
#define HAS_NARROW_CODES 1

/* Words 0 to 4 of 16 rows of five words each: `word` [5], a row a lane. */
INLINE void words_of_run(const uint8_t *rows, __m512i *word) {
    __m512i at = _mm512_setr_epi32(0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75), all[5];
    for (int i = 0; i < 5; i++) all[i] = _mm512_loadu_si512(rows + 64 * i);
#pragma GCC unroll 5
    for (int w = 0; w < 5; w++) { /* row r's word is number 5 r + w of 80; an index counts modulo 32 */
        __m512i x = _mm512_permutex2var_epi32(all[0], at, all[1]), y = _mm512_permutex2var_epi32(all[2], at, all[3]);
        x = _mm512_mask_mov_epi32(x, _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32)), y);
        word[w] = _mm512_mask_permutexvar_epi32(x, _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(64)), at, all[4]);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(1));
    }
}

/* The same of rows that lie anywhere. */
INLINE void words_of_rows(const uint8_t *const *row, __m512i *word) {
    __m512i a[4], b[4];
    uint8_t bytes[LANE_COUNT];
    for (int i = 0; i < 4; i++) { /* 128-bit lane l: the codes of row 4 l + i */
        a[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row[i]));
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)row[4 + i]), 1);
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)row[8 + i]), 2);
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)row[12 + i]), 3);
    }
    for (int i = 0; i < 4; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 2; i++) { /* word 2 i and 2 i + 1 of rows 4 l to 4 l + 3 */
        word[2 * i] = _mm512_unpacklo_epi64(b[i], b[2 + i]);
        word[2 * i + 1] = _mm512_unpackhi_epi64(b[i], b[2 + i]);
    }
    for (int i = 0; i < LANE_COUNT; i++) bytes[i] = row[i][GROUP / 2];
    word[4] = (__m512i)widen_bytes(bytes);
}

/* Rows of 16 bytes of codes and a scale, in a run or given one by one -> tile and scales [TILE], as fill_codes. */
INLINE void fill_narrow(const uint8_t *run, const uint8_t *const *row, uint32_t *tile, float *scales) {
    for (long v = 0; v < TILE_VECTORS; v++) {
        __m512i word[5];
        if (run) words_of_run(run + v * LANE_COUNT * 4 * 5, word);
        else words_of_rows(row + v * LANE_COUNT, word);
        for (int w = 0; w < 4; w++) {
            Words codes = (Words)word[w];
            *(Words *)(tile + 2 * w * TILE + v * LANE_COUNT) = code_bytes(codes & 0x0f0f0f0f);
            *(Words *)(tile + (2 * w + 1) * TILE + v * LANE_COUNT) = code_bytes(codes >> 4 & 0x0f0f0f0f);
        }
        *(Lanes *)(scales + v * LANE_COUNT) = (Lanes)e8m0_lanes((Bits)word[4] & 255) * 0.25f;
    }
}

/* total [TILE_VECTORS] += what `heads` heads give before the keys' scales, in ascending order: query bytes [heads][32],
 * offsets [heads], and weights [heads] that hold the query's scales. */
INLINE void narrow_block(int heads, const uint8_t *q, const int32_t *offset, const float *weights, const uint32_t *tile,
                         Lanes *total) {
    __m512i sum[TILE_HEADS][TILE_VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < heads; i++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = _mm512_set1_epi32(offset[i]);
#pragma GCC unroll 8
    for (int w = 0; w < GROUP / 4; w++) {
        __m512i key[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
            key[v] = _mm512_loadu_si512(tile + w * TILE + v * LANE_COUNT);
            IN_REGISTER(key[v]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < heads; i++) {
            int32_t four;
            memcpy(&four, q + i * GROUP + 4 * w, 4);
            __m512i one = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = _mm512_dpbusd_epi32(sum[i][v], key[v], one);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < heads; i++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
            Wholes raised = (Wholes)_mm512_max_epi32(sum[i][v], _mm512_setzero_si512());
            total[v] += weights[i] * __builtin_convertvector(raised, Lanes);
        }
}

/* score [TILE] of all these heads. */
INLINE void narrow_codes(long heads, const uint8_t *q, const int32_t *offset, const float *weights, const uint32_t *tile,
                         const float *scales, float *score) {
    Lanes total[TILE_VECTORS] = {{0}};
    long j = 0;
    for (; j + TILE_HEADS <= heads; j += TILE_HEADS)
        narrow_block(TILE_HEADS, q + j * GROUP, offset + j, weights + j, tile, total);
    for (; j < heads; j++) narrow_block(1, q + j * GROUP, offset + j, weights + j, tile, total);
    for (int v = 0; v < TILE_VECTORS; v++)
        *(Lanes *)(score + v * LANE_COUNT) = total[v] * lanes_at(scales + v * LANE_COUNT);
}

/* Query bytes [heads][32] -> [groups of 16 heads][8 words][16 heads], the missing heads zeros. */
INLINE void turn_query(long heads, const uint8_t *q, uint32_t *turned) {
    memset(turned, 0, whole(heads) * GROUP);
    for (long j = 0; j < heads; j++)
        for (long w = 0; w < GROUP / 4; w++)
            memcpy(turned + (j / VECTOR * (GROUP / 4) + w) * VECTOR + j % VECTOR, q + j * GROUP + 4 * w, 4);
}

/* One score of the tile as narrow_codes gives it, heads side by side: for the few keys whose bound is high. `offset` has
 * room up to a multiple of 16. */
INLINE float narrow_score(long heads, const uint32_t *turned, const int32_t *offset, const float *weights,
                          const uint32_t *tile, const float *scales, long at) {
    float raised[VECTOR], total = 0.0f;
    for (long j = 0; j < heads; j += VECTOR) {
        __m512i sum[2] = {_mm512_loadu_si512(offset + j), _mm512_setzero_si512()}; /* two, so that neither waits long */
#pragma GCC unroll 8
        for (long w = 0; w < GROUP / 4; w++)
            sum[w % 2] = _mm512_dpbusd_epi32(sum[w % 2], _mm512_set1_epi32((int)tile[w * TILE + at]),
                                             _mm512_loadu_si512(turned + (j / VECTOR * (GROUP / 4) + w) * VECTOR));
        Wholes positives = (Wholes)_mm512_max_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_setzero_si512());
        *(Lanes *)raised = __builtin_convertvector(positives, Lanes);
        for (long i = 0; i < VECTOR && j + i < heads; i++) total = fmaf(weights[j + i], raised[i], total);
    }
    return total * scales[at];
}
#endif

#endif
