/* Included twice by decode_step.c, once for each element type. */

#include "kernels.h"

/* One call: what came in, and room for what lies between kernels. */
typedef struct {
    const int64_t *shape, *tokens, *positions, *first, *tables; /* first [rows]: where the row's sequence begins */
    const float *numbers;
    long rows;
    T *other, *x, *normed, *y, *latent, *latent_normed, *q, *q_turned, *kv, *kv_turned, *o, *z, *index_q, *index_turned, *index_out;
    T *gate, *up, *inner, *shared, *expert_inner, *expert_out;
    float *post, *comb, *raw, *rs, *weight, *lse, *blocks, *scores, *head_weights, *angles, *plain_angles, *one_angle, *pooled;
    float *router_scores, *routing, *sorted;
    int64_t *chosen, *token, *choice, *bounds, *slots, *picks;
    void *all[48];
    int count, has_angles, has_plain_angles;
} NAME(Step);

static void *NAME(room)(NAME(Step) * s, size_t bytes) { return s->all[s->count++] = malloc(bytes + 64); }

static void NAME(make_room)(NAME(Step) * s) {
    const int64_t *n = s->shape;
    long rows = s->rows, hidden = n[HIDDEN], all = n[HEADS] * n[WIDTH], index = n[INDEX_HEADS] * n[INDEX_WIDTH];
    long streams = n[STREAMS], channels = 2 * most(n[WIDTH], n[INDEX_WIDTH]), active = rows * n[ACTIVE];
    struct {
        T **place;
        long size;
    } typed[] = {{&s->other, streams * hidden}, {&s->x, hidden}, {&s->normed, hidden}, {&s->y, hidden}, {&s->latent, n[QUERY_RANK]},
                 {&s->latent_normed, n[QUERY_RANK]}, {&s->q, all}, {&s->q_turned, all}, {&s->kv, n[WIDTH]},
                 {&s->kv_turned, n[WIDTH]}, {&s->o, all}, {&s->z, n[GROUPS] * n[OUTPUT_RANK]},
                 {&s->index_q, most(index, channels)}, {&s->index_turned, most(index, channels)},
                 {&s->index_out, most(index, channels)}, {&s->gate, n[EXPERT_WIDTH]}, {&s->up, n[EXPERT_WIDTH]},
                 {&s->inner, n[EXPERT_WIDTH]}, {&s->shared, hidden}, {&s->expert_inner, n[ACTIVE] * n[EXPERT_WIDTH]},
                 {&s->expert_out, n[ACTIVE] * hidden}};
    struct {
        float **place;
        long size;
    } floats[] = {{&s->post, streams}, {&s->comb, streams * streams}, {&s->raw, streams * (streams + 2)},
                  {&s->rs, n[HEADS] + n[INDEX_HEADS] + streams}, {&s->weight, most(hidden, most(all, n[QUERY_RANK]))},
                  {&s->lse, n[HEADS]}, {&s->blocks, channels}, {&s->scores, channels},
                  {&s->head_weights, n[INDEX_HEADS]}, {&s->angles, n[ROPE]}, {&s->plain_angles, n[ROPE]},
                  {&s->one_angle, n[ROPE]}, {&s->pooled, channels}, {&s->router_scores, n[EXPERTS]},
                  {&s->routing, n[ACTIVE]}, {&s->sorted, n[ACTIVE]}};
    for (unsigned i = 0; i < sizeof(typed) / sizeof(*typed); i++)
        *typed[i].place = NAME(room)(s, sizeof(T) * typed[i].size * rows);
    for (unsigned i = 0; i < sizeof(floats) / sizeof(*floats); i++)
        *floats[i].place = NAME(room)(s, sizeof(float) * floats[i].size * rows);
    int64_t **whole_numbers[] = {&s->chosen, &s->token, &s->choice, &s->slots};
    for (int i = 0; i < 4; i++) *whole_numbers[i] = NAME(room)(s, sizeof(int64_t) * active);
    s->bounds = NAME(room)(s, sizeof(int64_t) * (n[EXPERTS] + 1));
    s->picks = NAME(room)(s, sizeof(int64_t) * n[TOP_K] * rows);
}

/* A norm's weight in fp32. */
static const float *NAME(widened)(NAME(Step) * s, const T *weight, long n) {
    for (long i = 0; i < n; i += VECTOR) store(s->weight + i, n - i, LOAD(weight + i, n - i));
    return s->weight;
}

static void NAME(norm)(NAME(Step) * s, const T *x, const T *weight, long n, T *out) {
    NAME(rms_norm_forward)(x, NAME(widened)(s, weight, n), s->rows, n, s->numbers[NORM_EPS], out, s->rs);
}

/* Angles of the tokens' positions, made at first use: layers with entries have others than those without. */
static const float *NAME(angles_of)(NAME(Step) * s, const int64_t *layer) {
    int *is_there = layer[RATIO] ? &s->has_angles : &s->has_plain_angles;
    float *angles = layer[RATIO] ? s->angles : s->plain_angles;
    if (!*is_there) rope_angles(s->positions, PLACE(layer, FREQUENCIES), s->rows, s->shape[ROPE] / 2, angles);
    *is_there = 1;
    return angles;
}

/* ---- compressed entries ----------------------------------------------------------------------------------------- */

/* The fields of one of a layer's compressors, and of its memory. */
typedef struct {
    int wkv, wgate, ape, norm, ring_kv, ring_score, ring_size, stored, stored_rows;
    long width;
} NAME(Compressor);

/* Rounds, norms and turns the pooled block of `row` that begins at position `first`: -> out [width]. */
static void NAME(finish_entry)(NAME(Step) * s, const int64_t *layer, const NAME(Compressor) * c, int64_t first, T *out) {
    T *pooled = s->index_turned;
    for (long i = 0; i < c->width; i += VECTOR) STORE(pooled + i, c->width - i, load(s->pooled + i, c->width - i));
    rope_angles(&first, PLACE(layer, FREQUENCIES), 1, s->shape[ROPE] / 2, s->one_angle);
    const float *weight = NAME(widened)(s, PLACE(layer, c->norm), c->width);
    int is_key = c->stored == INDEX_KEYS;
    NAME(norm_rope_forward)(pooled, weight, s->one_angle, 1, 1, 1, c->width, s->shape[ROPE], s->numbers[NORM_EPS],
                            is_key ? s->index_out : out, s->rs);
    if (is_key) NAME(linear)(s->index_out, PLACE(layer, HADAMARD), 1, 1, c->width, c->width, out, NULL);
}

/* The token's projections (`kv` and `score`, [channels]) complete a block of `row` or wait for it. */
static void NAME(compress_row)(NAME(Step) * s, const int64_t *layer, const int64_t *memory, const NAME(Compressor) * c,
                               long row, long channels, const float *kv, const float *score) {
    long ratio = layer[RATIO], position = s->positions[row], size = memory[c->ring_size];
    float *ring_kv = PLACE(memory, c->ring_kv), *ring_score = PLACE(memory, c->ring_score);
    if ((position + 1) % ratio == 0) {
        long block = position / ratio, count = 0, back = layer[OVERLAP] && block > 0 ? 2 * ratio : ratio;
        const float *a[2 * ratio], *b[2 * ratio];
        for (long t = position - back + 1; t <= position; t++, count++) {
            long half = layer[OVERLAP] && t > position - ratio ? c->width : 0, at = t % size * channels + half;
            a[count] = t == position ? kv + half : ring_kv + at;
            b[count] = t == position ? score + half : ring_score + at;
        }
        compress_entry(a, b, count, c->width, s->pooled);
        T *stored = PLACE(memory, c->stored);
        const int64_t *table = (const int64_t *)(uintptr_t)s->tables[row];
        NAME(finish_entry)(s, layer, c, block * ratio,
                           stored + entry_row(table, memory[c->stored_rows], block) * c->width);
    }
    memcpy(ring_kv + position % size * channels, kv, sizeof(float) * channels);
    memcpy(ring_score + position % size * channels, score, sizeof(float) * channels);
}

static void NAME(compress)(NAME(Step) * s, const int64_t *layer, const int64_t *memory, const NAME(Compressor) * c) {
    long channels = c->width * (layer[OVERLAP] ? 2 : 1), hidden = s->shape[HIDDEN];
    const float *ape = PLACE(layer, c->ape);
    NAME(linear)(s->normed, PLACE(layer, c->wkv), s->rows, 1, channels, hidden, NULL, s->blocks);
    NAME(linear)(s->normed, PLACE(layer, c->wgate), s->rows, 1, channels, hidden, NULL, s->scores);
    for (long row = 0; row < s->rows; row++) {
        float *score = s->scores + row * channels;
        const float *place = ape + s->positions[row] % layer[RATIO] * channels;
        for (long i = 0; i < channels; i++) score[i] += place[i];
        NAME(compress_row)(s, layer, memory + row * s->shape[LAYERS] * MEMORY_END, c, row, channels,
                           s->blocks + row * channels, score);
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* The indexer's choice for every row that sees more entries than it may use. */
static void NAME(select_entries)(NAME(Step) * s, const int64_t *layer, const int64_t *memory, const float *angles) {
    const int64_t *n = s->shape;
    long heads = n[INDEX_HEADS], width = n[INDEX_WIDTH], longest = 0;
    for (long row = 0; row < s->rows; row++) longest = most(longest, (s->positions[row] + 1) / layer[RATIO]);
    if (longest <= n[TOP_K]) return;
    NAME(linear)(s->latent_normed, PLACE(layer, INDEX_WQ_B), s->rows, 1, heads * width, n[QUERY_RANK], s->index_q, NULL);
    NAME(rope_rotate)(s->index_q, angles, s->rows * heads, heads, s->rows, width, n[ROPE], 1.0f, s->index_turned);
    NAME(linear)(s->index_turned, PLACE(layer, HADAMARD), s->rows * heads, 1, width, width, s->index_out, NULL);
    NAME(linear)(s->normed, PLACE(layer, INDEX_WEIGHTS), s->rows, 1, heads, n[HIDDEN], s->index_q, NULL);
    for (long i = 0; i < s->rows * heads; i++) {
        T scaled;
        PUT(&scaled, 0, GET(s->index_q, i) * s->numbers[INDEX_SCALE]);
        s->head_weights[i] = GET(&scaled, 0);
    }
    long threads = s->rows > 1 || longest < 4096 ? 1 : omp_get_max_threads();
    int is_much = s->rows > 1 && longest * heads * width * s->rows > FORK_FROM;
    SHARED_OUT(is_much, long row = 0; row < s->rows; row++, {
        const int64_t *mine = memory + row * n[LAYERS] * MEMORY_END;
        int64_t end = (s->positions[row] + 1) / layer[RATIO];
        if (end <= n[TOP_K]) continue;
        NAME(index_scan)(s->index_out + row * heads * width, s->head_weights + row * heads, PLACE(mine, INDEX_KEYS), NULL,
                         (const int64_t *)(uintptr_t)s->tables[row], NULL, &end, 1, heads, width, mine[KEY_ROWS], n[TOP_K],
                         threads, s->picks + row * n[TOP_K]);
    });
}

/* The keys of a row's token: its window, oldest first (the ring, then rows of this call), then the entries it uses. */
static long NAME(keys_of)(const NAME(Step) * s, const int64_t *layer, const int64_t *memory, long row, const T **keys) {
    const int64_t *n = s->shape, *table = (const int64_t *)(uintptr_t)s->tables[row];
    long position = s->positions[row], first = most(0, position - n[WINDOW] + 1), count = 0, width = n[WIDTH];
    const T *ring = PLACE(memory, RING), *entries = PLACE(memory, ENTRIES);
    for (long t = first; t <= position; t++)
        keys[count++] = t < s->positions[s->first[row]] ? ring + t % memory[RING_SIZE] * width
                                                        : s->kv_turned + (row - (position - t)) * width;
    long end = layer[RATIO] ? (position + 1) / layer[RATIO] : 0;
    if (layer[INDEX_WKV] && end > n[TOP_K]) {
        const int64_t *picks = s->picks + row * n[TOP_K];
        for (long i = 0; i < n[TOP_K]; i++)
            if (picks[i] >= 0) keys[count++] = entries + entry_row(table, memory[ENTRY_ROWS], picks[i]) * width;
    } else {
        for (long i = 0; i < end; i++) keys[count++] = entries + entry_row(table, memory[ENTRY_ROWS], i) * width;
    }
    return count;
}

static void NAME(attend_rows)(NAME(Step) * s, const int64_t *layer, const int64_t *memory) {
    const int64_t *n = s->shape;
    long heads = n[HEADS], width = n[WIDTH], room = 0, threads = omp_get_max_threads();
    for (long row = 0; row < s->rows; row++) {
        long end = layer[RATIO] ? (s->positions[row] + 1) / layer[RATIO] : 0;
        room = most(room, n[WINDOW] + (layer[INDEX_WKV] && end > n[TOP_K] ? n[TOP_K] : end));
    }
    int is_much = s->rows * heads * room * width > FORK_FROM;
    long parts = !is_much || s->rows >= threads ? 1 : heads < threads ? heads : threads, each = (heads + parts - 1) / parts;
    SHARED_OUT(is_much, long job = 0; job < s->rows * parts; job++, {
        long row = job / parts, first = job % parts * each, last = first + each < heads ? first + each : heads;
        const int64_t *mine = memory + row * n[LAYERS] * MEMORY_END;
        const T **keys = malloc(sizeof(T *) * room);
        float *work = malloc(sizeof(float) * attend_work(each, room, width));
        long count = NAME(keys_of)(s, layer, mine, row, keys);
        if (first < last)
            NAME(attend_query)(s->q_turned + row * heads * width, keys, count, PLACE(layer, SINK), first, last, width,
                               s->numbers[SCALE], work, s->o + row * heads * width, s->lse + row * heads);
        free(keys), free(work);
    });
    for (long row = 0; row < s->rows; row++) {
        const int64_t *mine = memory + row * n[LAYERS] * MEMORY_END;
        memcpy((T *)PLACE(mine, RING) + s->positions[row] % mine[RING_SIZE] * width, s->kv_turned + row * width,
               sizeof(T) * width);
    }
}

static void NAME(attention)(NAME(Step) * s, const int64_t *layer, const int64_t *memory) {
    const int64_t *n = s->shape;
    long rows = s->rows, heads = n[HEADS], width = n[WIDTH], rope = n[ROPE], hidden = n[HIDDEN], rank = n[QUERY_RANK];
    float eps = s->numbers[NORM_EPS];
    const float *angles = NAME(angles_of)(s, layer);
    NAME(linear)(s->normed, PLACE(layer, WQ_A), rows, 1, rank, hidden, s->latent, NULL);
    NAME(norm)(s, s->latent, PLACE(layer, Q_NORM), rank, s->latent_normed);
    NAME(linear)(s->latent_normed, PLACE(layer, WQ_B), rows, 1, heads * width, rank, s->q, NULL);
    NAME(norm_rope_forward)(s->q, NULL, angles, rows * heads, heads, rows, width, rope, eps, s->q_turned, s->rs);
    NAME(linear)(s->normed, PLACE(layer, WKV), rows, 1, width, hidden, s->kv, NULL);
    NAME(norm_rope_forward)(s->kv, NAME(widened)(s, PLACE(layer, KV_NORM), width), angles, rows, 1, rows, width, rope, eps,
                            s->kv_turned, s->rs);
    if (layer[RATIO]) {
        NAME(Compressor) entries = {ENTRY_WKV, ENTRY_WGATE, ENTRY_APE, ENTRY_NORM, BLOCKS_KV, BLOCKS_SCORE, BLOCKS_SIZE,
                                    ENTRIES, ENTRY_ROWS, width};
        NAME(compress)(s, layer, memory, &entries);
    }
    if (layer[INDEX_WKV]) {
        NAME(Compressor) keys = {INDEX_WKV, INDEX_WGATE, INDEX_APE, INDEX_NORM, INDEX_BLOCKS_KV, INDEX_BLOCKS_SCORE,
                                 INDEX_BLOCKS_SIZE, INDEX_KEYS, KEY_ROWS, n[INDEX_WIDTH]};
        NAME(compress)(s, layer, memory, &keys);
        NAME(select_entries)(s, layer, memory, angles);
    }
    NAME(attend_rows)(s, layer, memory);
    NAME(rope_rotate)(s->o, angles, rows * heads, heads, rows, width, rope, -1.0f, s->q);
    NAME(linear)(s->q, PLACE(layer, WO_A), rows, n[GROUPS], n[OUTPUT_RANK], heads * width / n[GROUPS], s->z, NULL);
    NAME(linear)(s->z, PLACE(layer, WO_B), rows, 1, hidden, n[GROUPS] * n[OUTPUT_RANK], s->y, NULL);
}

/* ---- experts ---------------------------------------------------------------------------------------------------- */

void experts_sort(const int64_t *chosen, long tokens, long active, long experts, int64_t *token, int64_t *choice,
                  int64_t *bounds, int64_t *slots);

static void NAME(feed)(NAME(Step) * s, const int64_t *layer) {
    const int64_t *n = s->shape, *by_token = PLACE(layer, TID2EID);
    long rows = s->rows, hidden = n[HIDDEN], inner = n[EXPERT_WIDTH], active = n[ACTIVE];
    float limit = s->numbers[LIMIT];
    NAME(linear)(s->normed, PLACE(layer, SHARED_W1), rows, 1, inner, hidden, s->gate, NULL);
    NAME(linear)(s->normed, PLACE(layer, SHARED_W3), rows, 1, inner, hidden, s->up, NULL);
    NAME(swiglu_forward)(s->gate, s->up, NULL, rows, inner, limit, s->inner);
    NAME(linear)(s->inner, PLACE(layer, SHARED_W2), rows, 1, hidden, inner, s->shared, NULL);
    for (long row = 0; by_token && row < rows; row++)
        memcpy(s->chosen + row * active, by_token + s->tokens[row] * active, sizeof(int64_t) * active);
    NAME(router)(s->normed, PLACE(layer, GATE), PLACE(layer, BIAS), rows, hidden, n[EXPERTS], active,
                 s->numbers[ROUTE_SCALE], s->router_scores, s->chosen, s->routing);
    experts_sort(s->chosen, rows, active, n[EXPERTS], s->token, s->choice, s->bounds, s->slots);
    for (long i = 0; i < rows * active; i++) s->sorted[i] = s->routing[s->choice[i]];
    NAME(experts_apply)(s->normed, s->token, s->bounds, s->sorted, PLACE(layer, W1), PLACE(layer, W3), PLACE(layer, W2),
                        n[EXPERTS], hidden, inner, limit, s->expert_inner, s->expert_out);
    NAME(experts_join)(s->expert_out, s->slots, s->shared, rows, active, hidden, s->y);
}

/* Streams [rows, N, D], in place, through `s->shape[LAYERS]` layers. */
static void NAME(run_layers)(NAME(Step) * s, const int64_t *layers, const int64_t *memory, T *streams) {
    const int64_t *shape = s->shape;
    long rows = s->rows, hidden = shape[HIDDEN], n = shape[STREAMS];
    float norm_eps = s->numbers[NORM_EPS], eps = s->numbers[HC_EPS];
    T *in = streams, *out = s->other;
    for (long i = 0; i < shape[LAYERS]; i++) {
        const int64_t *layer = layers + i * LAYER_END;
        for (int part = 0; part < 2; part++) { /* attention, experts */
            int fn = part ? HC_FFN_FN : HC_ATTN_FN, base = part ? HC_FFN_BASE : HC_ATTN_BASE;
            int scale = part ? HC_FFN_SCALE : HC_ATTN_SCALE;
            NAME(hc_pre_forward)(in, PLACE(layer, fn), PLACE(layer, base), PLACE(layer, scale), rows, (int)n, hidden,
                                 (int)shape[ITERS], norm_eps, eps, 0, s->x, s->post, s->comb, s->raw, s->rs);
            NAME(norm)(s, s->x, PLACE(layer, part ? FFN_NORM : ATTN_NORM), hidden, s->normed);
            if (part) NAME(feed)(s, layer);
            else NAME(attention)(s, layer, memory + i * MEMORY_END);
            NAME(hc_post_forward)(in, s->y, s->post, s->comb, rows, (int)n, hidden, out);
            T *swap = in;
            in = out;
            out = swap;
        }
    } /* an even number of swaps: the result lies in streams */
}

static void NAME(clear)(NAME(Step) * s) {
    for (int i = 0; i < s->count; i++) free(s->all[i]);
}

/* embedding [V, D]; tokens, positions [rows]; first [rows]: the row where each row's sequence begins (its rows stand one
 * behind the other); shape, numbers and layers [L, LAYER_END] of the model; memory [rows, L, MEMORY_END] and tables [rows]
 * (of pages; 0: none) of the sequences -> streams [rows, N, D]. */
void NAME(decode_step)(const T *embedding, const int64_t *tokens, const int64_t *positions, const int64_t *first, long rows,
                       const int64_t *shape, const float *numbers, const int64_t *layers, const int64_t *memory,
                       const int64_t *tables, T *streams) {
    NAME(Step) s = {.shape = shape, .tokens = tokens, .positions = positions, .first = first, .tables = tables,
                    .numbers = numbers, .rows = rows};
    long hidden = shape[HIDDEN], n = shape[STREAMS];
    NAME(make_room)(&s);
    for (long i = 0; i < rows * n; i++)
        memcpy(streams + i * hidden, embedding + tokens[i / n] * hidden, sizeof(T) * hidden);
    NAME(run_layers)(&s, layers, memory, streams);
    NAME(clear)(&s);
}
