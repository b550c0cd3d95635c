/* Inner products in the order of `dots.h`, bit by bit, for many rows at once: VECTOR rows of the other operand are turned into a
 * panel whose vectors hold one word of each, so that sums need no shuffles and a panel's vector serves several rows.
 *
 * A lane's partial sums are those that `dots` keeps in the lanes of one vector. They are made one after the other in the
 * order in which its tree adds them up, so that few are alive at a time. */

#include "dots.h"

#ifndef RORQUAL_PANELS
#define RORQUAL_PANELS
#ifdef __AVX512F__
#define HAS_PANELS 1 /* narrower processors have too few registers */
#endif
#define PANEL_HEIGHT 6 /* rows worked on at once */
#define PANELS_FROM 48 /* rows from which turning pays */
#define PANEL_STEPS 8  /* of 16 words, up to which it does: in longer rows the shuffles of `dots` are few */

/* a [16 rows][16 words] -> its transpose. */
INLINE void turn_16(const Bits *a, Bits *out) {
#ifdef __AVX512F__
    __m512i b[16], c[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32((__m512i)a[i], (__m512i)a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32((__m512i)a[i], (__m512i)a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        c[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        c[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        c[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        c[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) { /* c[4 i + j]: word 4 l + j of rows 4 i to 4 i + 3 in 128-bit lane l */
        __m512i even = _mm512_shuffle_i32x4(c[j], c[4 + j], 0x88), odd = _mm512_shuffle_i32x4(c[j], c[4 + j], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(c[8 + j], c[12 + j], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(c[8 + j], c[12 + j], 0xdd);
        out[j] = (Bits)_mm512_shuffle_i32x4(even, even2, 0x88);
        out[4 + j] = (Bits)_mm512_shuffle_i32x4(odd, odd2, 0x88);
        out[8 + j] = (Bits)_mm512_shuffle_i32x4(even, even2, 0xdd);
        out[12 + j] = (Bits)_mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) out[j][i] = a[i][j];
#endif
}
#endif

/* Whether `rows` rows of k elements are multiplied by panels: whole steps only. */
INLINE int NAME(panels_fit)(long rows, long k) {
#ifdef HAS_PANELS
    return rows >= PANELS_FROM && k % (VECTOR * PER_WORD) == 0 && k <= PANEL_STEPS * VECTOR * PER_WORD;
#else
    return 0 * rows * k;
#endif
}
/* Words of the panels of n rows. */
INLINE long NAME(panel_words)(long n, long k) { return (n + VECTOR - 1) / VECTOR * VECTOR * (k / PER_WORD); }

/* The `n` (at most 16) rows of b as a panel [k / PER_WORD][16]; missing rows count as 0. */
INLINE void NAME(make_panel)(const T *b, long b_row, long n, long k, WORD *panel) {
    for (long w = 0; w < k / PER_WORD; w += VECTOR) {
        Bits a[VECTOR], turned[VECTOR];
#pragma GCC unroll 16
        for (int r = 0; r < VECTOR; r++) a[r] = r < n ? *(const Bits *)(b + r * b_row + w * PER_WORD) : (Bits){0};
        turn_16(a, turned);
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR; i++) *(Bits *)(panel + (w + i) * VECTOR) = turned[i];
    }
}
/* All panels of b [n][k], one behind the other. */
__attribute__((unused)) static void NAME(make_panels)(const T *b, long n, long k, WORD *panels) {
    for (long j = 0; j < n; j += VECTOR)
        NAME(make_panel)(b + j * k, k, n - j < VECTOR ? n - j : VECTOR, k, panels + NAME(panel_words)(j, k));
}

/* Partial sum `lane` of `height` rows: words lane, lane + 16, ... of `steps` times 16. */
INLINE void NAME(panel_lane)(int height, int lane, long steps, const WORD *const *a, const WORD *panel, Vector *sum) {
#pragma GCC unroll 8
    for (int r = 0; r < height; r++) sum[r] = (Vector){0};
    for (long s = 0; s < steps; s++) {
        const WORD *words = panel + (s * VECTOR + lane) * VECTOR;
#pragma GCC unroll 8
        for (int r = 0; r < height; r++) {
            WORD one = a[r][s * VECTOR + lane];
#ifdef ELEMENT_BF16
            sum[r] = add_products_bf16(sum[r], (Bits){0} + one, *(const Bits *)words);
#else
            sum[r] = add_products(sum[r], (Vector){0} + one, *(const Vector *)words);
#endif
        }
    }
}
/* The same added up over 2, 4, 8 and 16 lanes, as `sum_lanes` does. */
#define PANEL_SUM(name, part, distance)                                                                               \
    INLINE void NAME(name)(int height, int lane, long steps, const WORD *const *a, const WORD *panel, Vector *sum) { \
        Vector other[8];                                                                                              \
        NAME(part)(height, lane, steps, a, panel, sum);                                                               \
        NAME(part)(height, lane + distance, steps, a, panel, other);                                                  \
        _Pragma("GCC unroll 8") for (int r = 0; r < height; r++) sum[r] = sum[r] + other[r];                          \
    }
PANEL_SUM(panel_pair, panel_lane, 8)
PANEL_SUM(panel_four, panel_pair, 4)
PANEL_SUM(panel_eight, panel_four, 2)
PANEL_SUM(panel_all, panel_eight, 1)
#undef PANEL_SUM

/* PANEL_HEIGHT rows of a from `i` on (rows `index` of it unless NULL); where there are fewer than m, row i again. */
INLINE void NAME(panel_block)(long i, long m, long k, const T *a, const int64_t *index, long a_row, const WORD *panel,
                              Vector *out) {
    const WORD *row[PANEL_HEIGHT];
#pragma GCC unroll 8
    for (int r = 0; r < PANEL_HEIGHT; r++) {
        long at = i + r < m ? i + r : i;
        row[r] = (const WORD *)(a + (index ? index[at] : at) * a_row);
    }
    NAME(panel_all)(PANEL_HEIGHT, 0, k / PER_WORD / VECTOR, row, panel, out);
}
