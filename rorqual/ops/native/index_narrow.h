/* FP4 keys and queries of one group (32 channels): the kernel `codes` of index_tiles.h with a tile's keys in registers for
 * all heads, and an upper bound of the scores from the heads that can raise them.
 *
 * With one group the key's scale s is the same for all heads, and it is a power of two, as the query's are: so
 *   sum_j w_j relu(n_j s s_j) = s sum_j (w_j s_j) relu(n_j)      (n_j whole numbers)
 * in every bit, every rounding on the way being scaled with the numbers. Leaving out heads of negative weight can only
 * make a partial sum larger, rounded or not, so a tile without a bound above the threshold has no score above it. */

#ifndef RORQUAL_INDEX_NARROW_H
#define RORQUAL_INDEX_NARROW_H

#include "index_tiles.h"

#if defined(__AVX512VNNI__) && defined(HAS_CODE_PRODUCTS)
#define HAS_NARROW_CODES 1

/* Rows of 16 bytes of codes and a scale -> tile and scales [TILE], as fill_codes. */
INLINE void fill_narrow(const uint8_t *const *row, uint32_t *tile, float *scales) {
    for (long v = 0; v < TILE_VECTORS; v++) {
        const uint8_t *const *r = row + v * LANE_COUNT;
        __m512i a[4], b[4], word[4];
        uint8_t bytes[LANE_COUNT];
        for (int i = 0; i < 4; i++) { /* 128-bit lane l: the codes of row 4 l + i */
            a[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)r[i]));
            a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)r[4 + i]), 1);
            a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)r[8 + i]), 2);
            a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)r[12 + i]), 3);
        }
        for (int i = 0; i < 4; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 2; i++) { /* word 2 i and 2 i + 1 of rows 4 l to 4 l + 3 */
            word[2 * i] = _mm512_unpacklo_epi64(b[i], b[2 + i]);
            word[2 * i + 1] = _mm512_unpackhi_epi64(b[i], b[2 + i]);
        }
        for (int w = 0; w < 4; w++) {
            Words codes = (Words)word[w];
            *(Words *)(tile + 2 * w * TILE + v * LANE_COUNT) = code_bytes(codes & 0x0f0f0f0f);
            *(Words *)(tile + (2 * w + 1) * TILE + v * LANE_COUNT) = code_bytes(codes >> 4 & 0x0f0f0f0f);
        }
        for (int i = 0; i < LANE_COUNT; i++) bytes[i] = r[i][GROUP / 2];
        *(Lanes *)(scales + v * LANE_COUNT) = (Lanes)e8m0_lanes(widen_bytes(bytes)) * 0.25f;
    }
}

/* score [TILE] from query bytes [heads][32], scales and offsets [heads]; of the heads of positive weight alone if asked. */
INLINE void narrow_codes(long heads, int raising_only, const uint8_t *q, const float *q_scale, const int32_t *offset,
                         const uint32_t *tile, const float *scales, const float *weights, float *score) {
    __m512i key[GROUP / 4][TILE_VECTORS];
    Lanes total[TILE_VECTORS] = {{0}};
#pragma GCC unroll 8
    for (int w = 0; w < GROUP / 4; w++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) key[w][v] = _mm512_loadu_si512(tile + w * TILE + v * LANE_COUNT);
    for (long j = 0; j < heads; j++) {
        if (raising_only && weights[j] < 0.0f) continue;
        __m512i sum[TILE_VECTORS];
        float weight = weights[j] * q_scale[j];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) sum[v] = _mm512_set1_epi32(offset[j]);
#pragma GCC unroll 8
        for (int w = 0; w < GROUP / 4; w++) {
            int32_t four;
            memcpy(&four, q + j * GROUP + 4 * w, 4);
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) sum[v] = _mm512_dpbusd_epi32(sum[v], key[w][v], _mm512_set1_epi32(four));
        }
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
            Wholes raised = (Wholes)_mm512_max_epi32(sum[v], _mm512_setzero_si512());
            total[v] += weight * __builtin_convertvector(raised, Lanes);
        }
    }
    for (int v = 0; v < TILE_VECTORS; v++)
        *(Lanes *)(score + v * LANE_COUNT) = total[v] * lanes_at(scales + v * LANE_COUNT);
}
#endif

#endif
