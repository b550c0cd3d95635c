/* Included twice by matvec.c, once for each element type. */

#include "types.h"
#include "kernels.h"

INLINE Weight NAME(weight_of)(long format, const uint8_t *codes, const uint8_t *exponents, const float *scales, long out,
                              long in) {
    return (Weight){.format = (enum Format)format, .codes = codes, .exponents = exponents, .scales = scales, .out = out,
                    .in = in, .in_halves = PER_WORD == 2 && pairs_fit((enum Format)format)};
}
#ifdef ELEMENT_BF16
#define PREPARE_ROW prepare_bf16
#else
#define PREPARE_ROW prepare_float
#endif

/* y [rows, groups, out] = x [rows, groups, in], each group times the transpose of its own rows of a weight [groups * out,
 * in] in `format` (packed_products.h), rounded once. */
void NAME(packed_matvec)(const T *x, const uint8_t *codes, const uint8_t *exponents, const float *scales, long format,
                         long rows, long groups, long out, long in, T *y) {
    Weight w = NAME(weight_of)(format, codes, exponents, scales, groups * out, in);
    long bytes = prepared_bytes(&w);
    uint8_t *ready = aligned_alloc(64, (rows < CHUNK ? rows : CHUNK) * bytes + 64);
    const void *row[CHUNK];
    for (long m = 0; m < CHUNK; m++) row[m] = ready + m * bytes;
#pragma omp parallel if (rows * groups * out * in > FORK_FROM)
    for (long lo = 0; lo < rows; lo += CHUNK)
        for (long g = 0; g < groups; g++) {
            long count = rows - lo < CHUNK ? rows - lo : CHUNK;
            float part[CHUNK * RANGE];
#pragma omp for schedule(static)
            for (long m = 0; m < count; m++) PREPARE_ROW(&w, x + ((lo + m) * groups + g) * in, ready + m * bytes);
#pragma omp for schedule(static)
            for (long first = 0; first < out; first += RANGE) {
                long last = first + RANGE < out ? first + RANGE : out;
                packed_products(&w, row, count, g * out + first, g * out + last, part, RANGE);
                for (long m = 0; m < count; m++)
                    for (long i = 0; i < last - first; i++)
                        PUT(y, ((lo + m) * groups + g) * out + first + i, part[m * RANGE + i]);
            }
        }
    free(ready);
}

/* Routed experts: row r of the sorted order belongs to token[r] and expert e where bounds[e] <= r < bounds[e + 1]; gate
 * [rows] is its routing weight. x [tokens, d]; stacked weights w1 and w3 [E, inner, d], w2 [E, d, inner], all in `format`
 * -> out [rows, d]. Work is cut over weight rows, so that a few experts keep every thread busy. limit 0: no clamp. */
void NAME(packed_experts)(const T *x, const int64_t *token, const int64_t *bounds, const float *gate,
                          const uint8_t *codes1, const uint8_t *exponents1, const float *scales1, const uint8_t *codes3,
                          const uint8_t *exponents3, const float *scales3, const uint8_t *codes2,
                          const uint8_t *exponents2, const float *scales2, long format, long tokens, long experts, long d,
                          long inner, float limit, T *out) {
    Weight w1 = NAME(weight_of)(format, codes1, exponents1, scales1, inner, d);
    Weight w3 = NAME(weight_of)(format, codes3, exponents3, scales3, inner, d);
    Weight w2 = NAME(weight_of)(format, codes2, exponents2, scales2, d, inner);
    float top = limit > 0.0f ? limit : INFINITY;
    long rows = bounds[experts], chunks = 0, wide = prepared_bytes(&w1), thick = prepared_bytes(&w2);
    long up_ranges = (inner + RANGE - 1) / RANGE, down_ranges = (d + RANGE - 1) / RANGE;
    struct {
        long expert, first, count;
    } *chunk = malloc(sizeof *chunk * (rows + 1));
    for (long e = 0; e < experts; e++)
        for (long r = bounds[e]; r < bounds[e + 1]; r += CHUNK, chunks++)
            chunk[chunks].expert = e, chunk[chunks].first = r,
            chunk[chunks].count = bounds[e + 1] - r < CHUNK ? bounds[e + 1] - r : CHUNK;
    uint8_t *ready = aligned_alloc(64, tokens * wide + 64), *ready_hidden = aligned_alloc(64, rows * thick + 64);
    T *hidden = malloc(sizeof(T) * rows * inner + 64);
#pragma omp parallel if (rows * d * inner > FORK_FROM)
    {
        float a[CHUNK * RANGE], u[CHUNK * RANGE];
        const void *row[CHUNK];
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++) PREPARE_ROW(&w1, x + t * d, ready + t * wide);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < chunks * up_ranges; item++) {
            long c = item / up_ranges, lo = chunk[c].first, first = item % up_ranges * RANGE;
            long last = first + RANGE < inner ? first + RANGE : inner;
            Weight gate_weight = stacked(w1, chunk[c].expert), up_weight = stacked(w3, chunk[c].expert);
            for (long m = 0; m < chunk[c].count; m++) row[m] = ready + token[lo + m] * wide;
            packed_products(&gate_weight, row, chunk[c].count, first, last, a, RANGE);
            packed_products(&up_weight, row, chunk[c].count, first, last, u, RANGE);
            for (long m = 0; m < chunk[c].count; m++)
                for (long i = 0; i < last - first; i++) {
                    float g = min_(a[m * RANGE + i], top), v = min_(max_(u[m * RANGE + i], -top), top);
                    PUT(hidden, (lo + m) * inner + first + i, g * sigmoid_(g) * v * gate[lo + m]);
                }
        }
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) PREPARE_ROW(&w2, hidden + r * inner, ready_hidden + r * thick);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < chunks * down_ranges; item++) {
            long c = item / down_ranges, lo = chunk[c].first, first = item % down_ranges * RANGE;
            long last = first + RANGE < d ? first + RANGE : d;
            Weight down_weight = stacked(w2, chunk[c].expert);
            for (long m = 0; m < chunk[c].count; m++) row[m] = ready_hidden + (lo + m) * thick;
            packed_products(&down_weight, row, chunk[c].count, first, last, a, RANGE);
            for (long m = 0; m < chunk[c].count; m++)
                for (long i = 0; i < last - first; i++) PUT(out, (lo + m) * d + first + i, a[m * RANGE + i]);
        }
    }
    free(ready), free(ready_hidden), free(hidden), free(chunk);
}

#undef PREPARE_ROW
