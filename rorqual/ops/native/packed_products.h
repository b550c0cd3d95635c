/* Weights as they are stored times rows of activations: what matvec.py and packed_experts.py share.
 *
 *   out[m][n] = sum over steps of scale[n][step] * (sum over the step's channels of w[n][c] * x[m][c])
 *
 * A step is 8 vectors of channels. Every result has one order of additions, whatever the number of rows: the products of
 * a step from zero, times the step's scale, steps one after the other in as many partial sums as a vector has lanes, then
 * these. Scales are powers of two or constant over a step, so they can be applied to the sum. Few rows: a weight row is
 * unpacked in registers, once for all of them. Many: four weight rows are unpacked into cache first. The same bits. */

#ifndef RORQUAL_PACKED_PRODUCTS_H
#define RORQUAL_PACKED_PRODUCTS_H

#include "lanes.h"

#define FEW_ROWS 8
#define STEP (8 * LANE_COUNT) /* channels */
#define EXPERT_PLACES 6 /* addresses of an expert that lies on its own: codes and scales of w1, w3 and w2 */

enum Format { FORMAT_FP32, FORMAT_BF16, FORMAT_INT8, FORMAT_FP8, FORMAT_FP4 };

/* A matrix [out][in], rows contiguous. */
typedef struct {
    enum Format format;
    const uint8_t *codes;
    const uint8_t *exponents; /* FP4: e8m0 [out][ceil(in / 32)] */
    const float *scales; /* FP8: [ceil(out / 128)][ceil(in / 128)]; INT8: [out] */
    long out, in;
    int in_halves; /* activations and unpacked weights are bf16, two products a lane */
} Weight;

/* Whether products of bf16 activations with such weights can be made two at a time. */
int pairs_fit(enum Format format);

/* Bytes of a prepared row of activations, and the row itself: x [in] in the order in which weights are unpacked. */
long prepared_bytes(const Weight *w);
void prepare_float(const Weight *w, const float *x, void *out);
void prepare_bf16(const Weight *w, const uint16_t *x, void *out);

/* out[m * out_row + n - first] for weight rows n from `first` to `last` and all prepared rows; on the calling thread. */
void packed_products(const Weight *w, const void *const *x, long rows, long first, long last, float *out, long out_row);

INLINE long row_bytes_of(enum Format format, long in) {
    return format == FORMAT_FP32 ? 4 * in : format == FORMAT_BF16 ? 2 * in : format == FORMAT_FP4 ? in / 2 : in;
}

/* The matrix `index` of a stack of them. */
INLINE Weight stacked(Weight w, long index) {
    w.codes += index * w.out * row_bytes_of(w.format, w.in);
    if (w.format == FORMAT_FP4) w.exponents += index * w.out * ((w.in + 31) / 32);
    if (w.format == FORMAT_FP8) w.scales += index * ((w.out + 127) / 128) * ((w.in + 127) / 128);
    if (w.format == FORMAT_INT8) w.scales += index * w.out;
    return w;
}

#endif
