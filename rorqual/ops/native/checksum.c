/* The checksum of the disk cache (engine/store/checksum.py, which is its reference), of several rows of words: two
 * multilinear sums modulo 2^64, chunk by chunk. Unsigned arithmetic wraps, so the order of additions does not matter. */

#include <stdint.h>

void checksum_words(const int64_t *words, const int64_t *factors, int64_t *sums, long rows, long stride, long count,
                    long chunk) {
    const uint64_t *a = (const uint64_t *)factors, *b = a + chunk;
    for (long row = 0; row < rows; row++) {
        const uint64_t *w = (const uint64_t *)words + row * stride;
        uint64_t total = (uint64_t)count;
        for (long at = 0; at < count; at += chunk) {
            long n = count - at < chunk ? count - at : chunk;
            uint64_t part = 0;
            for (long i = 0; i < n; i++)
                part += w[at + i] * a[i] + (w[at + i] >> 32) * b[i];
            total = total * UINT64_C(0x9E3779B97F4A7C15) + part;
        }
        sums[row] = (int64_t)total;
    }
}
