/* Panels of one vector: included by panels.h, once for each element type. */

#ifndef RORQUAL_WIDE_PANELS
#define RORQUAL_WIDE_PANELS
/* a [16 rows][16 words] -> its transpose. */
INLINE void turn_16(const Bits *a, Bits *out) {
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
}
#endif

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
            sum[r] = sum[r] + one * *(const Vector *)words; /* a zero added to `one` would be an addition and a shuffle */
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


/* PANEL_HEIGHT rows of k elements times the first `columns` of a panel, or more of it. */
INLINE void NAME(panel_block)(long columns, const WORD *const *row, long k, const WORD *panel,
                              Vector (*out)[PANEL_VECTORS]) {
    (void)columns;
    NAME(panel_all)(PANEL_HEIGHT, 0, k / PER_WORD / VECTOR, row, panel, out[0]);
}
