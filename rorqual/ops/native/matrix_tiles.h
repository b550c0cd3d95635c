/* Matrix tiles (AMX): whether this processor and system have them, and their shape. Linux on x86-64 only.
 *
 * The build decides whether the code exists (`-march=native` on a processor with AMX), and `tiles_usable` at run time
 * whether it runs: the kernel must grant a process the large tile registers first. */

#ifndef RORQUAL_MATRIX_TILES_H
#define RORQUAL_MATRIX_TILES_H

#include "vectors.h"

#ifdef HAS_MATRIX_TILES /* given by a test that emulates them */
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(HAS_BF16_PRODUCTS) && defined(__linux__)
#define HAS_MATRIX_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>

long syscall(long number, ...); /* unistd.h hides it from plain C11 */

static int tiles_usable(void) {
    static int known = -1; /* threads that race here find the same answer */
    if (known < 0) {
        unsigned a, b, c, d = 0;
        int has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1); /* AMX-BF16, AMX-TILE */
        /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */
        known = has && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    }
    return known;
}
/* Seven tiles of 16 rows of 64 bytes, for the calling thread. */
static void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 7; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
}
static void tiles_end(void) { _tile_release(); }
#else
static int tiles_usable(void) { return 0; }
static void tiles_begin(void) {}
static void tiles_end(void) {}
#endif

#endif
