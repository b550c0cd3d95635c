/* sparse_attention.py: sliding window, compressed entries and a sink under one softmax, forward and backward.
 *
 * Rows (token, head) are taken 32 at a time, one row a vector lane. All keys that any of the 32 may see, window and
 * entries alike, are laid side by side with one bit a row that says who sees them; so nothing outside the band and the
 * picks is computed except what neighbouring rows do not share. Scores live in cache only; backward recomputes them. */

#include <stdlib.h>

#include "vectors.h"

#define ROWS 32
#define EACH_ROW for (int l = 0; l < ROWS; l++)

/* The low VECTOR bits as a mask, one lane a bit. */
INLINE Integers seeing(uint32_t bits) {
    const Integers one = {0}, lane = (one + 1) << (Integers)LANE_NUMBERS;
    return (lane & (int32_t)bits) != 0;
}

#include "attention_body.h"

#define ELEMENT_BF16
#include "attention_body.h"
