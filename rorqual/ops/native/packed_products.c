/* Inner products of packed weight rows with rows of activations (see packed_products.h). */

#include <stdlib.h>

#include "unpack_weights.h"

#define TILE_ROWS 4 /* weight rows unpacked into cache together */
#define TILE_STEPS 16
#ifdef __AVX512F__
#define BLOCK_ROWS 3 /* activation rows worked on at once */
#else
#define BLOCK_ROWS 2
#endif

int pairs_fit(enum Format format) {
#ifdef HAS_FP8_PAIRS
    return format != FORMAT_FP32;
#elif defined(HAS_BF16_PRODUCTS)
    return format != FORMAT_FP32 && format != FORMAT_FP8;
#else
    (void)format;
    return 0;
#endif
}

static long steps_of(const Weight *w) { return (w->in + STEP - 1) / STEP; }
long prepared_bytes(const Weight *w) { return steps_of(w) * STEP * (w->in_halves ? 2 : 4); }

#define PREPARE(as_float, as_half)                                                      \
    for (long first = 0; first < steps_of(w) * STEP; first += STEP)                     \
        for (long i = 0; i < STEP; i++) {                                               \
            long c = first + channel_of(w->format, w->in_halves, i);                    \
            if (w->in_halves) ((uint16_t *)out)[first + i] = c < w->in ? (as_half) : 0; \
            else ((float *)out)[first + i] = c < w->in ? (as_float) : 0.0f;             \
        }
void prepare_float(const Weight *w, const float *x, void *out) { PREPARE(x[c], to_bf16(x[c])) }
void prepare_bf16(const Weight *w, const uint16_t *x, void *out) { PREPARE(from_bf16(x[c]), x[c]) }

INLINE float add_lanes(Lanes x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int width = LANE_COUNT / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
#endif
}

/* Codes of step `s` of row `n`; the last step's are copied into `room`, with zeros behind them. */
INLINE const uint8_t *step_codes(enum Format format, const Weight *w, long n, long s, uint8_t *room) {
    const uint8_t *row = w->codes + n * row_bytes_of(format, w->in) + row_bytes_of(format, s * STEP);
    if ((s + 1) * STEP <= w->in) return row;
    memset(room, 0, 4 * STEP);
    memcpy(room, row, row_bytes_of(format, w->in - s * STEP));
    return room;
}
INLINE float row_scale(enum Format format, const Weight *w, long n) { return format == FORMAT_INT8 ? w->scales[n] : 1.0f; }

/* ---- few rows: `rows` is what the loops are unrolled for, `there` how many there are ----------------------------- */

INLINE void few_floats(enum Format format, int rows, const Weight *w, const void *const *x, long there, long n, float *out,
                       long out_row) {
    uint8_t room[4 * STEP];
    Lanes total[FEW_ROWS];
    const float *from[FEW_ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) total[m] = (Lanes){0}, from[m] = x[m < there ? m : 0];
    for (long s = 0; s < steps_of(w); s++) {
        Lanes v[8], scale = step_scales(format, w, n, s);
        unpack_floats(format, step_codes(format, w, n, s, room), v);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            Lanes sum = {0};
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) sum += v[j] * lanes_at(from[m] + s * STEP + j * LANE_COUNT);
            total[m] += sum * scale;
        }
    }
    for (long m = 0; m < there; m++) out[m * out_row] = add_lanes(total[m]) * row_scale(format, w, n);
}

#ifdef HAS_BF16_PRODUCTS
/* `weights` rows of weights, so that activations are read once for all of them. */
INLINE void few_halves(enum Format format, int rows, int weights, const Weight *w, const Tables *tables, const void *const *x,
                       long there, long n, float *out, long out_row) {
    uint8_t room[4 * STEP];
    __m512 total[2][FEW_ROWS];
    const uint16_t *from[FEW_ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        from[m] = x[m < there ? m : 0];
        for (int i = 0; i < weights; i++) total[i][m] = _mm512_setzero_ps();
    }
    for (long s = 0; s < steps_of(w); s++) {
        __m512i v[2][4];
        Lanes scale[2];
#pragma GCC unroll 2
        for (int i = 0; i < weights; i++) {
            scale[i] = step_scales(format, w, n + i, s);
            unpack_halves(format, tables, step_codes(format, w, n + i, s, room), v[i]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512bh a = (__m512bh)_mm512_loadu_si512(from[m] + s * STEP + 32 * j);
#pragma GCC unroll 2
                for (int i = 0; i < weights; i++) sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)v[i][j], a);
            }
#pragma GCC unroll 2
            for (int i = 0; i < weights; i++) total[i][m] = _mm512_fmadd_ps(sum[i], (__m512)scale[i], total[i][m]);
        }
    }
    for (int i = 0; i < weights; i++)
        for (long m = 0; m < there; m++) out[m * out_row + i] = add_lanes((Lanes)total[i][m]) * row_scale(format, w, n + i);
}
#endif

/* ---- many rows: tiles of TILE_ROWS weight rows and TILE_STEPS steps ---------------------------------------------- */

/* Unpacked weights [TILE_STEPS][TILE_ROWS][STEP] with their scales, and partial sums [rows][TILE_ROWS]. Rows beyond the
 * last one repeat it. */
typedef struct {
    Lanes scales[TILE_STEPS][TILE_ROWS];
    float weights[TILE_STEPS * TILE_ROWS * STEP]; /* or bf16, in the first half */
    Lanes totals[];
} Tile;

INLINE void fill_tile(enum Format format, const Weight *w, long n, long last, long step, long steps, Tile *tile) {
    uint8_t room[4 * STEP];
#ifdef HAS_BF16_PRODUCTS
    Tables tables = e4m3_tables();
#endif
    for (long i = 0; i < TILE_ROWS; i++)
        for (long s = 0; s < steps; s++) {
            long row = n + i < last ? n + i : last - 1;
            const uint8_t *codes = step_codes(format, w, row, step + s, room);
            long at = (s * TILE_ROWS + i) * STEP;
            tile->scales[s][i] = step_scales(format, w, row, step + s);
#ifdef HAS_BF16_PRODUCTS
            if (w->in_halves) {
                __m512i v[4];
                unpack_halves(format, &tables, codes, v);
                for (int j = 0; j < 4; j++) _mm512_storeu_si512((uint16_t *)tile->weights + at + 32 * j, v[j]);
                continue;
            }
#endif
            Lanes v[8];
            unpack_floats(format, codes, v);
            for (int j = 0; j < 8; j++) *(Lanes *)(tile->weights + at + j * LANE_COUNT) = v[j];
        }
}

/* totals += the tile's products with rows x[0] to x[rows - 1] (at most BLOCK_ROWS). */
static void add_floats(const Tile *tile, const void *const *x, long rows, long step, long steps, Lanes *totals) {
    const float *from[BLOCK_ROWS];
    for (int m = 0; m < BLOCK_ROWS; m++) from[m] = (const float *)x[m < rows ? m : 0] + step * STEP;
    for (long s = 0; s < steps; s++) {
        Lanes sum[BLOCK_ROWS][TILE_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < BLOCK_ROWS; m++)
#pragma GCC unroll 4
            for (int i = 0; i < TILE_ROWS; i++) sum[m][i] = (Lanes){0};
        for (int j = 0; j < 8; j++) {
            Lanes a[BLOCK_ROWS];
#pragma GCC unroll 4
            for (int m = 0; m < BLOCK_ROWS; m++) {
                a[m] = lanes_at(from[m] + s * STEP + j * LANE_COUNT);
                IN_REGISTER(a[m]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < TILE_ROWS; i++) {
                Lanes v = lanes_at(tile->weights + (s * TILE_ROWS + i) * STEP + j * LANE_COUNT);
                IN_REGISTER(v);
#pragma GCC unroll 4
                for (int m = 0; m < BLOCK_ROWS; m++) sum[m][i] += v * a[m];
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < BLOCK_ROWS; m++)
            if (m < rows) {
#pragma GCC unroll 4
                for (int i = 0; i < TILE_ROWS; i++) totals[m * TILE_ROWS + i] += sum[m][i] * tile->scales[s][i];
            }
    }
}

#ifdef HAS_BF16_PRODUCTS
static void add_halves(const Tile *tile, const void *const *x, long rows, long step, long steps, Lanes *totals) {
    const uint16_t *from[BLOCK_ROWS], *weights = (const uint16_t *)tile->weights;
    __m512 total[BLOCK_ROWS][TILE_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < BLOCK_ROWS; m++) {
        from[m] = (const uint16_t *)x[m < rows ? m : 0] + step * STEP;
#pragma GCC unroll 4
        for (int i = 0; i < TILE_ROWS; i++) total[m][i] = (__m512)totals[(m < rows ? m : 0) * TILE_ROWS + i];
    }
    for (long s = 0; s < steps; s++) {
        __m512 sum[BLOCK_ROWS][TILE_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < BLOCK_ROWS; m++)
#pragma GCC unroll 4
            for (int i = 0; i < TILE_ROWS; i++) sum[m][i] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512bh a[BLOCK_ROWS];
#pragma GCC unroll 4
            for (int m = 0; m < BLOCK_ROWS; m++) a[m] = (__m512bh)_mm512_loadu_si512(from[m] + s * STEP + 32 * j);
#pragma GCC unroll 4
            for (int i = 0; i < TILE_ROWS; i++) {
                __m512bh v = (__m512bh)_mm512_loadu_si512(weights + (s * TILE_ROWS + i) * STEP + 32 * j);
#pragma GCC unroll 4
                for (int m = 0; m < BLOCK_ROWS; m++) sum[m][i] = _mm512_dpbf16_ps(sum[m][i], v, a[m]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
            for (int m = 0; m < BLOCK_ROWS; m++)
                total[m][i] = _mm512_fmadd_ps(sum[m][i], (__m512)tile->scales[s][i], total[m][i]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < BLOCK_ROWS; m++)
        if (m < rows) {
#pragma GCC unroll 4
            for (int i = 0; i < TILE_ROWS; i++) totals[m * TILE_ROWS + i] = (Lanes)total[m][i];
        }
}
#endif

static void many_rows(const Weight *w, const void *const *x, long rows, long first, long last, float *out, long out_row) {
    long steps = steps_of(w);
    Tile *tile = aligned_alloc(64, (sizeof(Tile) + sizeof(Lanes) * rows * TILE_ROWS + 63) / 64 * 64);
    for (long n = first; n < last; n += TILE_ROWS) {
        for (long i = 0; i < rows * TILE_ROWS; i++) tile->totals[i] = (Lanes){0};
        for (long step = 0; step < steps; step += TILE_STEPS) {
            long count = steps - step < TILE_STEPS ? steps - step : TILE_STEPS;
            fill_tile(w->format, w, n, last, step, count, tile);
            for (long m = 0; m < rows; m += BLOCK_ROWS) {
                Lanes *totals = tile->totals + m * TILE_ROWS;
#ifdef HAS_BF16_PRODUCTS
                if (w->in_halves) {
                    add_halves(tile, x + m, rows - m, step, count, totals);
                    continue;
                }
#endif
                add_floats(tile, x + m, rows - m, step, count, totals);
            }
        }
        for (long m = 0; m < rows; m++)
            for (long i = 0; i < TILE_ROWS && n + i < last; i++)
                out[m * out_row + n + i - first] = add_lanes(tile->totals[m * TILE_ROWS + i]) * row_scale(w->format, w, n + i);
    }
    free(tile);
}

static void few_rows(const Weight *w, const void *const *x, long rows, long first, long last, float *out, long out_row) {
    long n = first;
#define RUN(kind, f, ...) kind(f, __VA_ARGS__, x, rows, n, out + n - first, out_row)
#ifdef HAS_BF16_PRODUCTS
    if (w->in_halves) {
        Tables tables = e4m3_tables();
#define PAIRS_BY_ROWS(f)                                                               \
    case f:                                                                            \
        for (; rows > 4 && n + 1 < last; n += 2) RUN(few_halves, f, 8, 2, w, &tables); \
        for (; rows > 1 && n + 1 < last; n += 2) RUN(few_halves, f, 4, 2, w, &tables); \
        for (; rows == 1 && n < last; n++) RUN(few_halves, f, 1, 1, w, &tables);       \
        for (; n < last; n++) RUN(few_halves, f, 8, 1, w, &tables);                    \
        break;
        switch (w->format) {
            PAIRS_BY_ROWS(FORMAT_BF16)
            PAIRS_BY_ROWS(FORMAT_INT8)
            PAIRS_BY_ROWS(FORMAT_FP8)
            PAIRS_BY_ROWS(FORMAT_FP4)
        default: break; /* fp32 weights are multiplied in fp32 */
        }
        return;
    }
#endif
#define FLOATS_BY_ROWS(f)                                                        \
    case f:                                                                      \
        for (; rows == 1 && n < last; n++) RUN(few_floats, f, 1, w);             \
        for (; rows <= 4 && n < last; n++) RUN(few_floats, f, 4, w);             \
        for (; n < last; n++) RUN(few_floats, f, 8, w);                          \
        break;
    switch (w->format) {
        FLOATS_BY_ROWS(FORMAT_FP32)
        FLOATS_BY_ROWS(FORMAT_BF16)
        FLOATS_BY_ROWS(FORMAT_INT8)
        FLOATS_BY_ROWS(FORMAT_FP8)
        FLOATS_BY_ROWS(FORMAT_FP4)
    }
}

void packed_products(const Weight *w, const void *const *x, long rows, long first, long last, float *out, long out_row) {
    if (rows <= FEW_ROWS) few_rows(w, x, rows, first, last, out, out_row);
    else many_rows(w, x, rows, first, last, out, out_row);
}
