/* losses.py: cross-entropy of an output head with its gradients, a few rows of logits at a time. */

#include <stdlib.h>

#include "vectors.h"

#define BLOCK 64 /* rows whose logits exist at once in each thread; even */

#include "cross_entropy_body.h"

#define ELEMENT_BF16
#include "cross_entropy_body.h"
