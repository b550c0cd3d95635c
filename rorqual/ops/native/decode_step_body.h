/* Included twice by decode_step.c, once for each element type. */

#include "kernels.h"

/* One call, or the part of its rows that a thread runs: what came in, and room for what lies between kernels. */
typedef struct {
    const int64_t *shape, *tokens, *positions, *first, *tables, *memories; /* of each row: see decode_step */
    const int64_t *forced, *num_forced, *budgets; /* likewise; NULL: nothing is forced */
    long most_picks; /* of a row: what it may choose and what is forced on it */
    const float *numbers;
    long rows, at, total, parts; /* rows of this part, of the call before it and in all; parts of the call */
    T *other, *x, *normed, *y, *latent, *latent_normed, *q, *q_turned, *kv, *o, *z, *index_q,
        *index_turned, *index_out, *unpacked;
    T *gate, *up, *inner, *shared, *expert_inner, *expert_out;
    float *post, *comb, *raw, *rs, *weight, *lse, *head_weights, *angles, *plain_angles, *one_angle, *pooled;
    float *router_scores, *routing, *sorted, *one_row;
    /* what other parts read too, for even layers and odd ones: keys, and projections of both compressors */
    T *turned[2], *kv_turned;
    float *blocks[4], *scores[4];
    uint8_t *codes;
    int64_t *chosen, *token, *choice, *bounds, *slots, *picks;
    void *all, *common; /* of these, in one piece: what is this part's, and what the parts share */
    int has_angles, has_plain_angles;
    long layer; /* that is being run */
} NAME(Step);

/* Room that the parts of a call share; `make_room` is for the step of a part. */
static void NAME(make_shared)(NAME(Step) * s) {
    long width = s->shape[WIDTH], channels = 2 * most(width, s->shape[INDEX_WIDTH]);
    size_t keys = (sizeof(T) * width * s->rows + 127) / 64 * 64; /* room for a vector behind */
    size_t projected = (sizeof(float) * channels * s->rows + 127) / 64 * 64;
    uint8_t *next = s->common = take_room(2 * keys + 8 * projected);
    for (int i = 0; i < 2; i++, next += keys) s->turned[i] = (T *)next;
    for (int i = 0; i < 4; i++, next += projected) s->blocks[i] = (float *)next;
    for (int i = 0; i < 4; i++, next += projected) s->scores[i] = (float *)next;
    s->total = s->rows, s->parts = 1, s->most_picks = s->shape[TOP_K];
    for (long row = 0; s->forced && row < s->rows; row++)
        s->most_picks = most(s->most_picks, most(s->shape[TOP_K], s->budgets[row]) + s->num_forced[row]);
}

static void NAME(make_room)(NAME(Step) * s) {
    const int64_t *n = s->shape;
    long rows = s->rows, hidden = n[HIDDEN], all = n[HEADS] * n[WIDTH], index = n[INDEX_HEADS] * n[INDEX_WIDTH];
    long streams = n[STREAMS], channels = 2 * most(n[WIDTH], n[INDEX_WIDTH]);
    struct {
        T **place;
        long size;
    } typed[] = {{&s->other, streams * hidden}, {&s->x, hidden}, {&s->normed, hidden}, {&s->y, hidden}, {&s->latent, n[QUERY_RANK]},
                 {&s->latent_normed, n[QUERY_RANK]}, {&s->q, all}, {&s->q_turned, all}, {&s->kv, n[WIDTH]},
                 {&s->o, all}, {&s->z, n[GROUPS] * n[OUTPUT_RANK]},
                 {&s->index_q, most(index, channels)}, {&s->index_turned, most(index, channels)},
                 {&s->index_out, most(index, channels)}, {&s->unpacked, most(n[WIDTH], n[INDEX_WIDTH])}, {&s->gate, n[EXPERT_WIDTH]}, {&s->up, n[EXPERT_WIDTH]},
                 {&s->inner, n[EXPERT_WIDTH]}, {&s->shared, hidden}, {&s->expert_inner, n[ACTIVE] * n[EXPERT_WIDTH]},
                 {&s->expert_out, n[ACTIVE] * hidden}};
    struct {
        float **place;
        long size;
    } floats[] = {{&s->post, streams}, {&s->comb, streams * streams}, {&s->raw, streams * (streams + 2)},
                  {&s->rs, n[HEADS] + n[INDEX_HEADS] + streams}, {&s->weight, most(hidden, most(all, n[QUERY_RANK]))},
                  {&s->lse, n[HEADS]},
                  {&s->head_weights, n[INDEX_HEADS]}, {&s->angles, n[ROPE]}, {&s->plain_angles, n[ROPE]},
                  {&s->one_angle, n[ROPE]}, {&s->pooled, channels}, {&s->router_scores, n[EXPERTS]},
                  {&s->routing, n[ACTIVE]}, {&s->sorted, n[ACTIVE]}, {&s->one_row, most(n[WIDTH], n[INDEX_WIDTH])}};
    struct {
        int64_t **place;
        long size;
    } wholes[] = {{&s->chosen, n[ACTIVE]}, {&s->token, n[ACTIVE]}, {&s->choice, n[ACTIVE]}, {&s->slots, n[ACTIVE]},
                  {&s->picks, s->most_picks}, {&s->bounds, n[EXPERTS] + 1}};
    uint8_t *all_of_it = NULL;
    size_t used = 0;
#define PUT_PARTS(parts)                                                                                             \
    for (unsigned i = 0; i < sizeof(parts) / sizeof(*parts); i++) {                                                  \
        if (all_of_it) *parts[i].place = (void *)(all_of_it + used);                                                 \
        used += (sizeof(**parts[i].place) * parts[i].size * rows + 127) / 64 * 64; /* room for a vector behind */    \
    }
    for (int pass = 0; pass < 2; pass++) { /* how much it is, then where each part lies */
        used = 0;
        PUT_PARTS(typed)
        PUT_PARTS(floats)
        PUT_PARTS(wholes)
        if (!pass) all_of_it = take_room(used + 4 * (n[WIDTH] + n[INDEX_WIDTH]) + 64);
    }
#undef PUT_PARTS
    s->all = all_of_it, s->codes = all_of_it + used;
}

/* What the row's sequence remembers in a layer, and in the one that is being run. */
INLINE const int64_t *NAME(memory_in)(const NAME(Step) * s, long row, long layer) {
    return (const int64_t *)(uintptr_t)s->memories[row] + layer * MEMORY_END;
}
INLINE const int64_t *NAME(memory_of)(const NAME(Step) * s, long row) { return NAME(memory_in)(s, row, s->layer); }

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

/* x [rows, groups, in] times a projection, whose column (and behind it that of its scales) is `weight`. */
static void NAME(project)(NAME(Step) * s, const T *x, const int64_t *weight, long groups, long out, long in, T *y) {
    long format = s->shape[PROJECTIONS] - 1;
    void *scales = PLACE(weight, 1);
    if (format < 0) NAME(linear)(x, PLACE(weight, 0), s->rows, groups, out, in, y, NULL);
    else
        NAME(packed_matvec)(x, PLACE(weight, 0), format == FORMAT_FP4 ? scales : NULL, format == FORMAT_FP4 ? NULL : scales,
                            format, s->rows, groups, out, in, y);
}

/* ---- rounded and packed rows ------------------------------------------------------------------------------------ */

INLINE void NAME(to_floats)(const T *x, long n, float *out) {
    for (long i = 0; i < n; i += VECTOR) store(out + i, n - i, LOAD(x + i, n - i));
}
INLINE void NAME(from_floats)(const float *x, long n, T *out) {
    for (long i = 0; i < n; i += VECTOR) STORE(out + i, n - i, load(x + i, n - i));
}

/* The row as it comes back from FP8 (the channels without rope) or FP4. */
static void NAME(round_kv)(NAME(Step) * s, T *x) {
    long rope = s->shape[ROPE], nope = s->shape[WIDTH] - rope;
    NAME(to_floats)(x, nope + rope, s->one_row);
    encode_entry(s->one_row, nope, rope, s->codes);
    decode_entry(s->codes, nope, rope, s->one_row);
    NAME(from_floats)(s->one_row, nope, x);
}
static void NAME(round_key)(NAME(Step) * s, T *x) {
    NAME(to_floats)(x, s->shape[INDEX_WIDTH], s->one_row);
    encode_key(s->one_row, s->shape[INDEX_WIDTH], s->codes);
    decode_key(s->codes, s->shape[INDEX_WIDTH], s->one_row);
    NAME(from_floats)(s->one_row, s->shape[INDEX_WIDTH], x);
}

/* ---- compressed entries ----------------------------------------------------------------------------------------- */

/* The fields of one of a layer's compressors, and of its memory. */
typedef struct {
    int wkv, wgate, ape, norm, ring_kv, ring_score, ring_size, stored, stored_rows;
    long width, row_bytes; /* 0: rows are numbers */
} NAME(Compressor);

/* Norms and turns the pooled block of `row` that begins at position `first`, and puts it to `stored` as it is kept. */
static void NAME(finish_entry)(NAME(Step) * s, const int64_t *layer, const NAME(Compressor) * c, int64_t first,
                               uint8_t *stored) {
    T *pooled = s->index_turned;
    NAME(from_floats)(s->pooled, c->width, pooled);
    rope_angles(&first, PLACE(layer, FREQUENCIES), 1, s->shape[ROPE] / 2, s->one_angle);
    const float *weight = NAME(widened)(s, PLACE(layer, c->norm), c->width);
    int is_key = c->stored == INDEX_KEYS;
    T *out = c->row_bytes ? s->unpacked : (T *)stored;
    NAME(norm_rope_forward)(pooled, weight, s->one_angle, 1, 1, 1, c->width, s->shape[ROPE], s->numbers[NORM_EPS],
                            is_key ? s->index_out : out, s->rs);
    if (is_key) NAME(linear)(s->index_out, PLACE(layer, HADAMARD), 1, 1, c->width, c->width, out, NULL);
    if (c->row_bytes) {
        NAME(to_floats)(out, c->width, s->one_row);
        if (is_key) encode_key(s->one_row, c->width, stored);
        else encode_entry(s->one_row, c->width - s->shape[ROPE], s->shape[ROPE], stored);
    } else if (is_key && s->shape[ROUNDS_KEYS]) NAME(round_key)(s, out);
    else if (!is_key && s->shape[ROUNDS_KV]) NAME(round_kv)(s, out);
}

/* The place of the call's first token of the row's sequence, and whether a later one has the row's slot in a ring. */
INLINE long NAME(begin_of)(const NAME(Step) * s, long row) { return s->positions[s->first[row] - s->at]; }
INLINE int NAME(is_overwritten)(const NAME(Step) * s, long row, long size) {
    return s->at + row + size < s->total && s->first[row + size] == s->first[row];
}

/* Projections of the tokens' blocks, to the places `which`. */
static void NAME(project_blocks)(NAME(Step) * s, const int64_t *layer, const NAME(Compressor) * c, int which) {
    long channels = c->width * (layer[OVERLAP] ? 2 : 1), hidden = s->shape[HIDDEN];
    const float *ape = PLACE(layer, c->ape);
    float *kv = s->blocks[which] + s->at * channels, *scores = s->scores[which] + s->at * channels;
    NAME(linear)(s->normed, PLACE(layer, c->wkv), s->rows, 1, channels, hidden, NULL, kv);
    NAME(linear)(s->normed, PLACE(layer, c->wgate), s->rows, 1, channels, hidden, NULL, scores);
    for (long row = 0; row < s->rows; row++) {
        float *score = scores + row * channels;
        const float *place = ape + s->positions[row] % layer[RATIO] * channels;
        for (long i = 0; i < channels; i++) score[i] += place[i];
    }
}

/* Entries of the blocks that tokens complete, from their own projections and those of the tokens before them. */
static void NAME(complete_blocks)(NAME(Step) * s, const int64_t *layer, const NAME(Compressor) * c, int which) {
    long ratio = layer[RATIO], channels = c->width * (layer[OVERLAP] ? 2 : 1);
    for (long row = 0; row < s->rows; row++) {
        long position = s->positions[row], begin = NAME(begin_of)(s, row);
        if ((position + 1) % ratio) continue;
        const int64_t *memory = NAME(memory_of)(s, row), *table = (const int64_t *)(uintptr_t)s->tables[row];
        const float *ring_kv = PLACE(memory, c->ring_kv), *ring_score = PLACE(memory, c->ring_score);
        long block = position / ratio, count = 0, back = layer[OVERLAP] && block > 0 ? 2 * ratio : ratio;
        const float *a[2 * ratio], *b[2 * ratio];
        for (long t = position - back + 1; t <= position; t++, count++) {
            long half = layer[OVERLAP] && t > position - ratio ? c->width : 0, is_here = t >= begin;
            long at = (is_here ? s->at + row - (position - t) : t % memory[c->ring_size]) * channels + half;
            a[count] = (is_here ? s->blocks[which] : ring_kv) + at;
            b[count] = (is_here ? s->scores[which] : ring_score) + at;
        }
        compress_entry(a, b, count, c->width, s->pooled);
        uint8_t *stored = PLACE(memory, c->stored);
        long bytes = c->row_bytes ? c->row_bytes : (long)sizeof(T) * c->width;
        NAME(finish_entry)(s, layer, c, block * ratio, stored + entry_row(table, memory[c->stored_rows], block) * bytes);
    }
}

/* Keeps the projections for later calls. */
static void NAME(keep_blocks)(NAME(Step) * s, const int64_t *layer, const NAME(Compressor) * c, int which) {
    long channels = c->width * (layer[OVERLAP] ? 2 : 1);
    for (long row = 0; row < s->rows; row++) {
        const int64_t *memory = NAME(memory_of)(s, row);
        long size = memory[c->ring_size], at = s->positions[row] % size * channels;
        if (NAME(is_overwritten)(s, row, size)) continue;
        memcpy((float *)PLACE(memory, c->ring_kv) + at, s->blocks[which] + (s->at + row) * channels, sizeof(float) * channels);
        memcpy((float *)PLACE(memory, c->ring_score) + at, s->scores[which] + (s->at + row) * channels, sizeof(float) * channels);
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* How many entries the indexer chooses for a row: more than the model's k where its guard says so. */
INLINE long NAME(budget_of)(const NAME(Step) * s, long row) {
    return s->forced ? most(s->shape[TOP_K], s->budgets[row]) : s->shape[TOP_K];
}
INLINE int NAME(has_choice)(const NAME(Step) * s, const int64_t *layer, long row) {
    return layer[INDEX_WKV] && (s->positions[row] + 1) / layer[RATIO] > NAME(budget_of)(s, row);
}

/* Rows of picks `k` apart -> `most_picks` apart, with what is forced on each row (entries that it sees) put in order. */
static void NAME(add_forced)(NAME(Step) * s, long first, long count, long k) {
    int64_t chosen[k];
    for (long i = count - 1; i >= 0; i--) {
        int64_t *out = s->picks + (first + i) * s->most_picks;
        const int64_t *forced = (const int64_t *)(uintptr_t)s->forced[first + i];
        long a = 0, b = 0, n = 0, num_forced = s->num_forced[first + i];
        memcpy(chosen, s->picks + first * s->most_picks + i * k, sizeof(int64_t) * k);
        while (a < k || b < num_forced) {
            int64_t x = a < k && chosen[a] >= 0 ? chosen[a] : INT64_MAX, y = b < num_forced ? forced[b] : INT64_MAX;
            if (x == INT64_MAX && y == INT64_MAX) break;
            out[n++] = x < y ? x : y;
            a += x <= y, b += y <= x;
        }
        for (; n < k + num_forced; n++) out[n] = -1;
    }
}

/* The indexer's choice for every row that sees more entries than it may use. */
static void NAME(select_entries)(NAME(Step) * s, const int64_t *layer, const float *angles) {
    const int64_t *n = s->shape;
    long heads = n[INDEX_HEADS], width = n[INDEX_WIDTH], longest = 0, choices = 0;
    for (long row = 0; row < s->rows; row++) {
        longest = most(longest, (s->positions[row] + 1) / layer[RATIO]);
        choices += NAME(has_choice)(s, layer, row);
    }
    if (!choices) return;
    NAME(project)(s, s->latent_normed, layer + INDEX_WQ_B, 1, heads * width, n[QUERY_RANK], s->index_q);
    NAME(rope_rotate)(s->index_q, angles, s->rows * heads, heads, s->rows, width, n[ROPE], 1.0f, s->index_turned);
    NAME(linear)(s->index_turned, PLACE(layer, HADAMARD), s->rows * heads, 1, width, width, s->index_out, NULL);
    for (long i = 0; n[ROUNDS_KEYS] && i < s->rows * heads; i++) NAME(round_key)(s, s->index_out + i * width);
    NAME(linear)(s->normed, PLACE(layer, INDEX_WEIGHTS), s->rows, 1, heads, n[HIDDEN], s->index_q, NULL);
    for (long i = 0; i < s->rows * heads; i++) {
        T scaled;
        PUT(&scaled, 0, GET(s->index_q, i) * s->numbers[INDEX_SCALE]);
        s->head_weights[i] = GET(&scaled, 0);
    }
    int is_one = s->first[0] == s->first[s->rows - 1]; /* sequence: its rows share the tiles of its keys */
    long threads = !is_one || longest < 4096 || s->parts > 1 ? 1 : omp_get_max_threads();
    SHARED_OUT(!is_one && longest * heads * width * s->rows > FORK_FROM, long row = 0; row < s->rows; row++, {
        long k = NAME(budget_of)(s, row);
        if (row && s->first[row - 1] == s->first[row] && NAME(budget_of)(s, row - 1) == k) continue;
        int64_t ends[s->rows - row];
        long count = 0;
        for (; row + count < s->rows && s->first[row + count] == s->first[row] && NAME(budget_of)(s, row + count) == k; count++)
            ends[count] = (s->positions[row + count] + 1) / layer[RATIO];
        if (ends[count - 1] <= k) continue;
        int64_t *picks = s->picks + row * s->most_picks;
        const int64_t *mine = NAME(memory_of)(s, row);
        void *keys = PLACE(mine, INDEX_KEYS);
        const T *queries = s->index_out + row * heads * width, *plain = n[KEY_BYTES] ? NULL : keys;
        const uint8_t *packed = n[KEY_BYTES] ? keys : NULL;
        const int64_t *table = (const int64_t *)(uintptr_t)s->tables[row];
        if (n[GROUP_BUDGET] && mine[GROUP_ORDER])
            NAME(index_search)(queries, s->head_weights + row * heads, plain, packed, table, PLACE(mine, GROUP_ORDER),
                               PLACE(mine, GROUP_MEANS), PLACE(mine, GROUP_FINE), ends, count, heads, width, mine[KEY_ROWS], k,
                               n[GROUP_BUDGET], threads, picks);
        else
            NAME(index_scan)(queries, s->head_weights + row * heads, plain, packed, table, NULL, ends, count, heads, width,
                             mine[KEY_ROWS], k, threads, picks);
        if (s->most_picks > k) NAME(add_forced)(s, row, count, k);
    });
}

/* Entries that a row's token uses: all it sees, or the indexer's choice. */
INLINE long NAME(used_entries)(const NAME(Step) * s, const int64_t *layer, long row) {
    long end = layer[RATIO] ? (s->positions[row] + 1) / layer[RATIO] : 0;
    if (!NAME(has_choice)(s, layer, row)) return end;
    return NAME(budget_of)(s, row) + (s->forced ? s->num_forced[row] : 0);
}

/* The keys of a row's token: its window, oldest first (the ring, then rows of this call), then the entries it uses;
 * packed ones go to `unpacked`. */
static long NAME(keys_of)(const NAME(Step) * s, const int64_t *layer, long row, T *unpacked, const T **keys) {
    const int64_t *n = s->shape, *memory = NAME(memory_of)(s, row), *table = (const int64_t *)(uintptr_t)s->tables[row];
    long position = s->positions[row], first = most(0, position - n[WINDOW] + 1), count = 0, width = n[WIDTH];
    const T *ring = PLACE(memory, RING), *entries = PLACE(memory, ENTRIES);
    for (long t = first; t <= position; t++)
        keys[count++] = t < NAME(begin_of)(s, row) ? ring + t % memory[RING_SIZE] * width
                                                 : s->kv_turned + (row - (position - t)) * width;
    long used = NAME(used_entries)(s, layer, row);
    int is_choice = used && NAME(has_choice)(s, layer, row);
    if (!is_choice && !n[ENTRY_BYTES]) { /* all of them: runs of rows */
        long run = table ? memory[ENTRY_ROWS] : used;
        for (long first = 0; first < used; first += run) {
            const T *row = entries + entry_row(table, memory[ENTRY_ROWS], first) * width;
            long many = used - first < run ? used - first : run;
            for (long i = 0; i < many; i++) keys[count + i] = row + i * width;
            count += many;
        }
        return count;
    }
    for (long i = 0; i < used; i++) {
        long entry = is_choice ? s->picks[row * s->most_picks + i] : i;
        if (entry < 0) continue;
        long place = entry_row(table, memory[ENTRY_ROWS], entry);
        if (n[ENTRY_BYTES]) {
            float one[width];
            decode_entry((const uint8_t *)entries + place * n[ENTRY_BYTES], width - n[ROPE], n[ROPE], one);
            NAME(from_floats)(one, width, unpacked);
            keys[count++] = unpacked;
            unpacked += width;
        } else keys[count++] = entries + place * width;
    }
    return count;
}

/* Heads [first, last) of rows [from, to). */
static void NAME(attend_some)(const NAME(Step) * s, const int64_t *layer, long from, long to, long first, long last,
                              long used) {
    const int64_t *n = s->shape;
    long width = n[WIDTH], heads = n[HEADS], room = n[WINDOW] + used;
    const T **keys = malloc(sizeof(T *) * room);
    T *unpacked = n[ENTRY_BYTES] ? malloc(sizeof(T) * used * width + 64) : NULL;
    float *work = malloc(sizeof(float) * attend_work(last - first, room, width));
    for (long row = from; row < to; row++) {
        long count = NAME(keys_of)(s, layer, row, unpacked, keys);
        NAME(attend_query)(s->q_turned + row * heads * width, keys, count, PLACE(layer, SINK), first, last, width,
                           s->numbers[SCALE], work, s->o + row * heads * width, s->lse + row * heads);
    }
    free(keys), free(unpacked), free(work);
}

/* One row with many keys, of which each thread takes runs, so that none is read twice. */
static void NAME(attend_runs)(const NAME(Step) * s, const int64_t *layer, long row, long used) {
    const int64_t *n = s->shape;
    long width = n[WIDTH], heads = n[HEADS], room = n[WINDOW] + used, size = run_floats(heads, width);
    const T **keys = malloc(sizeof(T *) * room), *q = s->q_turned + row * heads * width;
    T *unpacked = n[ENTRY_BYTES] ? malloc(sizeof(T) * used * width + 64) : NULL;
    long count = NAME(keys_of)(s, layer, row, unpacked, keys), runs = runs_of(count);
    float *left = malloc(sizeof(float) * runs * (size + heads * PIECE)), *weights = left + runs * size;
    SHARED_OUT(runs > 1, long run = 0; run < runs; run++, {
        NAME(attend_run)(q, keys, count, run, PLACE(layer, SINK), 0, heads, width, s->numbers[SCALE],
                         weights + run * heads * PIECE, left + run * size);
    });
    NAME(join_runs)(left, runs, 0, heads, width, s->o + row * heads * width, s->lse + row * heads);
    free(keys), free(unpacked), free(left);
}

static void NAME(attend_rows)(NAME(Step) * s, const int64_t *layer) {
    const int64_t *n = s->shape;
    long heads = n[HEADS], used = 0, rows = s->rows, threads = s->parts > 1 ? 1 : omp_get_max_threads();
    for (long row = 0; row < rows; row++) used = most(used, NAME(used_entries)(s, layer, row));
    int is_much = threads > 1 && rows * heads * (n[WINDOW] + used) * n[WIDTH] > 2 * FORK_FROM; /* dots go fast */
    if (!is_much) {
        NAME(attend_some)(s, layer, 0, rows, 0, heads, used);
        return;
    }
    if (rows < threads && used >= 2 * RUN) {
        for (long row = 0; row < rows; row++) NAME(attend_runs)(s, layer, row, used);
        return;
    }
    long cuts = rows >= threads ? 1 : heads < threads ? heads : threads; /* few rows are cut by their heads */
    long each = (heads + cuts - 1) / cuts, groups = rows < threads ? rows : threads, size = (rows + groups - 1) / groups;
    SHARED_OUT(1, long job = 0; job < groups * cuts; job++, {
        long from = job / cuts * size, to = from + size < rows ? from + size : rows, first = job % cuts * each;
        long last = first + each < heads ? first + each : heads;
        if (from < to && first < last) NAME(attend_some)(s, layer, from, to, first, last, used);
    });
}

/* Keeps the keys of the layer that was run last, for later calls. */
static void NAME(keep_window)(NAME(Step) * s, long layer) {
    long width = s->shape[WIDTH];
    for (long row = 0; row < s->rows; row++) {
        const int64_t *memory = NAME(memory_in)(s, row, layer);
        if (NAME(is_overwritten)(s, row, memory[RING_SIZE])) continue;
        memcpy((T *)PLACE(memory, RING) + s->positions[row] % memory[RING_SIZE] * width, s->kv_turned + row * width,
               sizeof(T) * width);
    }
}

/* Waits for the other parts of the call. */
static void NAME(meet)(const NAME(Step) * s) {
    if (s->parts > 1) {
#pragma omp barrier
    }
}

static void NAME(attention)(NAME(Step) * s, const int64_t *layer) {
    const int64_t *n = s->shape;
    long rows = s->rows, heads = n[HEADS], width = n[WIDTH], rope = n[ROPE], hidden = n[HIDDEN], rank = n[QUERY_RANK];
    float eps = s->numbers[NORM_EPS];
    const float *angles = NAME(angles_of)(s, layer);
    NAME(Compressor) entries = {ENTRY_WKV, ENTRY_WGATE, ENTRY_APE, ENTRY_NORM, BLOCKS_KV, BLOCKS_SCORE, BLOCKS_SIZE,
                                ENTRIES, ENTRY_ROWS, width, n[ENTRY_BYTES]};
    NAME(Compressor) keys = {INDEX_WKV, INDEX_WGATE, INDEX_APE, INDEX_NORM, INDEX_BLOCKS_KV, INDEX_BLOCKS_SCORE,
                             INDEX_BLOCKS_SIZE, INDEX_KEYS, KEY_ROWS, n[INDEX_WIDTH], n[KEY_BYTES]};
    T *turned = s->turned[s->layer % 2] + s->at * width;
    NAME(project)(s, s->normed, layer + WQ_A, 1, rank, hidden, s->latent);
    NAME(norm)(s, s->latent, PLACE(layer, Q_NORM), rank, s->latent_normed);
    NAME(project)(s, s->latent_normed, layer + WQ_B, 1, heads * width, rank, s->q);
    NAME(norm_rope_forward)(s->q, NULL, angles, rows * heads, heads, rows, width, rope, eps, s->q_turned, s->rs);
    NAME(project)(s, s->normed, layer + WKV, 1, width, hidden, s->kv);
    NAME(norm_rope_forward)(s->kv, NAME(widened)(s, PLACE(layer, KV_NORM), width), angles, rows, 1, rows, width, rope, eps,
                            turned, s->rs);
    for (long row = 0; n[ROUNDS_KV] && row < rows; row++) NAME(round_kv)(s, turned + row * width);
    int first = (int)(s->layer % 2) * 2; /* of two pairs of projections */
    if (layer[RATIO]) NAME(project_blocks)(s, layer, &entries, first);
    if (layer[INDEX_WKV]) NAME(project_blocks)(s, layer, &keys, first + 1);
    NAME(meet)(s); /* what other parts read of this layer is there, and none reads of the layer before */
    if (s->layer) NAME(keep_window)(s, s->layer - 1);
    s->kv_turned = turned;
    if (layer[RATIO]) {
        NAME(complete_blocks)(s, layer, &entries, first);
        if (layer[INDEX_WKV]) NAME(complete_blocks)(s, layer, &keys, first + 1);
        NAME(meet)(s);
        NAME(keep_blocks)(s, layer, &entries, first);
        if (layer[INDEX_WKV]) NAME(keep_blocks)(s, layer, &keys, first + 1);
        if (layer[INDEX_WKV]) NAME(select_entries)(s, layer, angles);
    }
    NAME(attend_rows)(s, layer);
    NAME(rope_rotate)(s->o, angles, rows * heads, heads, rows, width, rope, -1.0f, s->q);
    NAME(project)(s, s->q, layer + WO_A, n[GROUPS], n[OUTPUT_RANK], heads * width / n[GROUPS], s->z);
    NAME(project)(s, s->z, layer + WO_B, 1, hidden, n[GROUPS] * n[OUTPUT_RANK], s->y);
}

/* ---- experts ---------------------------------------------------------------------------------------------------- */

void experts_sort(const int64_t *chosen, long tokens, long active, long experts, int64_t *token, int64_t *choice,
                  int64_t *bounds, int64_t *slots);

static void NAME(feed)(NAME(Step) * s, const int64_t *layer) {
    const int64_t *n = s->shape, *by_token = PLACE(layer, TID2EID);
    long rows = s->rows, hidden = n[HIDDEN], inner = n[EXPERT_WIDTH], active = n[ACTIVE];
    float limit = s->numbers[LIMIT];
    NAME(project)(s, s->normed, layer + SHARED_W1, 1, inner, hidden, s->gate);
    NAME(project)(s, s->normed, layer + SHARED_W3, 1, inner, hidden, s->up);
    NAME(swiglu_forward)(s->gate, s->up, NULL, rows, inner, limit, s->inner);
    NAME(project)(s, s->inner, layer + SHARED_W2, 1, hidden, inner, s->shared);
    for (long row = 0; by_token && row < rows; row++)
        memcpy(s->chosen + row * active, by_token + s->tokens[row] * active, sizeof(int64_t) * active);
    NAME(router)(s->normed, PLACE(layer, GATE), PLACE(layer, BIAS), rows, hidden, n[EXPERTS], active,
                 s->numbers[ROUTE_SCALE], s->router_scores, s->chosen, s->routing);
    experts_sort(s->chosen, rows, active, n[EXPERTS], s->token, s->choice, s->bounds, s->slots);
    for (long i = 0; i < rows * active; i++) s->sorted[i] = s->routing[s->choice[i]];
    long format = n[EXPERT_FORMAT] - 1, is_fp4 = format == FORMAT_FP4;
    if (format < 0)
        NAME(experts_apply)(s->normed, s->token, s->bounds, s->sorted, PLACE(layer, W1), PLACE(layer, W3),
                            PLACE(layer, W2), n[EXPERTS], hidden, inner, limit, s->expert_inner, s->expert_out);
    else {
        void *s1 = PLACE(layer, W1_SCALE), *s3 = PLACE(layer, W3_SCALE), *s2 = PLACE(layer, W2_SCALE);
        Fetch fetch = (Fetch)(uintptr_t)n[FETCH];
        int64_t *places = NULL;
        long more = fetch ? fetch(s->layer, s->bounds, &places) : 1;
        if (more < 0) memset(s->expert_out, 0, sizeof(T) * rows * active * hidden);
        while (more > 0) {
            NAME(packed_experts)(s->normed, s->token, s->bounds, s->sorted, PLACE(layer, W1), is_fp4 ? s1 : NULL,
                                 is_fp4 ? NULL : s1, PLACE(layer, W3), is_fp4 ? s3 : NULL, is_fp4 ? NULL : s3,
                                 PLACE(layer, W2), is_fp4 ? s2 : NULL, is_fp4 ? NULL : s2, format, rows, n[EXPERTS],
                                 hidden, inner, limit, places, s->expert_out);
            more = fetch ? fetch(s->layer, s->bounds, &places) : 0;
        }
    }
    NAME(experts_join)(s->expert_out, s->slots, s->shared, rows, active, hidden, s->y);
}

/* Streams [rows, N, D], in place, through `s->shape[LAYERS]` layers. */
static void NAME(run_layers)(NAME(Step) * s, const int64_t *layers, T *streams) {
    const int64_t *shape = s->shape;
    long rows = s->rows, hidden = shape[HIDDEN], n = shape[STREAMS];
    float norm_eps = s->numbers[NORM_EPS], eps = s->numbers[HC_EPS];
    T *in = streams, *out = s->other;
    for (s->layer = 0; s->layer < shape[LAYERS]; s->layer++) {
        const int64_t *layer = layers + s->layer * LAYER_END;
        for (int part = 0; part < 2; part++) { /* attention, experts */
            int fn = part ? HC_FFN_FN : HC_ATTN_FN, base = part ? HC_FFN_BASE : HC_ATTN_BASE;
            int scale = part ? HC_FFN_SCALE : HC_ATTN_SCALE;
            NAME(hc_pre_forward)(in, PLACE(layer, fn), PLACE(layer, base), PLACE(layer, scale), rows, (int)n, hidden,
                                 (int)shape[ITERS], norm_eps, eps, 0, s->x, s->post, s->comb, s->raw, s->rs);
            NAME(norm)(s, s->x, PLACE(layer, part ? FFN_NORM : ATTN_NORM), hidden, s->normed);
            if (part) NAME(feed)(s, layer);
            else NAME(attention)(s, layer);
            NAME(hc_post_forward)(in, s->y, s->post, s->comb, rows, (int)n, hidden, out);
            T *swap = in;
            in = out;
            out = swap;
        }
    } /* an even number of swaps: the result lies in streams */
    NAME(meet)(s);
    NAME(keep_window)(s, shape[LAYERS] - 1);
}
