/* One compressed entry, for compress.c and the decode step. */

#ifndef RORQUAL_COMPRESS_H
#define RORQUAL_COMPRESS_H

#include "vectors.h"

/* Softmax over the slots, separately for every channel, then the weighted sum: rows kv[s] and score[s] [width] -> out. */
void compress_entry(const float *const *kv, const float *const *score, long slots, long width, float *out);
void rope_angles(const int64_t *positions, const float *frequencies, long rows, long pairs, float *out);

#endif
