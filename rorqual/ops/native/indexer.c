/* index_loss.py: the KL divergence of index scores from the attention that entries receive, without a tensor of
 * queries x heads x entries. */

#include <stdlib.h>

#include "select.h"
#include "vectors.h"

#include "indexer_body.h"

#define ELEMENT_BF16
#include "indexer_body.h"
