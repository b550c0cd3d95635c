/* linear.py: products with weights in their natural layout, the same for a row whatever rows come with it. */

#include <stdlib.h>

#include "common.h"

#include "linear_body.h"

#define ELEMENT_BF16
#include "linear_body.h"
