/* experts.py: the routed experts, rows sorted by expert, forward and backward. Rows of x are read where they lie. */

#include <stdlib.h>

#include "vectors.h"

#define BLOCK 96 /* rows of one expert worked on at a time; even */

#include "experts_body.h"

#define ELEMENT_BF16
#include "experts_body.h"

/* Counting sort of choices [tokens, active] by expert: token [rows] and choice [rows] of each sorted row (its place in the
 * flattened choices), bounds [E + 1], and slots [tokens, active], the rows of a token in ascending order of expert. */
void experts_sort(const int64_t *chosen, long tokens, long active, long experts, int64_t *token, int64_t *choice,
                  int64_t *bounds, int64_t *slots) {
    memset(bounds, 0, sizeof(int64_t) * (experts + 1));
    for (long i = 0; i < tokens * active; i++) bounds[chosen[i] + 1]++;
    for (long e = 0; e < experts; e++) bounds[e + 1] += bounds[e];
    int64_t *next = malloc(sizeof(int64_t) * (experts + 1));
    memcpy(next, bounds, sizeof(int64_t) * (experts + 1));
    for (long t = 0; t < tokens; t++)
        for (long k = 0; k < active; k++) {
            int64_t row = next[chosen[t * active + k]]++;
            long at = k;
            token[row] = t;
            choice[row] = t * active + k;
            for (; at > 0 && slots[t * active + at - 1] > row; at--) slots[t * active + at] = slots[t * active + at - 1];
            slots[t * active + at] = row;
        }
    free(next);
}
