/* Attention of single queries, for attend.c and the decode step. */

#ifndef RORQUAL_ATTEND_H
#define RORQUAL_ATTEND_H

#include "vectors.h"

/* Where entry `i` of a sequence lies, in rows: entries stand one behind the other, or in pages of `page_rows`. */
INLINE long entry_row(const int64_t *table, long page_rows, long i) {
    return table ? table[i / page_rows] * page_rows + i % page_rows : i;
}

/* A query's keys are added up in runs of RUN, each by itself, then run after run: so threads may take runs without changing
 * the result. Of a run, PIECE keys stay in cache between their scores and their sum. */
#define RUN 512
#define PIECE 64

INLINE long runs_of(long n) { return n > 0 ? (n + RUN - 1) / RUN : 1; }

/* Floats of what a run leaves behind for `heads` heads: sums of values, of weights, and the largest scores. */
INLINE long run_floats(long heads, long width) { return heads * (whole(width) + 2); }

/* Floats that attend_query works in. */
INLINE long attend_work(long heads, long n, long width) { return heads * PIECE + runs_of(n) * run_floats(heads, width); }

#endif
