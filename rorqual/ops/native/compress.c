/* compress.py and rope.py's table: the pooling of blocks of tokens into entries, and angles, one row at a time. */

#include "compress.h"

INLINE void pool_channels(const float *const *kv, const float *const *score, long slots, long width, float *out) {
    Vector top = (Vector){0} - INFINITY, total = {0}, sum = {0};
    for (long s = 0; s < slots; s++) {
        Vector x = load(score[s], width);
        top = choose(top < x, x, top);
    }
    for (long s = 0; s < slots; s++) {
        Vector w = exp_lanes(load(score[s], width) - top);
        total = total + w;
        sum = sum + w * load(kv[s], width);
    }
    store(out, width, sum / total);
}

void compress_entry(const float *const *kv, const float *const *score, long slots, long width, float *out) {
    const float *a[slots], *b[slots];
    for (long i = 0; i < width; i += VECTOR) {
        for (long s = 0; s < slots; s++) a[s] = kv[s] + i, b[s] = score[s] + i;
        pool_channels(a, b, slots, width - i, out + i);
    }
}

/* Rows index[e][s] of kv and score [any, width] are the slots of entry e; its first skip[e] slots do not count.
 * -> out [entries, width]. */
void compress_pool(const float *kv, const float *score, const int64_t *index, const int64_t *skip, long entries,
                   long slots, long width, float *out) {
#pragma omp parallel for schedule(static) if (entries * slots * width > FORK_FROM)
    for (long e = 0; e < entries; e++) {
        const float *a[slots], *b[slots];
        long n = 0;
        for (long s = skip[e]; s < slots; s++, n++) {
            a[n] = kv + index[e * slots + s] * width;
            b[n] = score + index[e * slots + s] * width;
        }
        compress_entry(a, b, n, width, out + e * width);
    }
}

/* Cosine and sine of position x frequency, fp32 angles: -> out [rows, pairs, 2]. */
void rope_angles(const int64_t *positions, const float *frequencies, long rows, long pairs, float *out) {
    SHARED_OUT(rows * pairs > 4096, long t = 0; t < rows; t++, {
        for (long i = 0; i < pairs; i++) {
            float angle = (float)positions[t] * frequencies[i];
            out[(t * pairs + i) * 2] = cosf(angle);
            out[(t * pairs + i) * 2 + 1] = sinf(angle);
        }
    });
}
