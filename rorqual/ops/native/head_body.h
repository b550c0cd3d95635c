/* What stands behind the last layer, and the step as a whole; included twice by decode_step.c behind the layers. */

#ifndef ELEMENT_BF16
/* The first of the largest of n scores; a NaN counts as the largest. */
static int64_t best_of(const float *scores, long n) {
    Vector most = (Vector){0} + scores[0];
    Integers has_nan = {0};
    long i = 0, at = 0;
    for (; i + VECTOR <= n; i += VECTOR) {
        Vector x = load(scores + i, VECTOR);
        has_nan |= x != x;
        most = choose(most < x, x, most);
    }
    float top = most[0];
    for (int j = 1; j < VECTOR; j++) top = max_(top, most[j]);
    int is_plain = top == top;
    for (int j = 0; j < VECTOR; j++) is_plain &= !has_nan[j];
    for (; i < n; i++) top = max_(top, scores[i]), is_plain &= scores[i] == scores[i];
    while (is_plain ? scores[at] != top : scores[at] == scores[at]) at++;
    return at;
}
#endif

/* HC head and final norm of streams [rows, N, D] -> hidden [rows, D]; at most as many rows as the step has. */
static void NAME(finish)(NAME(Step) * s, const int64_t *head, const T *streams, long rows, T *hidden) {
    const int64_t *shape = s->shape;
    float eps = s->numbers[NORM_EPS];
    NAME(hc_head_forward)(streams, PLACE(head, HEAD_FN), PLACE(head, HEAD_BASE), PLACE(head, HEAD_SCALE), rows,
                          (int)shape[STREAMS], shape[HIDDEN], eps, s->numbers[HC_EPS], s->x, s->post, s->raw, s->rs);
    NAME(rms_norm_forward)(s->x, NAME(widened)(s, PLACE(head, HEAD_NORM), shape[HIDDEN]), rows, shape[HIDDEN], eps, hidden,
                           s->rs);
}

/* Logits [rows, choices] of hidden [rows, D]: the first `choices` rows of the output head. */
static void NAME(score)(NAME(Step) * s, const int64_t *head, const T *hidden, long rows, long choices, float *logits) {
    NAME(linear)(hidden, PLACE(head, HEAD_WEIGHT), rows, 1, choices, s->shape[HIDDEN], NULL, logits);
}

/* Where each of `parts` parts of a call's rows begins -> cuts [parts + 1]: so that they hold about as many products. Later
 * tokens have more entries to score and to attend to; so near the beginning of a text even halves keep a thread waiting. */
static void NAME(cut_rows)(const NAME(Step) * s, const int64_t *layers, long parts, long *cuts) {
    const int64_t *n = s->shape;
    double keys = n[HEADS] * n[WIDTH], plain = 0.0, slope = 0.0, sum = 0.0, all = 0.0;
    for (long i = 0; i < n[LAYERS]; i++) {
        const int64_t *layer = layers + i * LAYER_END;
        double ratio = layer[RATIO] ? layer[RATIO] : 1.0, index = layer[INDEX_WKV] ? n[INDEX_HEADS] * n[INDEX_WIDTH] : 0;
        plain += n[HIDDEN] * (n[QUERY_RANK] + n[WIDTH] + 3.0 * n[EXPERT_WIDTH] * (n[ACTIVE] + 1)) + n[QUERY_RANK] * (keys + index);
        plain += keys * (n[OUTPUT_RANK] + 2.0 * n[WINDOW]) + n[GROUPS] * n[OUTPUT_RANK] * n[HIDDEN];
        plain += 2.0 * n[STREAMS] * n[STREAMS] * (n[STREAMS] + 2) * n[HIDDEN];
        if (layer[RATIO] && !(index && n[GROUP_BUDGET])) slope += (index ? index : 2.0 * keys) / ratio;
    }
    for (long row = 0; row < s->rows; row++) all += plain + slope * (double)s->positions[row];
    cuts[0] = 0, cuts[parts] = s->rows;
    for (long row = 0, part = 1; part < parts; row++) { /* every part has a row */
        sum += plain + slope * (double)s->positions[row];
        if (sum >= all * part / parts || s->rows - row - 1 == parts - part) cuts[part++] = row + 1;
    }
}

/* The step's tokens -> streams [rows, N, D], all of a token alike. */
static void NAME(embed)(const NAME(Step) * s, const T *embedding, T *streams) {
    long d = s->shape[HIDDEN], n = s->shape[STREAMS];
    for (long i = 0; i < s->rows * n; i++) memcpy(streams + i * d, embedding + s->tokens[i / n] * d, sizeof(T) * d);
}

/* This thread's part of many rows through all layers: what a row needs of other rows it finds in shared room. So threads
 * meet a few times a layer only, and what a part works on stays in its thread's cache. */
static void NAME(run_part)(const NAME(Step) * whole, const T *embedding, const int64_t *layers, T *streams) {
    NAME(Step) s = *whole;
    long parts = omp_get_num_threads(), part = omp_get_thread_num(), cuts[parts + 1];
    NAME(cut_rows)(whole, layers, parts, cuts);
    s.parts = parts, s.at = cuts[part], s.rows = cuts[part + 1] - s.at;
    s.tokens += s.at, s.positions += s.at, s.first += s.at, s.tables += s.at, s.memories += s.at;
    s.forced += s.at, s.num_forced += s.at, s.budgets += s.at;
    NAME(make_room)(&s);
    streams += s.at * s.shape[STREAMS] * s.shape[HIDDEN];
    NAME(embed)(&s, embedding, streams);
    NAME(run_layers)(&s, layers, streams);
    give_room(s.all);
}

/* embedding [V, D]; shape, numbers and layers [L, LAYER_END] of the model; of each row, one behind the other in `places`
 * [8][rows]: its token, its position, the row where its sequence begins (whose rows stand one behind the other), the
 * addresses of the sequence's pages (0: none) and of its memory [L, MEMORY_END], and what its guard says: address and number
 * of entries that it must be shown, ascending, and how many the indexer chooses (0: the model's k) -> streams [rows, N, D]. Behind `count` of
 * the rows, those in `wanted`, also hidden states [count, D], logits [count, choices] and the best token of each [count]. */
void NAME(decode_step)(const T *embedding, const int64_t *shape, const float *numbers, const int64_t *layers,
                       const int64_t *head, const int64_t *places, long rows, const int64_t *wanted, long count,
                       long choices, T *streams, T *hidden, float *logits, int64_t *best) {
    NAME(Step) s = {.shape = shape, .tokens = places, .positions = places + rows, .first = places + 2 * rows,
                    .tables = places + 3 * rows, .memories = places + 4 * rows, .forced = places + 5 * rows,
                    .num_forced = places + 6 * rows, .budgets = places + 7 * rows, .numbers = numbers, .rows = rows};
    long d = shape[HIDDEN], n = shape[STREAMS];
    NAME(make_shared)(&s);
    long parts = rows / PART_ROWS < omp_get_max_threads() ? rows / PART_ROWS : omp_get_max_threads();
    if (parts > 1) {
#pragma omp parallel num_threads(parts)
        NAME(run_part)(&s, embedding, layers, streams);
        s.rows = count;
        NAME(make_room)(&s);
    } else {
        NAME(make_room)(&s);
        NAME(embed)(&s, embedding, streams);
        NAME(run_layers)(&s, layers, streams);
    }
    if (count) {
        for (long i = 0; i < count; i++) memcpy(s.other + i * n * d, streams + wanted[i] * n * d, sizeof(T) * n * d);
        NAME(finish)(&s, head, s.other, count, hidden);
        NAME(score)(&s, head, hidden, count, choices, logits);
        for (long i = 0; i < count; i++) best[i] = best_of(logits + i * choices, choices);
    }
    give_room(s.all), give_room(s.common);
}
