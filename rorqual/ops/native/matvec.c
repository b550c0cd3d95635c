/* matvec.py and packed_experts.py: products with weights as they are stored, and routed experts made of them. */

#include <stdlib.h>

#include "packed_products.h"

#define CHUNK 48 /* activation rows that pass over the weights together: they stay in cache */
#define RANGE 32 /* weight rows that a thread takes at a time */

#include "matvec_body.h"

#define ELEMENT_BF16
#include "matvec_body.h"
