/* Attention of single queries, for attend.c and the decode step. */

#ifndef RORQUAL_ATTEND_H
#define RORQUAL_ATTEND_H

#include "vectors.h"

/* Where entry `i` of a sequence lies, in rows: entries stand one behind the other, or in pages of `page_rows`. */
INLINE long entry_row(const int64_t *table, long page_rows, long i) {
    return table ? table[i / page_rows] * page_rows + i % page_rows : i;
}

/* Floats that attend_query works in. */
INLINE long attend_work(long heads, long n, long width) {
    return heads * (whole(n) + whole(width));
}

#endif
