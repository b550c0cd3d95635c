/* Included twice by cross_entropy.c, once for each element type. */

#include "gemm.h"

/* hidden [rows, d], weight [vocabulary, d], labels [rows] -> log_norm [rows] (log of the softmax's denominator), loss [rows]
 * and the gradients of sum(loss + z_weight log_norm^2): dhidden [rows, d], and dweight [parts, vocabulary, d], zeroed by
 * the caller, who adds the parts up. vocabulary and d are multiples of 16. */
void NAME(cross_entropy)(const T *hidden, const T *weight, const int64_t *labels, long rows, long d, long vocabulary,
                         float z_weight, long parts, float *log_norm, float *loss, float *dhidden, float *dweight) {
    long words = d / PER_WORD, half = vocabulary / PER_WORD;
    WORD *packed = malloc(sizeof(WORD) * words * vocabulary), *columns = malloc(sizeof(WORD) * half * d);
    NAME(pack_rows)(weight, d, vocabulary, d, vocabulary, packed);
    NAME(pack_columns)(weight, NULL, d, vocabulary, d, columns);
    long blocks = (rows + BLOCK - 1) / BLOCK, each = (blocks + parts - 1) / parts;
#pragma omp parallel for schedule(static)
    for (long part = 0; part < parts; part++) {
        float *logits = malloc(sizeof(float) * BLOCK * vocabulary);
        WORD *pairs = malloc(sizeof(WORD) * (BLOCK / PER_WORD) * vocabulary);
        T *rounded = malloc(sizeof(T) * BLOCK * vocabulary);
        WORD *hidden_columns = malloc(sizeof(WORD) * BLOCK * d);
        for (long block = part * each; block < (part + 1) * each && block < blocks; block++) {
            long first = block * BLOCK, m = rows - first < BLOCK ? rows - first : BLOCK;
            const T *mine = hidden + first * d;
            NAME(gemm)(m, vocabulary, words, (const WORD *)mine, NULL, words, 1, packed, vocabulary, logits, vocabulary,
                       0);
            for (long r = 0; r < m; r++) {
                float *x = logits + r * vocabulary, top = x[0];
                int64_t label = labels[first + r];
                Vector most = load(x, VECTOR), sum = {0};
                for (long i = VECTOR; i < vocabulary; i += VECTOR) {
                    Vector v = load(x + i, VECTOR);
                    most = choose(most < v, v, most);
                }
                for (int l = 0; l < VECTOR; l++) top = max_(top, most[l]);
                for (long i = 0; i < vocabulary; i += VECTOR) sum += exp_lanes(load(x + i, VECTOR) - top);
                float norm = logf(sum_lanes(sum)) + top, factor = 1.0f + 2.0f * z_weight * norm;
                log_norm[first + r] = norm;
                loss[first + r] = norm - x[label];
                for (long i = 0; i < vocabulary; i += VECTOR)
                    store(x + i, VECTOR, exp_lanes(load(x + i, VECTOR) - norm) * factor);
                x[label] -= 1.0f;
                for (long i = 0; i < vocabulary; i += VECTOR)
                    STORE(rounded + r * vocabulary + i, VECTOR, load(x + i, VECTOR));
            }
            NAME(gemm)(m, d, half, (const WORD *)rounded, NULL, half, 1, columns, d, dhidden + first * d, d, 0);
            NAME(pack_columns)(rounded, NULL, vocabulary, m, vocabulary, pairs);
            NAME(pack_columns)(mine, NULL, d, m, d, hidden_columns);
            NAME(gemm)(vocabulary, d, (m + PER_WORD - 1) / PER_WORD, pairs, NULL, 1, vocabulary, hidden_columns, d,
                       dweight + part * vocabulary * d, d, 1);
        }
        free(logits), free(pairs), free(rounded), free(hidden_columns);
    }
    free(packed), free(columns);
}
