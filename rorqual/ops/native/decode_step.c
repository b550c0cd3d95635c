/* model/decode.py: the next token or tokens of several sequences through all layers, in one call.
 *
 * Every number comes from the kernels that the layer code calls, in the same order, so the two agree bit by bit; what is
 * saved is the way between them. Threads share the work inside kernels, and rows or heads of attention. */

#include <stdlib.h>

#include "attend.h"
#include "compress.h"
#include "packed_products.h"
#include "rooms.h"

#ifdef _OPENMP
extern int omp_get_max_threads(void);
extern int omp_get_num_threads(void);
extern int omp_get_thread_num(void);
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

/* Names of what model/decode.py fills in; it reads them here. */
enum Shape { LAYERS, HIDDEN, STREAMS, HEADS, WIDTH, ROPE, QUERY_RANK, GROUPS, OUTPUT_RANK, WINDOW, EXPERTS, ACTIVE,
             EXPERT_WIDTH, INDEX_HEADS, INDEX_WIDTH, TOP_K, ITERS, ENTRY_BYTES, KEY_BYTES, ROUNDS_KV, ROUNDS_KEYS,
             PROJECTIONS, EXPERT_FORMAT, FETCH, GROUP_BUDGET, SHAPE_END };
/* ENTRY_BYTES, KEY_BYTES: of a packed row in memory, 0 where rows are numbers. ROUNDS_KV, ROUNDS_KEYS: whether window keys
 * and entries, index keys and queries are FP8 and FP4 numbers. PROJECTIONS, EXPERT_FORMAT: 0 for weights
 * of the activations' type, or 1 + the format of packed ones (packed_products.h), whose scales are the columns _SCALE.
 * GROUP_BUDGET: groups of index keys that a query scores (index_groups_body.h), or 0: all keys.
 * FETCH: 0, or the function that brings in the experts of a layer (`Fetch`), which then has no stacks. */
enum Number { NORM_EPS, HC_EPS, SCALE, INDEX_SCALE, ROUTE_SCALE, LIMIT, NUMBER_END };
enum Layer { RATIO, OVERLAP, FREQUENCIES,
             HC_ATTN_FN, HC_ATTN_BASE, HC_ATTN_SCALE, ATTN_NORM, WQ_A, WQ_A_SCALE, Q_NORM, WQ_B, WQ_B_SCALE, WKV, WKV_SCALE,
             KV_NORM, SINK, WO_A, WO_A_SCALE, WO_B, WO_B_SCALE,
             ENTRY_WKV, ENTRY_WGATE, ENTRY_APE, ENTRY_NORM,
             INDEX_WKV, INDEX_WGATE, INDEX_APE, INDEX_NORM, INDEX_WQ_B, INDEX_WQ_B_SCALE, INDEX_WEIGHTS, HADAMARD,
             HC_FFN_FN, HC_FFN_BASE, HC_FFN_SCALE, FFN_NORM, GATE, BIAS, TID2EID, W1, W1_SCALE, W2, W2_SCALE, W3, W3_SCALE,
             SHARED_W1, SHARED_W1_SCALE, SHARED_W2, SHARED_W2_SCALE, SHARED_W3, SHARED_W3_SCALE, LAYER_END };
enum Memory { RING, RING_SIZE, BLOCKS_KV, BLOCKS_SCORE, BLOCKS_SIZE, ENTRIES, ENTRY_ROWS,
              INDEX_BLOCKS_KV, INDEX_BLOCKS_SCORE, INDEX_BLOCKS_SIZE, INDEX_KEYS, KEY_ROWS, GROUP_ORDER, GROUP_MEANS, GROUP_FINE, MEMORY_END };

enum Head { HEAD_FN, HEAD_BASE, HEAD_SCALE, HEAD_NORM, HEAD_WEIGHT, HEAD_END };
enum Draft { EMBED, E_PROJ, H_PROJ, E_NORM, H_NORM, DRAFT_END };

#define PART_ROWS 32 /* at least, for a thread of its own */

#define PLACE(table, field) ((void *)(uintptr_t)(table)[field])

/* Brings in some of the experts of `layer` that have rows by `bounds` [E + 1] and says where in `places` (matvec_body.h):
 * 1; every one comes once, then 0. Negative: it failed, and what the step computes will not be used. */
typedef long (*Fetch)(long layer, const int64_t *bounds, int64_t **places);

static long most(long a, long b) { return a > b ? a : b; }

#include "decode_step_body.h"
#include "head_body.h"
#include "draft_body.h"

#define ELEMENT_BF16
#include "decode_step_body.h"
#include "head_body.h"
#include "draft_body.h"
