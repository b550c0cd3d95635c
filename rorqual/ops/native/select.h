/* The choice of the best entries, shared by the indexer's kernels. */

#ifndef RORQUAL_SELECT_H
#define RORQUAL_SELECT_H

#include "common.h"

/* The k-th largest of n values (1-based); reorders `v`. */
INLINE float kth_largest(float *v, long n, long k) {
    long lo = 0, hi = n - 1, want = k - 1;
    while (lo < hi) {
        float pivot = v[lo + (hi - lo) / 2];
        long i = lo, j = hi;
        while (i <= j) {
            while (v[i] > pivot) i++;
            while (v[j] < pivot) j--;
            if (i <= j) {
                float swap = v[i];
                v[i++] = v[j];
                v[j--] = swap;
            }
        }
        if (want <= j) hi = j;
        else if (want >= i) lo = i;
        else break;
    }
    return v[want];
}

#endif
