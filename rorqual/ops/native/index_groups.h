/* Constants of the grouped index search (ops/index_groups.py), which reads them here. */

#ifndef RORQUAL_INDEX_GROUPS_H
#define RORQUAL_INDEX_GROUPS_H

#include <stdint.h>

#define SEGMENT 1024 /* keys that are cut into groups together */
#define MEMBERS 32 /* keys of a group */
#define FINE 4 /* keys of a part of a group */
#define PLAIN 4 /* a query that sees no more than 1 / PLAIN of its budget in groups scores all keys */
#define ABREAST 16 /* groups whose means lie side by side */
#define MOST_CODE 4095 /* means and queries are whole numbers up to it, so that 128 of their products fit in 32 bits */
#define LAG 512 /* the newest keys, which are scored one by one: more than a step of the fused code completes */

/* Segments whose groups stand for their keys, for a query that sees `end` of them. */
static inline long grouped_segments(int64_t end) { return end > LAG ? (long)((end - LAG) / SEGMENT) : 0; }

#endif
