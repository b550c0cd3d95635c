/* pointwise.py: functions of one number, the same bits wherever the number stands: the last few of a tensor go through
 * the same vectors as all others. */

#include "common.h"
#include "vectors.h"

void sigmoid_each(const float *x, long n, float *y) {
#pragma omp parallel for schedule(static) if (n > FORK_FROM)
    for (long i = 0; i < n; i += VECTOR) store(y + i, n - i, sigmoid_lanes(load(x + i, n - i)));
}

void silu_each(const float *x, long n, float *y) {
#pragma omp parallel for schedule(static) if (n > FORK_FROM)
    for (long i = 0; i < n; i += VECTOR) {
        Vector v = load(x + i, n - i);
        store(y + i, n - i, larger(v, -87.0f) * sigmoid_lanes(v)); /* which is never quite 0 */
    }
}
