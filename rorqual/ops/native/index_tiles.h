/* One tile of index keys against all heads of one query: sum_j w_j relu(q_j . k_i) for TILE keys.
 *
 * Every inner product has one order of additions: groups of 32 channels, each summed from zero, added one after the other;
 * then the heads in ascending order. Values that were rounded to FP4 in these groups (round_index_fp4) make every group's
 * sum exact, so all kernels here give the same bits for them:
 *
 *   floats   fp32 products; on any processor
 *   pairs    bf16 products two at a time (AVX-512), or 32 at a time in matrix tiles (AMX)
 *   codes    both sides as whole numbers, twice their e2m1 values: 8-bit products, times the two groups' scales
 *
 * Keys of a tile lie side by side, one a vector lane. */

#ifndef RORQUAL_INDEX_TILES_H
#define RORQUAL_INDEX_TILES_H

#include "lanes.h"
#include "matrix_tiles.h"

#define TILE_HEADS 4 /* heads worked on at once; with AVX-512 their 4 x 3 sums and as many totals fill the registers */
#ifdef __AVX__
#define TILE_VECTORS 3
#else
#define TILE_VECTORS 2
#endif
#define TILE (TILE_VECTORS * LANE_COUNT)
#define GROUP 32 /* channels */

#if defined(__AVX2__) && (!defined(__AVX512F__) || defined(__AVX512BW__))
#define HAS_CODE_PRODUCTS 1
#endif

#if defined(__AVX__) && !defined(__AVX512F__)
/* 8 rows of 8 words, turned in place. */
INLINE void turn_square(__m256 *x) {
    __m256d pair[8];
    for (int i = 0; i < 8; i += 4) { /* of four rows: words 4 l and 4 l + 1, then 4 l + 2 and 4 l + 3 of 128-bit lane l */
        __m256 low = _mm256_unpacklo_ps(x[i], x[i + 1]), low2 = _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
        __m256 high = _mm256_unpackhi_ps(x[i], x[i + 1]), high2 = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
        pair[i] = _mm256_unpacklo_pd((__m256d)low, (__m256d)low2);
        pair[i + 1] = _mm256_unpackhi_pd((__m256d)low, (__m256d)low2);
        pair[i + 2] = _mm256_unpacklo_pd((__m256d)high, (__m256d)high2);
        pair[i + 3] = _mm256_unpackhi_pd((__m256d)high, (__m256d)high2);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps((__m256)pair[i], (__m256)pair[4 + i], 0x20);
        x[4 + i] = _mm256_permute2f128_ps((__m256)pair[i], (__m256)pair[4 + i], 0x31);
    }
}
#endif

/* Words of TILE rows -> out [words][TILE]. */
INLINE void turn_words(const uint8_t *const *row, long words, uint32_t *out) {
#ifdef __AVX512F__
    for (long r = 0; r < TILE; r += 16)
        for (long w = 0; w < words; w += 16) {
            __mmask16 there = words - w >= 16 ? 0xffff : (__mmask16)((1u << (words - w)) - 1);
            __m512i a[16], b[16], c[16];
            for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi32(there, row[r + i] + 4 * w);
            for (int i = 0; i < 16; i += 2) {
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            for (int i = 0; i < 16; i += 4) {
                a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
                a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
                a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
                a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
            }
            for (int j = 0; j < 4; j++) { /* a[4 i + j]: word 4 l + j of rows 4 i to 4 i + 3 in 128-bit lane l */
                __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
                __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
                __m512i odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
                c[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
                c[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
                c[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
                c[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
            }
            for (int i = 0; i < 16 && w + i < words; i++) _mm512_storeu_si512(out + (w + i) * TILE + r, c[i]);
        }
#else
    long done = 0;
#ifdef __AVX__
    for (; done + 8 <= words; done += 8)
        for (long r = 0; r < TILE; r += 8) {
            __m256 turned[8];
            for (int i = 0; i < 8; i++) turned[i] = _mm256_loadu_ps((const float *)(row[r + i] + 4 * done));
            turn_square(turned);
            for (int i = 0; i < 8; i++) _mm256_storeu_ps((float *)(out + (done + i) * TILE + r), turned[i]);
        }
#endif
    for (; done < words; done++)
        for (long r = 0; r < TILE; r++) memcpy(out + done * TILE + r, row[r] + 4 * done, 4);
#endif
}

/* bf16 rows of `width` (even) channels -> out [width][TILE] in fp32: two channels a word are turned together. */
INLINE void turn_halves(const uint8_t *const *row, long width, uint32_t *out) {
    turn_words(row, width / 2, out + width / 2 * TILE); /* the upper half is read before it is written */
    for (long w = 0; w < width / 2; w++)
        for (long r = 0; r < TILE; r += LANE_COUNT) {
            Words two = *(const Words *)(out + (width / 2 + w) * TILE + r);
            *(Words *)(out + 2 * w * TILE + r) = two << 16;
            *(Words *)(out + (2 * w + 1) * TILE + r) = two & 0xffff0000u;
        }
}

/* A group's sums, added to those of the groups before it (`total`, [heads][TILE], in memory: the registers are needed): kept
 * there, or, with the last group, score += the heads' weighted positive parts, heads in ascending order. */
INLINE void end_group(int heads, Lanes (*sum)[TILE_VECTORS], int is_first, int is_last, float *total,
                      const float *weights, float *score) {
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) {
        Lanes s = is_last ? lanes_at(score + v * LANE_COUNT) : (Lanes){0};
#pragma GCC unroll 4
        for (int i = 0; i < heads; i++) {
            float *kept = total + i * TILE + v * LANE_COUNT;
            Lanes all = is_first ? sum[i][v] : lanes_at(kept) + sum[i][v];
            if (is_last) s += weights[i] * positive(all);
            else *(Lanes *)kept = all;
        }
        if (is_last) *(Lanes *)(score + v * LANE_COUNT) = s;
    }
}

/* ---- floats: q [heads][width], tile [width][TILE] --------------------------------------------------------------- */

INLINE void block_floats(int heads, const float *q, long width, const float *tile, const float *weights, float *total,
                         float *score) {
    for (long first = 0; first < width; first += GROUP) {
        Lanes sum[TILE_HEADS][TILE_VECTORS];
        long last = first + GROUP < width ? first + GROUP : width;
#pragma GCC unroll 4
        for (int i = 0; i < heads; i++)
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = (Lanes){0};
        for (long c = first; c < last; c++) {
            Lanes k[TILE_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) {
                k[v] = lanes_at(tile + c * TILE + v * LANE_COUNT);
                IN_REGISTER(k[v]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < heads; i++) {
                float a = q[i * width + c];
#pragma GCC unroll 4
                for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] += a * k[v];
            }
        }
        end_group(heads, sum, first == 0, last == width, total, weights, score);
    }
}

/* ---- pairs: q [heads][width / 2], tile [width / 2][TILE] -------------------------------------------------------- */

#ifdef HAS_BF16_PRODUCTS
INLINE void block_pairs(int heads, const uint32_t *q, long pairs, const uint32_t *tile, const float *weights,
                        float *total, float *score) {
    for (long first = 0; first < pairs; first += GROUP / 2) {
        Lanes sum[TILE_HEADS][TILE_VECTORS];
        long last = first + GROUP / 2 < pairs ? first + GROUP / 2 : pairs;
#pragma GCC unroll 4
        for (int i = 0; i < heads; i++)
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = (Lanes){0};
        for (long c = first; c < last; c++) {
            __m512bh k[TILE_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) k[v] = (__m512bh)_mm512_loadu_si512(tile + c * TILE + v * LANE_COUNT);
#pragma GCC unroll 4
            for (int i = 0; i < heads; i++) {
                __m512bh a = (__m512bh)_mm512_set1_epi32((int)q[i * pairs + c]);
#pragma GCC unroll 4
                for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = (Lanes)_mm512_dpbf16_ps((__m512)sum[i][v], a, k[v]);
            }
        }
        end_group(heads, sum, first == 0, last == pairs, total, weights, score);
    }
}
#endif

/* ---- codes: q [heads][width] bytes with [heads][groups] scales and offsets; tile [width / 4][TILE] -------------- */

#ifdef HAS_CODE_PRODUCTS
/* 4 products a lane of unsigned key bytes and signed query bytes. */
INLINE Words add_codes(Words sum, const uint32_t *key, uint32_t q) {
#if defined(__AVX512VNNI__)
    return (Words)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(key), _mm512_set1_epi32((int)q));
#elif defined(__AVX512F__) /* pairs of 16-bit sums; at most 16 * 2 * 24 * 12 = 9216 over a group */
    return (Words)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16(_mm512_loadu_si512(key), _mm512_set1_epi32((int)q)));
#else
    __m256i products = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)key), _mm256_set1_epi32((int)q));
    return (Words)_mm256_add_epi16((__m256i)sum, products);
#endif
}
/* The sum as a float, with the keys' bias taken off. */
INLINE Lanes finish_codes(Words sum, int32_t offset) {
#if defined(__AVX512VNNI__)
    (void)offset; /* the sum began with it */
#elif defined(__AVX512F__)
    sum = (Words)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)) + (uint32_t)offset;
#else
    sum = (Words)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)) + (uint32_t)offset;
#endif
    return __builtin_convertvector((Wholes)sum, Lanes);
}
#ifdef __AVX512VNNI__
#define FIRST_SUM(offset) ((Words){0} + (uint32_t)(offset))
#else
#define FIRST_SUM(offset) ((Words){0})
#endif

/* e2m1 codes, one a byte -> 2 * value + 12, which is never negative. */
INLINE Words code_bytes(Words codes) {
    const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
#ifdef __AVX512F__
    return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)codes);
#else
    return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)codes);
#endif
}

/* Rows of packed keys -> tile and scales [groups][TILE] (a quarter of the keys': both sides' numbers are doubled). Of 8
 * channels in a word, word 2 w of the tile has the even ones and word 2 w + 1 the odd ones. */
INLINE void fill_codes(const uint8_t *const *row, long width, uint32_t *tile, float *scales) {
    uint32_t *half = tile + width / 8 * TILE, four[TILE]; /* the upper half is read before it is written */
    turn_words(row, width / 8, half);
    for (long w = 0; w < width / 8; w++)
        for (int v = 0; v < TILE_VECTORS; v++) {
            Words codes = *(const Words *)(half + w * TILE + v * LANE_COUNT);
            *(Words *)(tile + 2 * w * TILE + v * LANE_COUNT) = code_bytes(codes & 0x0f0f0f0f);
            *(Words *)(tile + (2 * w + 1) * TILE + v * LANE_COUNT) = code_bytes(codes >> 4 & 0x0f0f0f0f);
        }
    for (long g = 0; g < width / GROUP; g++) {
        for (long r = 0; r < TILE && g % 4 == 0; r++) memcpy(four + r, row[r] + width / 2 + g, 4);
        for (long r = 0; r < TILE; r++) scales[g * TILE + r] = from_e8m0((uint8_t)(four[r] >> g % 4 * 8)) * 0.25f;
    }
}

/* Query values [width] of one head -> bytes in the tile's order of channels, twice the e2m1 values, with scale and offset
 * (what takes the keys' bias off) per group; false when the values are no FP4 numbers in groups of 32. */
INLINE int query_codes(const float *x, long width, uint8_t *bytes, float *scale, int32_t *offset) {
    int is_exact = 1;
    for (long g = 0; g < width / GROUP; g++) {
        int is_finite, sum = 0;
        float amax = largest(x + g * GROUP, GROUP, &is_finite), values[GROUP];
        if (!is_finite) return 0;
        scale[g] = from_e8m0(scale_byte(amax, 1, 6.0f * 0x1p-126f, 6.0f));
        for (long i = 0; i < GROUP; i += VECTOR) {
            Vector y = load(x + g * GROUP + i, VECTOR) / scale[g], rounded = e2m1_lanes(to_e2m1_lanes(y));
            Integers same = y == rounded;
            for (int l = 0; l < VECTOR; l++) is_exact &= same[l] != 0;
            store(values + i, VECTOR, rounded * 2.0f);
        }
        for (long c = 0; c < GROUP; c++) {
            int value = (int)values[c];
            sum += value;
            bytes[g * GROUP + c / 8 * 8 + c % 2 * 4 + c % 8 / 2] = (uint8_t)value;
        }
        offset[g] = -12 * sum;
    }
    return is_exact;
}

INLINE void block_codes(int heads, const uint8_t *q, const float *q_scale, const int32_t *q_offset, long width,
                        const uint32_t *tile, const float *scales, const float *weights, float *total,
                        float *score) {
    long groups = width / GROUP;
    for (long g = 0; g < groups; g++) {
        Words sum[TILE_HEADS][TILE_VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < heads; i++)
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = FIRST_SUM(q_offset[i * groups + g]);
#pragma GCC unroll 8
        for (long w = g * GROUP / 4; w < (g + 1) * GROUP / 4; w++) {
#pragma GCC unroll 4
            for (int i = 0; i < heads; i++) {
                uint32_t four;
                memcpy(&four, q + i * width + 4 * w, 4);
#pragma GCC unroll 4
                for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = add_codes(sum[i][v], tile + w * TILE + v * LANE_COUNT, four);
            }
        }
        Lanes scaled[TILE_HEADS][TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
            Lanes scale = lanes_at(scales + g * TILE + v * LANE_COUNT);
#pragma GCC unroll 4
            for (int i = 0; i < heads; i++)
                scaled[i][v] = finish_codes(sum[i][v], q_offset[i * groups + g]) * (scale * q_scale[i * groups + g]);
        }
        end_group(heads, scaled, g == 0, g + 1 == groups, total, weights, score);
    }
}
#endif

/* ---- pairs in matrix tiles: q bf16 [heads][width], whose rows are read 16 at a time ----------------------------- */

#ifdef HAS_MATRIX_TILES
/* One instruction sums 32 channels from zero and adds that to what was there: the order of the other kernels. `q` has
 * rows up to a multiple of 16. */
INLINE void tile_pairs(long heads, const uint16_t *q, long width, const uint32_t *tile, const float *weights, float *score) {
    float total[16][TILE];
    for (long first = 0; first < heads; first += 16) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        for (long g = 0; g < width / GROUP; g++) {
            const uint32_t *keys = tile + g * GROUP / 2 * TILE;
            _tile_loadd(3, q + first * width + g * GROUP, width * 2);
            _tile_loadd(4, keys, TILE * 4);
            _tile_loadd(5, keys + VECTOR, TILE * 4);
            _tile_loadd(6, keys + 2 * VECTOR, TILE * 4);
            _tile_dpbf16ps(0, 3, 4);
            _tile_dpbf16ps(1, 3, 5);
            _tile_dpbf16ps(2, 3, 6);
        }
        _tile_stored(0, total[0], TILE * 4);
        _tile_stored(1, total[0] + VECTOR, TILE * 4);
        _tile_stored(2, total[0] + 2 * VECTOR, TILE * 4);
        for (int v = 0; v < TILE_VECTORS; v++) {
            Lanes s = lanes_at(score + v * LANE_COUNT);
            for (long i = 0; i < 16 && first + i < heads; i++)
                s += weights[first + i] * positive(lanes_at(total[i] + v * LANE_COUNT));
            *(Lanes *)(score + v * LANE_COUNT) = s;
        }
    }
}
#endif

#endif
