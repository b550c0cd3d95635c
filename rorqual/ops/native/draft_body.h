/* Drafts of the MTP module for one sequence, included twice by decode_step.c behind the step whose layers they run. */

/* What the module's layer reads: e_proj(enorm(embedding of the next token)) + h_proj(hnorm(streams)): -> joined [rows, N, D]. */
static void NAME(join)(NAME(Step) * s, const int64_t *module, const T *streams, T *turned, T *joined) {
    const int64_t *shape = s->shape;
    long rows = s->rows, n = shape[STREAMS], hidden = shape[HIDDEN];
    const T *embedding = PLACE(module, EMBED);
    for (long i = 0; i < rows; i++) memcpy(s->x + i * hidden, embedding + s->tokens[i] * hidden, sizeof(T) * hidden);
    NAME(norm)(s, s->x, PLACE(module, E_NORM), hidden, s->normed);
    NAME(linear)(s->normed, PLACE(module, E_PROJ), rows, 1, hidden, hidden, s->y, NULL);
    NAME(rms_norm_forward)(streams, NAME(widened)(s, PLACE(module, H_NORM), hidden), rows * n, hidden, s->numbers[NORM_EPS],
                           turned, s->rs);
    NAME(linear)(turned, PLACE(module, H_PROJ), rows * n, 1, hidden, hidden, joined, NULL);
    for (long i = 0; i < rows * n; i++)
        for (long k = 0; k < hidden; k += VECTOR) {
            T *to = joined + i * hidden + k;
            STORE(to, hidden - k, LOAD(s->y + i / n * hidden + k, hidden - k) + LOAD(to, hidden - k));
        }
}

/* The likeliest of `choices` tokens after streams [N, D], the first among equals, and its probability. */
static int64_t NAME(likeliest)(NAME(Step) * s, const int64_t *head, const T *streams, long choices, float *logits,
                               float *chance) {
    NAME(finish)(s, head, streams, 1, s->normed);
    NAME(score)(s, head, s->normed, 1, choices, logits);
    int64_t best = best_of(logits, choices);
    Vector sum = {0};
    long i = 0;
    for (; i + VECTOR <= choices; i += VECTOR) sum += exp_lanes(load(logits + i, VECTOR) - logits[best]);
    float total = sum_lanes(sum);
    for (; i < choices; i++) total += exp_(logits[i] - logits[best]);
    *chance = 1.0f / total;
    return best;
}

/* trunk [rows, N, D]: streams of a sequence's latest tokens; tokens [rows + most]: the token after each of them, behind
 * which drafts are put; chances [most]: the module's probability of each. The rows stand at `position` and on in the
 * module's own memory. Draft after draft the product of kept[places][bins] (by place and probability, how likely it is
 * to be right; the last place stands for those behind it) goes down, and the first draft that brings it below `least` is
 * the last. `choices`: ids from 0 that may be drafted.
 * -> count [1]: drafts made, at least one. */
void NAME(draft_step)(const T *trunk, int64_t *tokens, long position, long rows, long most_drafts, long choices,
                      const int64_t *shape, const float *numbers, const int64_t *layer, const int64_t *memory,
                      const int64_t *module, const int64_t *head, const float *kept, long places, long bins, float least,
                      float *chances, int64_t *count) {
    long n = shape[STREAMS], hidden = shape[HIDDEN], size = n * hidden;
    int64_t *positions = calloc(3 * rows, sizeof(int64_t)), *first = positions + rows, *tables = first + rows;
    int64_t *memories = malloc(sizeof(int64_t) * rows);
    T *turned = malloc(sizeof(T) * (rows * size + 64)), *joined = malloc(sizeof(T) * (rows * size + 64));
    float *logits = malloc(sizeof(float) * choices + 64), product = 1.0f;
    NAME(Step) s = {.shape = shape, .tokens = tokens, .positions = positions, .first = first, .tables = tables,
                    .memories = memories, .numbers = numbers, .rows = rows};
    NAME(make_shared)(&s);
    NAME(make_room)(&s);
    for (long i = 0; i < rows; i++) positions[i] = position + i, memories[i] = (int64_t)(uintptr_t)memory;
    const T *streams = trunk;
    for (*count = 0; *count < most_drafts && product >= least;) {
        NAME(join)(&s, module, streams, turned, joined);
        NAME(run_layers)(&s, layer, joined);
        const T *last = joined + (s.rows - 1) * size;
        float *chance = chances + *count;
        tokens[rows + *count] = NAME(likeliest)(&s, head, last, choices, logits, chance);
        long bin = (long)(*chance * (float)bins);
        product *= kept[(*count < places ? *count : places - 1) * bins + (bin < bins ? bin : bins - 1)];
        memmove(joined, last, sizeof(T) * size); /* the module's own streams stand in for those of the trunk */
        streams = joined;
        positions[0] = position + rows + *count, s.tokens = tokens + rows + *count;
        s.rows = s.total = 1, s.has_plain_angles = s.has_angles = 0;
        ++*count;
    }
    give_room(s.all), give_room(s.common);
    free(positions), free(memories), free(turned), free(joined), free(logits);
}
