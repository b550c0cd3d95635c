/* Included twice by linear.c, once for each element type. */

#include "dots.h"
#include "kernels.h"

#ifndef ELEMENT_BF16
#define LINEAR_BLOCK 64
#endif

/* x [rows, groups, in], w [groups, out, in] -> [rows, groups, out], each group with its own matrix: rounded to y, or as
 * the fp32 sums to `exact` (the other one is NULL). */
void NAME(linear)(const T *x, const T *w, long rows, long groups, long out, long in, T *y, float *exact) {
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
