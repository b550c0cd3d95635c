/* experts.py without gradients: router and routed experts, the same for a token whatever tokens come with it. */

#include <stdlib.h>

#include "common.h"

#define SCORE_FLOOR 1e-36f /* as in experts.py */
#define EXPERT_ROWS 64
#define EXPERT_COLUMNS 32

#include "routed_body.h"

#define ELEMENT_BF16
#include "routed_body.h"
