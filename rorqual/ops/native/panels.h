/* Inner products in the order of `dots.h`, bit by bit, for many rows at once: PANEL rows of the other operand are turned
 * into a panel whose vectors hold one word of each, so that sums need no shuffles and a panel's vector serves several rows.
 *
 * A lane's partial sums are those that `dots` keeps in the lanes of one vector. They are made one after the other in the
 * order in which its tree adds them up, so that few are alive at a time.
 *
 *   WIDE_PANELS     vectors of 16 floats: a panel is one vector wide, and words are multiplied as they are
 *   NARROW_PANELS   less: a panel is several vectors wide, and bf16 is widened first, once for all its uses */

#include "dots.h"

#ifndef RORQUAL_PANELS
#define RORQUAL_PANELS
#if defined(__AVX512F__)
#define WIDE_PANELS 1
#elif defined(__AVX__) || defined(__aarch64__)
#define NARROW_PANELS 1 /* other processors have too few registers */
#endif
#define PANEL 16 /* rows of the other operand, columns of the result */
#define PANEL_VECTORS (PANEL / VECTOR)
#define PANEL_HEIGHT 6 /* rows worked on at once */
#define PANEL_ROWS 96  /* a block of rows that stays in cache while panels pass: a multiple of PANEL_HEIGHT */
#define PANELS_FROM 48 /* rows from which turning pays */
#ifdef WIDE_PANELS
#define PANEL_STEPS 8 /* vectors of words, up to which it does: in longer rows the shuffles of `dots` are few */
#else
#define PANEL_STEPS (1 << 20) /* any length */
#endif
#endif

/* PANEL_WORD: what panels, and rows that meet them, consist of. */
#undef PANEL_WORD
#undef PER_PANEL_WORD
#ifdef WIDE_PANELS
#define PANEL_WORD WORD
#define PER_PANEL_WORD PER_WORD
#include "wide_panels.h"
#else
#define PANEL_WORD float
#define PER_PANEL_WORD 1
#include "narrow_panels.h"
#endif

/* Whether `rows` rows of k elements are multiplied by panels: whole steps only. */
INLINE int NAME(panels_fit)(long rows, long k) {
#if defined(WIDE_PANELS) || defined(NARROW_PANELS)
    return rows >= PANELS_FROM && k % (VECTOR * PER_WORD) == 0 && k <= PANEL_STEPS * VECTOR * PER_WORD;
#else
    return 0 * rows * k;
#endif
}
/* Words of the panels of n rows. */
INLINE long NAME(panel_words)(long n, long k) { return (n + PANEL - 1) / PANEL * PANEL * (k / PER_PANEL_WORD); }

/* All panels of b [n][k], one behind the other. */
__attribute__((unused)) static void NAME(make_panels)(const T *b, long n, long k, PANEL_WORD *panels) {
    for (long j = 0; j < n; j += PANEL)
        NAME(make_panel)(b + j * k, k, n - j < PANEL ? n - j : PANEL, k, panels + NAME(panel_words)(j, k));
}

/* Room that `panel_rows` needs for m rows: NULL where rows are read as they are. To be freed. */
INLINE PANEL_WORD *NAME(panel_room)(long m, long k) {
    return PER_PANEL_WORD == PER_WORD ? NULL : malloc(sizeof(PANEL_WORD) * m * k);
}
/* Where m (at most PANEL_ROWS) rows of a lie for `panel_block` (rows `index` of it unless NULL) -> row, the first one again
 * up to a multiple of PANEL_HEIGHT. */
INLINE void NAME(panel_rows)(long m, long k, const T *a, const int64_t *index, long a_row, PANEL_WORD *room,
                             const PANEL_WORD **row) {
    for (long i = 0; i < m; i++) {
        const T *from = a + (index ? index[i] : i) * a_row;
        row[i] = room ? room + i * k : (const PANEL_WORD *)from;
        for (long j = 0; room && j < k; j += VECTOR) store((float *)room + i * k + j, VECTOR, LOAD(from + j, VECTOR));
    }
    for (long i = m; i % PANEL_HEIGHT; i++) row[i] = row[0];
}
