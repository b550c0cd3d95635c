/* Included twice by linear.c, once for each element type. */

#include "kernels.h"
#include "panels.h"

#ifndef ELEMENT_BF16
#define LINEAR_BLOCK 64
#endif

/* m rows times one panel, to the first `n` columns of y or of `exact` (row stride y_row). */
INLINE void NAME(panel_column)(long m, long in, const PANEL_WORD *const *row, const PANEL_WORD *panel, long n, long y_row,
                               T *y, float *exact) {
    for (long i = 0; i < m; i += PANEL_HEIGHT) {
        Vector sums[PANEL_HEIGHT][PANEL_VECTORS];
        NAME(panel_block)(n, row + i, in, panel, sums);
#pragma GCC unroll 8
        for (int r = 0; r < PANEL_HEIGHT; r++) {
            if (i + r >= m) break;
            for (long j = 0; j < PANEL && j < n; j += VECTOR) {
                if (exact) store(exact + (i + r) * y_row + j, n - j, sums[r][j / VECTOR]);
                else STORE(y + (i + r) * y_row + j, n - j, sums[r][j / VECTOR]);
            }
        }
    }
}

/* `linear` by panels. */
static void NAME(linear_panels)(const T *x, const T *w, long rows, long groups, long out, long in, T *y, float *exact) {
    long row_blocks = (rows + PANEL_ROWS - 1) / PANEL_ROWS, panels = (out + PANEL - 1) / PANEL;
    long size = NAME(panel_words)(PANEL, in);
    PANEL_WORD *turned = aligned_alloc(64, sizeof(PANEL_WORD) * groups * panels * size);
    SHARED_OUT(groups * out * in > FORK_FROM, long p = 0; p < groups * panels; p++, {
        long j = p % panels * PANEL;
        NAME(make_panel)(w + (p / panels * out + j) * in, in, out - j < PANEL ? out - j : PANEL, in, turned + p * size);
    });
    SHARED_OUT(rows * groups * out * in > FORK_FROM, long job = 0; job < row_blocks * groups; job++, {
        long first = job / groups * PANEL_ROWS, g = job % groups;
        long m = rows - first < PANEL_ROWS ? rows - first : PANEL_ROWS;
        const PANEL_WORD *row[PANEL_ROWS];
        PANEL_WORD *room = NAME(panel_room)(m, in);
        NAME(panel_rows)(m, in, x + (first * groups + g) * in, NULL, groups * in, room, row);
        for (long p = 0; p < panels; p++) {
            long to = (first * groups + g) * out + p * PANEL;
            NAME(panel_column)(m, in, row, turned + (g * panels + p) * size, out - p * PANEL, groups * out,
                               exact ? NULL : y + to, exact ? exact + to : NULL);
        }
        free(room);
    });
    free(turned);
}

/* x [rows, groups, in], w [groups, out, in] -> [rows, groups, out], each group with its own matrix: rounded to y, or as
 * the fp32 sums to `exact` (the other one is NULL). */
void NAME(linear)(const T *x, const T *w, long rows, long groups, long out, long in, T *y, float *exact) {
    if (NAME(panels_fit)(rows, in)) {
        NAME(linear_panels)(x, w, rows, groups, out, in, y, exact);
        return;
    }
    long row_blocks = (rows + LINEAR_BLOCK - 1) / LINEAR_BLOCK, out_blocks = (out + LINEAR_BLOCK - 1) / LINEAR_BLOCK;
    SHARED_OUT(rows * groups * out * in > FORK_FROM, long job = 0; job < row_blocks * groups * out_blocks; job++, {
        long i = job / (groups * out_blocks) * LINEAR_BLOCK, g = job / out_blocks % groups;
        long j = job % out_blocks * LINEAR_BLOCK;
        long m = rows - i < LINEAR_BLOCK ? rows - i : LINEAR_BLOCK, n = out - j < LINEAR_BLOCK ? out - j : LINEAR_BLOCK;
        float block[LINEAR_BLOCK * LINEAR_BLOCK];
        NAME(dots)(m, n, in, x + (i * groups + g) * in, NULL, groups * in, w + (g * out + j) * in, NULL, in, block,
                   LINEAR_BLOCK);
        for (long r = 0; r < m; r++) {
            long to = ((i + r) * groups + g) * out + j;
            for (long e = 0; e < n; e += VECTOR) {
                Vector sums = load(block + r * LINEAR_BLOCK + e, n - e);
                if (exact) store(exact + to + e, n - e, sums);
                else STORE(y + to + e, n - e, sums);
            }
        }
    });
}
