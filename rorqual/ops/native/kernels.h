/* What the decode step calls, declared once so that the compiler holds definitions to it. Included for each element type. */

#include "types.h"

void NAME(linear)(const T *x, const T *w, long rows, long groups, long out, long in, T *y, float *exact);
void NAME(rms_norm_forward)(const T *x, const float *weight, long rows, long d, float eps, T *y, float *rs);
void NAME(rope_rotate)(const T *x, const float *table, long rows, long heads, long table_rows, long k, long r, float sign,
                       T *out);
void NAME(norm_rope_forward)(const T *x, const float *weight, const float *table, long rows, long heads, long table_rows,
                             long k, long r, float eps, T *out, float *rs);
void NAME(swiglu_forward)(const T *a, const T *u, const float *weight, long rows, long d, float limit, T *out);
void NAME(hc_pre_forward)(const T *x, const float *fn, const float *base, const float *scale, long tokens, int n, long d,
                          int iters, float norm_eps, float eps, int training, T *y, float *post, float *comb, float *raw,
                          float *rs);
void NAME(hc_post_forward)(const T *x, const T *y, const float *post, const float *comb, long tokens, int n, long d,
                           T *out);
void NAME(hc_head_forward)(const T *x, const float *fn, const float *base, const float *scale, long tokens, int n, long d,
                           float norm_eps, float eps, T *y, float *pre, float *raw, float *rs);
void NAME(attend_query)(const T *q, const T *const *keys, long n, const float *sink, long first, long last, long width,
                        float scale, float *work, T *out, float *lse);
void NAME(attend_run)(const T *q, const T *const *keys, long n, long run, const float *sink, long first, long last,
                      long width, float scale, float *weights, float *left);
void NAME(join_runs)(float *left, long runs, long first, long last, long width, T *out, float *lse);
void NAME(index_scan)(const T *q, const float *weights, const T *keys, const uint8_t *packed, const int64_t *table,
                      const int64_t *start, const int64_t *end, long queries, long heads, long width, long per_page, long k,
                      long threads, int64_t *picks);
void NAME(index_search)(const T *q, const float *weights, const T *keys, const uint8_t *packed, const int64_t *table,
                        const uint8_t *order, const uint8_t *means, const uint8_t *fine, const int64_t *end, long queries,
                        long heads, long width, long per_page, long k, long budget, long threads, int64_t *picks);
void NAME(router)(const T *x, const T *w, const float *bias, long tokens, long d, long experts, long active, float scale,
                  float *scores, int64_t *chosen, float *weights);
void NAME(experts_apply)(const T *x, const int64_t *token, const int64_t *bounds, const float *gate, const T *w1,
                         const T *w3, const T *w2, long experts, long d, long inner, float limit, T *hidden, T *out);
void NAME(packed_matvec)(const T *x, const uint8_t *codes, const uint8_t *exponents, const float *scales, long format,
                         long rows, long groups, long out, long in, T *y);
void NAME(packed_experts)(const T *x, const int64_t *token, const int64_t *bounds, const float *gate,
                          const uint8_t *codes1, const uint8_t *exponents1, const float *scales1, const uint8_t *codes3,
                          const uint8_t *exponents3, const float *scales3, const uint8_t *codes2,
                          const uint8_t *exponents2, const float *scales2, long format, long tokens, long experts, long d,
                          long inner, float limit, const int64_t *places, T *out);
void NAME(experts_join)(const T *rows, const int64_t *slots, const T *shared, long tokens, long active, long d, T *y);
