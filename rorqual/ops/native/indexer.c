/* index_topk.py and the indexer's loss: scores of compressed entries, the choice of the best, and the KL divergence from
 * the attention they receive, without a tensor of queries x heads x entries. */

#include <stdlib.h>

#include "select.h"
#include "vectors.h"

#include "indexer_body.h"

#define ELEMENT_BF16
#include "indexer_body.h"
