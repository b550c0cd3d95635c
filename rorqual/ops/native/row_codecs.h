/* Numbers of four and eight bits (quant.py) and the rows of quantised caches (cache_codec.py), for kernels that read and
 * write them where they lie.
 *
 *   entry row      [no-rope channels, e4m3] [rope channels, bf16] [one e8m0 scale per group] [zeros up to a multiple of 4]
 *   index key row  [channels, e2m1, two a byte, low nibble first] [one e8m0 scale per group] [zeros likewise]
 *
 * At V4 sizes 448 + 2 * 64 + 7 + 1 = 584 and 64 + 4 = 68 bytes. Rounding is to the nearest, ties to the even code. A group
 * that holds a NaN or an infinity has the scale NaN (byte 255), so all of it reads as NaN. No subnormal fp32 number is
 * made on the way, so a processor told to flush those gives the same values. */

#ifndef RORQUAL_ROW_CODECS_H
#define RORQUAL_ROW_CODECS_H

#include "vectors.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef uint8_t Bytes __attribute__((vector_size(VECTOR), aligned(1)));

#define ENTRY_GROUP 64 /* channels that share a scale, where the width allows */
#define KEY_GROUP 32

INLINE long common_divisor(long a, long b) {
    while (b) {
        long rest = a % b;
        a = b, b = rest;
    }
    return a;
}
INLINE long entry_row_bytes(long nope, long rope) {
    return (nope + 2 * rope + (nope ? nope / common_divisor(nope, ENTRY_GROUP) : 0) + 3) & ~3L;
}
INLINE long key_row_bytes(long width) { return (width / 2 + width / common_divisor(width, KEY_GROUP) + 3) & ~3L; }

/* ---- one scale: 2^(byte - 127) ---------------------------------------------------------------------------------- */

INLINE float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}
/* Byte 0 is 2^-127, byte 255 NaN: both are the shifted byte with the mantissa's first bit set. */
INLINE float from_e8m0(uint8_t byte) {
    return float_of((uint32_t)byte << 23 | (byte == 0 || byte == 255 ? 1u << 22 : 0));
}
INLINE Vector e8m0_lanes(Bits bytes) {
    Bits special = (Bits)(bytes == 0) | (Bits)(bytes == 255);
    return (Vector)(bytes << 23 | (special & 1u << 22));
}
/* Byte of 2^ceil(log2(max(amax, floor) / most)), 255 for a group with numbers that are not finite. */
INLINE uint8_t scale_byte(float amax, int is_finite, float floor, float most) {
    uint32_t bits = bits_of((amax < floor ? floor : amax) * (1.0f / most));
    return is_finite ? (uint8_t)((bits >> 23) + ((bits & 0x7fffff) != 0)) : 255;
}

/* ---- e4m3 and e2m1, a code (0..255, 0..15) a lane ---------------------------------------------------------------- */

INLINE Vector e4m3_lanes(Bits code) {
    Bits size = code & 0x7f, sign = (code & 0x80) << 24;
    Vector small = __builtin_convertvector((Integers)size, Vector) * 0x1p-9f; /* codes below 8: multiples of 2^-9 */
    Bits value = (Bits)choose((Integers)(size < 8), small, (Vector)((size << 20) + (120u << 23)));
    value |= (Bits)(size == 0x7f) & 0x7fc00000u;
    return (Vector)(value | sign);
}
/* |x| is at most 448. */
INLINE Bits to_e4m3_lanes(Vector x) {
    Bits all = (Bits)x, sign = all >> 24 & 0x80;
    Vector size = (Vector)(all & 0x7fffffffu);
    Bits normal = ((Bits)size + 0x7ffff + ((Bits)size >> 20 & 1)) >> 20;
    Bits small = (Bits)(size * 512.0f + 8388608.0f) & 15; /* the sum leaves the nearest whole number in the low bits */
    Integers is_small = size < 0x1p-6f;
    return sign | (small & (Bits)is_small) | ((normal - (120u << 3)) & ~(Bits)is_small);
}

static const float E2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

INLINE Vector e2m1_lanes(Bits code) {
#ifdef __AVX512F__
    return (Vector)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(E2M1)); /* the upper bits of an index do not count */
#elif defined(__AVX2__)
    Bits size = (Bits)_mm256_permutevar8x32_ps(_mm256_loadu_ps(E2M1), (__m256i)code);
    return (Vector)(size | (code & 8) << 28);
#else
    /* twice the magnitude: the code itself up to 4, then 6, 8 and 12 */
    Bits size = code & 7;
    Bits twice = size + ((Bits)(size == 5) & 1) + ((Bits)(size == 6) & 2) + ((Bits)(size == 7) & 5);
    return (Vector)((Bits)(__builtin_convertvector((Integers)twice, Vector) * 0.5f) | (code & 8) << 28);
#endif
}
/* |x| is at most 6. */
INLINE Bits to_e2m1_lanes(Vector x) {
    Bits all = (Bits)x, size = all & 0x7fffffffu;
    Vector a = (Vector)size, magic = (Vector){0} + 8388608.0f;
    Bits one = (Bits)(a * 2.0f + magic) & 7; /* multiples of 1/2 below 2, of 1 below 4, of 2 up to 6 */
    Bits two = ((Bits)(a + magic) & 7) + 2, four = ((Bits)(a * 0.5f + magic) & 7) + 4;
    Bits small = (Bits)(a < 2.0f), large = (Bits)(a >= 4.0f);
    return (one & small) | (four & large) | (two & ~(small | large)) | (all >> 28 & 8);
}
INLINE Bits widen_bytes(const uint8_t *p) {
#ifdef __AVX512F__
    return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return __builtin_convertvector(*(const Bytes *)p, Bits);
#endif
}

/* ---- rows ------------------------------------------------------------------------------------------------------- */

/* Row -> no-rope channels [nope], then rope channels [rope], as fp32. */
INLINE void decode_entry(const uint8_t *row, long nope, long rope, float *out) {
    long group = nope ? common_divisor(nope, ENTRY_GROUP) : 1;
    const uint8_t *scales = row + nope + 2 * rope;
    for (long g = 0; g < nope / group; g++) {
        float scale = from_e8m0(scales[g]);
        for (long i = g * group; i < (g + 1) * group; i += VECTOR) {
            long n = (g + 1) * group - i < VECTOR ? (g + 1) * group - i : VECTOR;
            uint8_t codes[VECTOR] = {0};
            memcpy(codes, row + i, n);
            store(out + i, n, e4m3_lanes(widen_bytes(codes)) * scale);
        }
    }
    for (long i = 0; i < rope; i++) {
        uint16_t half;
        memcpy(&half, row + nope + 2 * i, 2);
        out[nope + i] = from_bf16(half);
    }
}

/* Row -> channels [width] as fp32. */
INLINE void decode_key(const uint8_t *row, long width, float *out) {
    long group = common_divisor(width, KEY_GROUP);
    for (long g = 0; g < width / group; g++) {
        float scale = from_e8m0(row[width / 2 + g]);
        for (long i = g * group; i < (g + 1) * group; i += VECTOR) {
            long n = (g + 1) * group - i < VECTOR ? (g + 1) * group - i : VECTOR;
            Bits codes = {0};
            for (long c = 0; c < n; c++) codes[c] = row[(i + c) / 2] >> (i + c) % 2 * 4 & 15;
            store(out + i, n, e2m1_lanes(codes) * scale);
        }
    }
}

/* Largest magnitude of x [n], and whether all of it is finite. */
INLINE float largest(const float *x, long n, int *is_finite) {
    float amax = 0.0f;
    *is_finite = 1;
    for (long i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        *is_finite &= size <= 3.402823466e38f;
        amax = size > amax ? size : amax;
    }
    return amax;
}

INLINE void encode_entry(const float *x, long nope, long rope, uint8_t *row) {
    long group = nope ? common_divisor(nope, ENTRY_GROUP) : 1, groups = nope / group;
    uint8_t *scales = row + nope + 2 * rope;
    for (long g = 0; g < groups; g++) {
        int is_finite;
        float amax = largest(x + g * group, group, &is_finite);
        scales[g] = scale_byte(amax, is_finite, 1e-4f, 448.0f);
        for (long i = g * group; i < (g + 1) * group; i += VECTOR) {
            long n = (g + 1) * group - i < VECTOR ? (g + 1) * group - i : VECTOR;
            Vector y = smaller(larger(load(x + i, n) / from_e8m0(scales[g]), -448.0f), 448.0f);
            Bits codes = to_e4m3_lanes(y);
            for (long c = 0; c < n; c++) row[i + c] = is_finite ? (uint8_t)codes[c] : 0x7f;
        }
    }
    for (long i = 0; i < rope; i++) {
        uint16_t half = to_bf16(x[nope + i]);
        memcpy(row + nope + 2 * i, &half, 2);
    }
    memset(scales + groups, 0, entry_row_bytes(nope, rope) - (nope + 2 * rope + groups));
}

INLINE void encode_key(const float *x, long width, uint8_t *row) {
    long group = common_divisor(width, KEY_GROUP), groups = width / group;
    memset(row, 0, key_row_bytes(width));
    for (long g = 0; g < groups; g++) {
        int is_finite;
        float amax = largest(x + g * group, group, &is_finite);
        uint8_t byte = row[width / 2 + g] = scale_byte(amax, is_finite, 6.0f * 0x1p-126f, 6.0f);
        for (long i = g * group; is_finite && i < (g + 1) * group; i += VECTOR) {
            long n = (g + 1) * group - i < VECTOR ? (g + 1) * group - i : VECTOR;
            Vector y = smaller(larger(load(x + i, n) / from_e8m0(byte), -6.0f), 6.0f);
            Bits codes = to_e2m1_lanes(y);
            for (long c = 0; c < n; c++) row[(i + c) / 2] |= (uint8_t)(codes[c] << (i + c) % 2 * 4);
        }
    }
}

#endif
