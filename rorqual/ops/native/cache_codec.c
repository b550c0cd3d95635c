/* cache_codec.py: rows of quantised caches, written and read. */

#include "row_codecs.h"

/* x [rows, nope + rope] -> packed [rows, entry_row_bytes]. */
void encode_entries(const float *x, long rows, long nope, long rope, uint8_t *packed) {
#pragma omp parallel for schedule(static) if (rows > 64)
    for (long r = 0; r < rows; r++)
        encode_entry(x + r * (nope + rope), nope, rope, packed + r * entry_row_bytes(nope, rope));
}

void decode_entries(const uint8_t *packed, long rows, long nope, long rope, float *x) {
#pragma omp parallel for schedule(static) if (rows > 64)
    for (long r = 0; r < rows; r++)
        decode_entry(packed + r * entry_row_bytes(nope, rope), nope, rope, x + r * (nope + rope));
}

/* x [rows, width] -> packed [rows, key_row_bytes]; width is even. */
void encode_keys(const float *x, long rows, long width, uint8_t *packed) {
#pragma omp parallel for schedule(static) if (rows > 64)
    for (long r = 0; r < rows; r++) encode_key(x + r * width, width, packed + r * key_row_bytes(width));
}

void decode_keys(const uint8_t *packed, long rows, long width, float *x) {
#pragma omp parallel for schedule(static) if (rows > 64)
    for (long r = 0; r < rows; r++) decode_key(packed + r * key_row_bytes(width), width, x + r * width);
}
