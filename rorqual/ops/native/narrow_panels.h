/* Panels of several vectors: included by panels.h, once for each element type.
 *
 * A panel lies in the order in which it is read: block by block of `dots`, in a block lane by lane, [VECTOR lanes][words of
 * a lane][PER_WORD][16]. */

#ifndef RORQUAL_NARROW_PANELS
#define RORQUAL_NARROW_PANELS
#if VECTOR == 8
static const unsigned char PANEL_LANES[VECTOR] = {0, 4, 2, 6, 1, 5, 3, 7}; /* as the tree of sum_lanes meets them */
#else
static const unsigned char PANEL_LANES[VECTOR] = {0, 2, 1, 3};
#endif
#define PANEL_DEPTH 4 /* sums of the tree that wait for their partner, at most */

/* a [VECTOR rows][VECTOR words] -> its transpose. */
INLINE void turn_square(const Bits *a, Bits *out) {
#if VECTOR == 8
    __m256 b[8], c[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps((__m256)a[i], (__m256)a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps((__m256)a[i], (__m256)a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { /* c[i + j]: words j and 4 + j of rows i to i + 3 */
        c[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        c[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        c[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        c[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        out[j] = (Bits)_mm256_permute2f128_ps(c[j], c[4 + j], 0x20);
        out[4 + j] = (Bits)_mm256_permute2f128_ps(c[j], c[4 + j], 0x31);
    }
#else
    for (int i = 0; i < VECTOR; i++)
        for (int j = 0; j < VECTOR; j++) out[j][i] = a[i][j];
#endif
}

/* PANEL_HEIGHT rows, whose words are `each` floats, times the first `vectors` of a panel of `steps` words a lane. */
INLINE void panel_sums(int vectors, int each, const float *const *row, long steps, const float *panel,
                       Vector (*out)[PANEL_VECTORS]) {
    Vector kept[PANEL_DEPTH][PANEL_HEIGHT][PANEL_VECTORS];
    int depth = 0;
    for (int i = 0; i < VECTOR; i++) {
        Vector sum[PANEL_HEIGHT][PANEL_VECTORS];
        const float *words = panel + PANEL_LANES[i] * steps * each * PANEL;
        long at = PANEL_LANES[i] * each;
#pragma GCC unroll 8
        for (int r = 0; r < PANEL_HEIGHT; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = (Vector){0};
        for (long s = 0; s < steps; s++, at += VECTOR * each) {
#pragma GCC unroll 2
            for (int e = 0; e < each; e++, words += PANEL) {
                Vector b[PANEL_VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    b[v] = load(words + v * VECTOR, VECTOR);
                    IN_REGISTER(b[v]);
                }
#pragma GCC unroll 8
                for (int r = 0; r < PANEL_HEIGHT; r++) {
                    float a = row[r][at + e];
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++) sum[r][v] = sum[r][v] + a * b[v];
                }
            }
        }
        for (int done = i; done & 1; done >>= 1) { /* a lane with an odd number completes a sum, and so does that one */
            depth--;
#pragma GCC unroll 8
            for (int r = 0; r < PANEL_HEIGHT; r++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sum[r][v] = kept[depth][r][v] + sum[r][v];
        }
        Vector (*to)[PANEL_VECTORS] = i + 1 < VECTOR ? kept[depth++] : out;
#pragma GCC unroll 8
        for (int r = 0; r < PANEL_HEIGHT; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) to[r][v] = sum[r][v];
    }
}
#endif

#undef PANEL_BLOCK
#define PANEL_BLOCK (DOT_STEPS * VECTOR * PER_WORD) /* elements, behind which `dots` begins its sums anew */

/* The `n` (at most 16) rows of b as a panel; missing rows count as 0. */
INLINE void NAME(make_panel)(const T *b, long b_row, long n, long k, float *panel) {
    for (long at = 0; at < k; at += VECTOR * PER_WORD) {
        long first = at / PANEL_BLOCK * PANEL_BLOCK, count = k - first < PANEL_BLOCK ? k - first : PANEL_BLOCK;
        float *lanes = panel + (first + (at - first) / VECTOR) * PANEL;
        for (int v = 0; v < PANEL_VECTORS; v++) {
            Bits a[VECTOR], turned[VECTOR];
            const T *from = b + v * VECTOR * b_row + at;
#pragma GCC unroll 8
            for (int r = 0; r < VECTOR; r++)
                a[r] = v * VECTOR + r < n ? *(const Bits *)(from + r * b_row) : (Bits){0};
            turn_square(a, turned);
#pragma GCC unroll 8
            for (int i = 0; i < VECTOR; i++) {
                float *to = lanes + i * (count / VECTOR) * PANEL + v * VECTOR;
#ifdef ELEMENT_BF16
                *(Bits *)to = turned[i] << 16;
                *(Bits *)(to + PANEL) = turned[i] & 0xffff0000u;
#else
                *(Bits *)to = turned[i];
#endif
            }
        }
    }
}

/* PANEL_HEIGHT rows of k elements times the first `columns` of a panel, or more of it. */
INLINE void NAME(panel_block)(long columns, const float *const *row, long k, const float *panel,
                              Vector (*out)[PANEL_VECTORS]) {
    for (long first = 0; first < k; first += PANEL_BLOCK) {
        long steps = (k - first < PANEL_BLOCK ? k - first : PANEL_BLOCK) / PER_WORD / VECTOR;
        const float *from[PANEL_HEIGHT];
        Vector before[PANEL_HEIGHT][PANEL_VECTORS];
        for (int r = 0; r < PANEL_HEIGHT; r++) from[r] = row[r] + first;
        if (first) memcpy(before, out, sizeof(before));
        if (columns > PANEL / 2) panel_sums(PANEL_VECTORS, PER_WORD, from, steps, panel + first * PANEL, out);
        else panel_sums(PANEL_VECTORS / 2, PER_WORD, from, steps, panel + first * PANEL, out);
        for (int r = 0; r < PANEL_HEIGHT && first; r++)
            for (int v = 0; v < PANEL_VECTORS && v * VECTOR < columns; v++) out[r][v] = before[r][v] + out[r][v];
    }
}
