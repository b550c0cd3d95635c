/* Matrix tiles in plain C, after the instructions' published description, so that the code written for them can be run on a
 * processor that lacks them. Rounding of a product that needs more than fp32 differs from the hardware's. */

#define HAS_MATRIX_TILES 1
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

__attribute__((weak)) long emulated_products; /* so that a test sees that this ran */

static _Thread_local uint8_t emulated_tile[8][16][64];
static int tiles_usable(void) { return 1; }
static void tiles_begin(void) { memset(emulated_tile, 0xff, sizeof emulated_tile); } /* NaN: a missing zero shows */
static void tiles_end(void) {}

static void emulated_zero(int t) { memset(emulated_tile[t], 0, sizeof emulated_tile[t]); }
static void emulated_loadd(int t, const void *from, long stride) {
    for (int r = 0; r < 16; r++) memcpy(emulated_tile[t][r], (const char *)from + r * stride, 64);
}
static void emulated_stored(int t, void *to, long stride) {
    for (int r = 0; r < 16; r++) memcpy((char *)to + r * stride, emulated_tile[t][r], 64);
}
static float emulated_bf16(const uint8_t *p) {
    uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
/* c[m][n] += sum over even channels + sum over odd channels, each from zero: a row of `a` has 16 pairs, row k of `b` has
 * pair k of 16 columns. */
static void emulated_dpbf16ps(int c, int a, int b) {
    emulated_products++;
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0.0f, odd = 0.0f, before;
            for (int k = 0; k < 16; k++) {
                even += emulated_bf16(emulated_tile[a][m] + 4 * k) * emulated_bf16(emulated_tile[b][k] + 4 * n);
                odd += emulated_bf16(emulated_tile[a][m] + 4 * k + 2) * emulated_bf16(emulated_tile[b][k] + 4 * n + 2);
            }
            memcpy(&before, emulated_tile[c][m] + 4 * n, 4);
            before += even + odd;
            memcpy(emulated_tile[c][m] + 4 * n, &before, 4);
        }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
