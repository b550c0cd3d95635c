/* sparse_attention.py without gradients: one query at a time over pointers to its keys, so that a query's result is the
 * same alone, in a chunk and in a batch, and keys are read where they lie: in rings, in pages, in one piece. */

#include <stdlib.h>

#include "attend.h"

#include "attend_body.h"

#define ELEMENT_BF16
#include "attend_body.h"
