/* One step of a weight row, unpacked into registers: 8 vectors of fp32, or 4 of bf16 pairs, without its scale. Channels
 * come in the order in which the format gives them up cheapest; `channel_of` says which, so that activations are laid out
 * once to match. */

#ifndef RORQUAL_UNPACK_WEIGHTS_H
#define RORQUAL_UNPACK_WEIGHTS_H

#include "packed_products.h"

#if defined(HAS_BF16_PRODUCTS) && defined(__AVX512VBMI__)
#define HAS_FP8_PAIRS 1
#endif

/* Channel (within the step) that stands at place `i` of the unpacked step. FP4: nibble j of every 32-bit word (in bf16 of
 * every 16-bit word) makes one vector, so the 4 lanes (8 places) of a group of 32 keep to themselves. FP8 in bf16: bytes
 * are paired within 128-bit lanes. */
INLINE long channel_of(enum Format format, int in_halves, long i) {
    if (format == FORMAT_FP4) return in_halves ? i % 32 * 4 + i / 32 : i % LANE_COUNT * 8 + i / LANE_COUNT;
    if (format == FORMAT_FP8 && in_halves) return i / 64 * 64 + i % 32 / 8 * 16 + i / 32 % 2 * 8 + i % 8;
    return i;
}

INLINE Words bytes_at(const uint8_t *p) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    Words w;
    for (int i = 0; i < LANE_COUNT; i++) w[i] = p[i];
    return w;
#endif
}
INLINE Words halves_at(const uint8_t *p) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    Words w;
    for (int i = 0; i < LANE_COUNT; i++) w[i] = p[2 * i] | (uint32_t)p[2 * i + 1] << 8;
    return w;
#endif
}
INLINE Lanes select_lanes(Words when, Lanes a, Lanes b) { return (Lanes)(((Words)a & when) | ((Words)b & ~when)); }
INLINE Lanes e4m3_words(Words code) { /* as e4m3_lanes */
    Words size = code & 0x7f;
    Lanes small = __builtin_convertvector((Wholes)size, Lanes) * 0x1p-9f;
    Lanes value = select_lanes((Words)(size < 8), small, (Lanes)((size << 20) + (120u << 23)));
    return (Lanes)((Words)value | ((Words)(size == 0x7f) & 0x7fc00000u) | (code & 0x80) << 24);
}
INLINE Lanes e2m1_words(Words code) { /* as e2m1_lanes; only the low 4 bits of a lane count */
#if defined(__AVX512F__)
    return (Lanes)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(E2M1));
#elif defined(__AVX2__)
    __m256 size = _mm256_permutevar8x32_ps(_mm256_loadu_ps(E2M1), (__m256i)code);
    return (Lanes)((Words)size | (code & 8) << 28);
#else
    Words size = code & 7;
    Words twice = size + ((Words)(size == 5) & 1) + ((Words)(size == 6) & 2) + ((Words)(size == 7) & 5);
    return (Lanes)((Words)(__builtin_convertvector((Wholes)twice, Lanes) * 0.5f) | (code & 8) << 28);
#endif
}

INLINE void unpack_floats(enum Format format, const uint8_t *p, Lanes *w) {
    Words words = {0};
    if (format == FORMAT_FP4) words = *(const Words *)p;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        long at = j * LANE_COUNT;
        if (format == FORMAT_FP4) w[j] = e2m1_words(words >> 4 * j);
        else if (format == FORMAT_FP8) w[j] = e4m3_words(bytes_at(p + at));
        else if (format == FORMAT_INT8) w[j] = __builtin_convertvector((Wholes)(bytes_at(p + at) << 24) >> 24, Lanes);
        else if (format == FORMAT_BF16) w[j] = (Lanes)(halves_at(p + 2 * at) << 16);
        else w[j] = lanes_at((const float *)p + at);
    }
}

#ifdef HAS_BF16_PRODUCTS
/* The 16 e2m1 values as bf16, twice: only the low 4 bits of an index count then. */
static const uint16_t E2M1_HALVES[32] = {
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
    0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
    0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

#ifdef HAS_FP8_PAIRS
/* Upper and lower byte, as bf16, of the 128 e4m3 numbers without sign. */
typedef struct {
    __m512i high[2], low[2];
} Tables;
INLINE Tables e4m3_tables(void) {
    uint8_t high[128], low[128];
    Tables t;
    for (int i = 0; i < 128; i++) {
        uint32_t bits = i == 127 ? 0x7fc00000u : i < 8 ? bits_of((float)i * 0x1p-9f) : ((uint32_t)i << 20) + (120u << 23);
        high[i] = (uint8_t)(bits >> 24), low[i] = (uint8_t)(bits >> 16);
    }
    for (int i = 0; i < 2; i++)
        t.high[i] = _mm512_loadu_si512(high + 64 * i), t.low[i] = _mm512_loadu_si512(low + 64 * i);
    return t;
}
#else
typedef int Tables;
INLINE Tables e4m3_tables(void) { return 0; }
#endif

INLINE void unpack_halves(enum Format format, const Tables *tables, const uint8_t *p, __m512i *w) {
    (void)tables;
    __m512i words = _mm512_loadu_si512(p), table = _mm512_loadu_si512(E2M1_HALVES);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        if (format == FORMAT_FP4) w[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table);
        else if (format == FORMAT_INT8) {
            __m512 even = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 32 * j))));
            __m512 odd = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 32 * j + 16))));
            w[j] = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        } else w[j] = _mm512_loadu_si512(p + 64 * (format == FORMAT_BF16 ? j : 0));
    }
#ifdef HAS_FP8_PAIRS
    for (int j = 0; j < 2 && format == FORMAT_FP8; j++) {
        __m512i codes = _mm512_loadu_si512(p + 64 * j), sign = _mm512_set1_epi8((char)0x80);
        __m512i high = _mm512_permutex2var_epi8(tables->high[0], codes, tables->high[1]); /* by the low 7 bits */
        __m512i low = _mm512_permutex2var_epi8(tables->low[0], codes, tables->low[1]);
        high = _mm512_or_si512(high, _mm512_and_si512(codes, sign));
        w[2 * j] = _mm512_unpacklo_epi8(low, high);
        w[2 * j + 1] = _mm512_unpackhi_epi8(low, high);
    }
#endif
}
#endif

/* Scales of step `s` of weight row `n`, a lane each. */
INLINE Lanes step_scales(enum Format format, const Weight *w, long n, long s) {
    if (format == FORMAT_FP8) return (Lanes){0} + w->scales[n / 128 * ((w->in + 127) / 128) + s * STEP / 128];
    if (format != FORMAT_FP4) return (Lanes){0} + 1.0f;
    long groups = (w->in + 31) / 32, first = s * STEP / 32;
    const uint8_t *bytes = w->exponents + n * groups + first;
#ifdef __AVX512F__
    uint32_t four = 0x7f7f7f7f;
    if (groups - first >= 4) memcpy(&four, bytes, 4);
    else memcpy(&four, bytes, groups - first);
    const __m128i spread = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512i b = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi32_si128((int)four), spread));
    __m512i bits = _mm512_slli_epi32(b, 23);
    /* bytes 0 and 255 have the mantissa's first bit set */
    __mmask16 special = _mm512_cmple_epu32_mask(_mm512_and_si512(_mm512_add_epi32(b, _mm512_set1_epi32(1)), _mm512_set1_epi32(255)),
                                                _mm512_set1_epi32(1));
    return (Lanes)_mm512_mask_or_epi32(bits, special, bits, _mm512_set1_epi32(1 << 22));
#else
    Lanes scale;
    for (int i = 0; i < LANE_COUNT; i++) scale[i] = first + i / 4 < groups ? from_e8m0(bytes[i / 4]) : 1.0f;
    return scale;
#endif
}

#endif
