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

/* Expert e's own matrix of a stack `w`, or where `places` says that it lies. */
INLINE Weight NAME(expert_of)(Weight w, const int64_t *places, long e, int matrix) {
    if (!places) return stacked(w, e);
    const int64_t *mine = places + e * EXPERT_PLACES + 2 * matrix;
    const void *scale = (const void *)(uintptr_t)mine[1];
    w.codes = (const uint8_t *)(uintptr_t)mine[0];
    if (w.format == FORMAT_FP4) w.exponents = scale;
    else w.scales = scale;
    return w;
}

/* Routed experts: row r of the sorted order belongs to token[r] and expert e where bounds[e] <= r < bounds[e + 1]; gate
 * [rows] is its routing weight. x [tokens, d]; stacked weights w1 and w3 [E, inner, d], w2 [E, d, inner], all in `format`
 * -> out [rows, d]. Work is cut over weight rows, so that a few experts keep every thread busy. limit 0: no clamp.
 * With `places` [E][EXPERT_PLACES] there are no stacks: addresses of w1, its scales, w3, its scales, w2, its scales of each
 * expert, 0 for those that are not there, whose rows of `out` are left as they are. */
void NAME(packed_experts)(const T *x, const int64_t *token, const int64_t *bounds, const float *gate,
                          const uint8_t *codes1, const uint8_t *exponents1, const float *scales1, const uint8_t *codes3,
                          const uint8_t *exponents3, const float *scales3, const uint8_t *codes2,
                          const uint8_t *exponents2, const float *scales2, long format, long tokens, long experts, long d,
                          long inner, float limit, const int64_t *places, T *out) {
    Weight w1 = NAME(weight_of)(format, codes1, exponents1, scales1, inner, d);
    Weight w3 = NAME(weight_of)(format, codes3, exponents3, scales3, inner, d);
    Weight w2 = NAME(weight_of)(format, codes2, exponents2, scales2, d, inner);
    float top = limit > 0.0f ? limit : INFINITY;
    long rows = bounds[experts], chunks = 0, wide = prepared_bytes(&w1), thick = prepared_bytes(&w2);
    long up_ranges = (inner + RANGE - 1) / RANGE, down_ranges = (d + RANGE - 1) / RANGE;
    struct {
        long expert, first, count;
    } *chunk = malloc(sizeof *chunk * (rows + 1));
    uint8_t *is_read = calloc(tokens, 1);
    for (long e = 0; e < experts; e++) {
        if (places && !places[e * EXPERT_PLACES]) continue;
        for (long r = bounds[e]; r < bounds[e + 1]; r += CHUNK, chunks++)
            chunk[chunks].expert = e, chunk[chunks].first = r,
            chunk[chunks].count = bounds[e + 1] - r < CHUNK ? bounds[e + 1] - r : CHUNK;
        for (long r = bounds[e]; r < bounds[e + 1]; r++) is_read[token[r]] = 1;
    }
    uint8_t *ready = aligned_alloc(64, tokens * wide + 64), *ready_hidden = aligned_alloc(64, rows * thick + 64);
    T *hidden = malloc(sizeof(T) * rows * inner + 64);
#pragma omp parallel if (rows * d * inner > FORK_FROM)
    {
        float a[CHUNK * RANGE], u[CHUNK * RANGE];
        const void *row[CHUNK];
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++)
            if (is_read[t]) PREPARE_ROW(&w1, x + t * d, ready + t * wide);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < chunks * up_ranges; item++) {
            long c = item / up_ranges, lo = chunk[c].first, first = item % up_ranges * RANGE;
            long last = first + RANGE < inner ? first + RANGE : inner;
            Weight gate_weight = NAME(expert_of)(w1, places, chunk[c].expert, 0);
            Weight up_weight = NAME(expert_of)(w3, places, chunk[c].expert, 1);
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
        for (long c = 0; c < chunks; c++)
            for (long r = chunk[c].first; r < chunk[c].first + chunk[c].count; r++)
                PREPARE_ROW(&w2, hidden + r * inner, ready_hidden + r * thick);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < chunks * down_ranges; item++) {
            long c = item / down_ranges, lo = chunk[c].first, first = item % down_ranges * RANGE;
            long last = first + RANGE < d ? first + RANGE : d;
            Weight down_weight = NAME(expert_of)(w2, places, chunk[c].expert, 2);
            for (long m = 0; m < chunk[c].count; m++) row[m] = ready_hidden + (lo + m) * thick;
            packed_products(&down_weight, row, chunk[c].count, first, last, a, RANGE);
            for (long m = 0; m < chunk[c].count; m++)
                for (long i = 0; i < last - first; i++) PUT(out, (lo + m) * d + first + i, a[m * RANGE + i]);
        }
    }
    free(ready), free(ready_hidden), free(hidden), free(chunk), free(is_read);
}

#undef PREPARE_ROW
