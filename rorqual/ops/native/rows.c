/* Operations on one row at a time: RMS norm, rope, SwiGLU, the indexer's sum over heads. */

#include "common.h"

#include "rows_body.h"

#define ELEMENT_BF16
#include "rows_body.h"
