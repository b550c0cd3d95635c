/* Vectors of the processor's own width, as in `vectors.h`, by the names that the index scan uses. */

#ifndef RORQUAL_LANES_H
#define RORQUAL_LANES_H

#include "row_codecs.h"

#if defined(__AVX512F__)
#define LANE_COUNT 16
#elif defined(__AVX__)
#define LANE_COUNT 8
#else
#define LANE_COUNT 4
#endif

typedef float Lanes __attribute__((vector_size(4 * LANE_COUNT), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANE_COUNT), aligned(4)));
typedef int32_t Wholes __attribute__((vector_size(4 * LANE_COUNT), aligned(4)));

INLINE Lanes lanes_at(const float *p) { return *(const Lanes *)p; }
INLINE Lanes positive(Lanes x) { /* a NaN stays */
#ifdef __AVX512F__
    return (Lanes)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x); /* of a NaN and a number: the second */
#else
    return (Lanes)((Wholes)x & ~(x < 0.0f));
#endif
}

#endif
