/* ops/forced_entries.py: the entries that a query must be shown, found in the tokens before it.
 *
 * An n-gram of 1 to 3 tokens is known by its last place. `before` leads from each place to the one where the same n-gram
 * stood last, `spread` counts in how many entries it has stood so far, and a table leads from an n-gram to its last place
 * when the next token comes. Everything about a place follows from the tokens up to it, so the tables are the same however
 * tokens came in, and taking the newest back undoes them exactly. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ORDERS 3
#define MOST_HITS 64
#define MOST_CUT 256

enum Policy { RATIO, WINDOW, FIRST, LAST, SYSTEM_FIRST, SYSTEM_LAST, PINNED_MOST, RECENT, MESSAGE, HALF, CUT, HITS, BACK, BEHIND,
              VISITS, LEXICAL_MOST, POLICY_END };
enum Role { NO_ROLE, ASKS, ANSWERS }; /* of a token: begins what is asked, or what is not */

static long least(long a, long b) { return a < b ? a : b; }
static long most(long a, long b) { return a > b ? a : b; }

static int is_same(const int32_t *tokens, long a, long b, int n) {
    for (int i = 0; i < n; i++)
        if (tokens[a - i] != tokens[b - i]) return 0;
    return 1;
}

/* The table's slot of the n-gram that ends at `place`: its own, or the free one where it belongs. */
static long slot_of(const int32_t *tokens, const int32_t *table, long size, long place, int n) {
    uint64_t hash = (uint64_t)n;
    for (int i = 0; i < n; i++) hash = (hash ^ (uint32_t)tokens[place - i]) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
    long at = (long)(hash & (uint64_t)(size - 1));
    while (table[at] >= 0 && !is_same(tokens, table[at], place, n)) at = (at + 1) & (size - 1);
    return at;
}

/* Takes in tokens [from, to); before and spread [ORDERS][room], table [ORDERS][size], a power of two and more than twice the
 * tokens; asked and closed [room]: the last place of a token that begins what is asked, and the first one behind it that
 * ends it (-1: none); roles [vocabulary]. */
void grams_add(const int32_t *tokens, long from, long to, long room, long size, long ratio, const uint8_t *roles,
               long vocabulary, int32_t *before, int32_t *spread, int32_t *table, int32_t *asked, int32_t *closed) {
    for (long place = from; place < to; place++) {
        for (int n = 1; n <= ORDERS; n++) {
            long at = (n - 1) * room + place;
            before[at] = -1, spread[at] = 1;
            if (place < n - 1) continue;
            int32_t *mine = table + (n - 1) * size;
            long slot = slot_of(tokens, mine, size, place, n), last = mine[slot];
            before[at] = (int32_t)last;
            if (last >= 0) spread[at] = spread[(n - 1) * room + last] + (last / ratio != place / ratio);
            mine[slot] = (int32_t)place;
        }
        int role = tokens[place] >= 0 && tokens[place] < vocabulary ? roles[tokens[place]] : NO_ROLE;
        asked[place] = place ? asked[place - 1] : -1, closed[place] = place ? closed[place - 1] : -1;
        if (role == ASKS) asked[place] = (int32_t)place, closed[place] = -1;
        else if (role == ANSWERS && closed[place] < 0) closed[place] = (int32_t)place;
    }
}

/* Takes back tokens [to, from), the newest ones, one after the other: a slot that was free is free again. */
void grams_remove(const int32_t *tokens, long from, long to, long room, long size, const int32_t *before, int32_t *table) {
    for (long place = from - 1; place >= to; place--)
        for (int n = ORDERS; n >= 1; n--) {
            if (place < n - 1) continue;
            int32_t *mine = table + (n - 1) * size;
            mine[slot_of(tokens, mine, size, place, n)] = before[(n - 1) * room + place];
        }
}

typedef struct {
    const int32_t *tokens, *before, *spread;
    const int64_t *policy;
    long room, query, end; /* place of the query, entries that it sees */
    int64_t *scores;       /* [entries], zero but for `touched` */
    int32_t *touched, *terms;
    uint8_t *done; /* [ORDERS][room]: places whose n-gram was scored */
    uint64_t *marks;
    long num_touched;
} Search;

static int mark(Search *s, long entry) {
    if (entry < 0 || entry >= s->end) return 0;
    uint64_t bit = (uint64_t)1 << (entry & 63), *word = s->marks + (entry >> 6);
    if (*word & bit) return 0;
    *word |= bit;
    return 1;
}

static long mark_range(Search *s, long from, long to, long room) {
    long count = 0;
    for (long entry = most(from, 0); entry < to && count < room; entry++) count += mark(s, entry);
    return count;
}

/* Scores the entries where n-grams that end in [from, to) stood before, out of sight of the window: the rarest n-grams
 * first, as long as the entries to look at are no more than VISITS. Weights are whole numbers, so that they add up to the
 * same in any order: 256 n log2((entries + 1) / (entries with it + 1))^2, half of that for every HALF tokens that the n-gram
 * stands before the end of the range. */
static void score_terms(Search *s, long from, long to) {
    const int64_t *policy = s->policy;
    long ratio = policy[RATIO], shift = ratio & (ratio - 1) ? -1 : __builtin_ctzl(ratio); /* a division takes longer */
    long hidden = s->query - policy[WINDOW], cut = least(policy[CUT], MOST_CUT);
    long begins[MOST_CUT + 2] = {0}, num_terms = 0;
    int32_t *terms = s->terms, *sorted = terms + ORDERS * (to - from);
    for (long place = to - 1; place >= from; place--)
        for (int n = ORDERS; n >= 1; n--) {
            long row = (n - 1) * s->room;
            if (place < n - 1 || s->done[row + place]) continue;
            s->done[row + place] = 1;
            for (long at = s->before[row + place]; at >= from; at = s->before[row + at]) s->done[row + at] = 1;
            if (s->spread[row + place] > cut || s->before[row + place] < 0) continue;
            begins[s->spread[row + place] + 1]++;
            terms[num_terms++] = (int32_t)(place * ORDERS + n - 1);
        }
    for (long i = 1; i <= cut + 1; i++) begins[i] += begins[i - 1];
    for (long i = 0; i < num_terms; i++) sorted[begins[s->spread[terms[i] % ORDERS * s->room + terms[i] / ORDERS]]++] = terms[i];
    long visits = 0, known = -1;
    double rarity = 0;
    for (long i = 0; i < num_terms; i++) {
        long place = sorted[i] / ORDERS, n = sorted[i] % ORDERS + 1, row = (n - 1) * s->room, last = -1;
        long spread = s->spread[row + place];
        visits += spread;
        if (visits > policy[VISITS]) break;
        if (spread != known) rarity = log2((double)(s->end + 1) / (double)(spread + 1)), known = spread;
        if (!(rarity > 0)) continue;
        int64_t weight = (int64_t)rint(256.0 * n * rarity * rarity) >> least((to - 1 - place) / policy[HALF], 60);
        for (long at = place; weight && at >= 0; at = s->before[row + at]) {
            long entry = shift < 0 ? at / ratio : at >> shift;
            if (at > hidden || entry == last || entry >= s->end) continue;
            last = entry;
            if (!s->scores[entry]) s->touched[s->num_touched++] = (int32_t)entry;
            s->scores[entry] += weight;
        }
    }
}

/* Marks what follows the best places, and forgets the scores; returns how many entries that is. */
static long take_best(Search *s, long room) {
    const int64_t *policy = s->policy;
    int64_t best[MOST_HITS][2];
    long count = 0, wanted = least(policy[HITS], MOST_HITS), taken = 0;
    /* the best by score, of equal ones the latest; more than wanted are looked at, as near ones are shown together */
    for (; count < MOST_HITS; count++) best[count][0] = 0, best[count][1] = -1;
    for (long i = 0; i < s->num_touched; i++) {
        long entry = s->touched[i];
        int64_t score = s->scores[entry];
        s->scores[entry] = 0;
        long at = MOST_HITS;
        while (at > 0 && (score > best[at - 1][0] || (score == best[at - 1][0] && entry > best[at - 1][1]))) at--;
        if (at == MOST_HITS) continue;
        memmove(best + at + 1, best + at, sizeof(best[0]) * (MOST_HITS - 1 - at));
        best[at][0] = score, best[at][1] = entry;
    }
    s->num_touched = 0;
    for (long i = 0; i < MOST_HITS && wanted > 0 && best[i][1] >= 0 && taken < room; i++) {
        long entry = best[i][1];
        if (s->marks[entry >> 6] >> (entry & 63) & 1) continue; /* shown with a better one */
        taken += mark_range(s, entry, entry + 1, room - taken);
        taken += mark_range(s, entry - policy[BACK], entry + policy[BEHIND] + 1, room - taken);
        wanted--;
    }
    return taken;
}

/* For queries at places [first, first + count): entries that they must be shown, ascending -> out [count, width + 4] with -1 for
 * an empty place, behind which stand how many they are and how many came by each kind (anchors, pinned, lexical). system: the end
 * of the system message, 0 without one; pins [num_pins, 2]: spans of tokens. scores [entries], touched [entries], terms [2 ORDERS (RECENT + MESSAGE)], done
 * [ORDERS][room] and marks [entries / 64 + 1] are zero and are left so. */
void forced_entries(const int32_t *tokens, const int32_t *before, const int32_t *spread, const int32_t *asked,
                    const int32_t *closed, long room, long first, long count, const int64_t *policy, long system,
                    const int64_t *pins, long num_pins, int64_t *scores, int32_t *touched, int32_t *terms, uint8_t *done, uint64_t *marks,
                    long width, int64_t *out) {
    long ratio = policy[RATIO];
    for (long i = 0; i < count; i++) {
        long query = first + i, end = (query + 1) / ratio;
        Search s = {tokens, before, spread, policy, room, query, end, scores, touched, terms, done, marks, 0};
        int64_t *mine = out + i * (width + 4), *kind = mine + width + 1;
        long out_of_sight = query - policy[WINDOW]; /* the last token behind the window, which two entries hold */
        long near = out_of_sight < 0 ? 0 : out_of_sight / ratio + 2;
        kind[0] = mark_range(&s, 0, policy[FIRST], policy[FIRST]);
        kind[0] += mark_range(&s, near - policy[LAST], near, policy[LAST]);
        long left = policy[PINNED_MOST];
        for (long pin = 0; pin < num_pins && left > 0; pin++) {
            long from = pins[2 * pin], to = least(pins[2 * pin + 1], query + 1);
            if (from < to) left -= mark_range(&s, from / ratio, (to - 1) / ratio + 2, left);
        }
        if (system && system <= query && left > 0) {
            long last = (system - 1) / ratio + 1;
            left -= mark_range(&s, 0, least(last, policy[SYSTEM_FIRST]), left);
            if (left > 0) left -= mark_range(&s, last - policy[SYSTEM_LAST], last, left);
        }
        kind[1] = policy[PINNED_MOST] - left;
        if (policy[LEXICAL_MOST]) {
            long from = most(0, query + 1 - policy[RECENT]), to = from, low = from;
            score_terms(&s, from, query + 1);
            kind[2] = take_best(&s, policy[LEXICAL_MOST]);
            if (asked[query] >= 0 && kind[2] < policy[LEXICAL_MOST]) {
                to = least(from, closed[query] >= 0 ? closed[query] : query + 1);
                low = most(asked[query] + 1, to - policy[MESSAGE]);
                if (low < to) {
                    score_terms(&s, low, to);
                    kind[2] += take_best(&s, policy[LEXICAL_MOST] - kind[2]);
                }
            }
            for (int n = 0; n < ORDERS; n++) {
                memset(done + n * room + from, 0, query + 1 - from);
                if (low < to) memset(done + n * room + low, 0, to - low);
            }
        } else kind[2] = 0;
        long size = 0;
        for (long word = 0; word <= end >> 6; word++) {
            for (uint64_t bits = marks[word]; bits; bits &= bits - 1)
                if (size < width) mine[size++] = word * 64 + __builtin_ctzll(bits);
            marks[word] = 0;
        }
        mine[width] = size;
        for (; size < width; size++) mine[size] = -1;
    }
}

/* Names of what ops/forced_entries.py fills in; it reads them here. */
enum Sequence { TOKENS, BEFORE, SPREAD, TABLE, ASKED, CLOSED, ROLES, VOCABULARY, SCORES, TOUCHED, TERMS, DONE, MARKS, ROOM, SIZE,
                POLICY, PINS, NUM_PINS, WIDTH, OUT, SEQUENCE_END };
#define AT(field) ((void *)(uintptr_t)sequence[field])

/* Takes in one token at `place` and finds what its query must be shown, to OUT: both of the above in one call, as it is made
 * for every token that is decoded. sequence [SEQUENCE_END]. */
void forced_next(const int64_t *sequence, long place, long token, long system) {
    ((int32_t *)AT(TOKENS))[place] = (int32_t)token;
    long room = sequence[ROOM];
    const int64_t *policy = AT(POLICY);
    grams_add(AT(TOKENS), place, place + 1, room, sequence[SIZE], policy[RATIO], AT(ROLES), sequence[VOCABULARY], AT(BEFORE),
              AT(SPREAD), AT(TABLE), AT(ASKED), AT(CLOSED));
    forced_entries(AT(TOKENS), AT(BEFORE), AT(SPREAD), AT(ASKED), AT(CLOSED), room, place, 1, policy, system, AT(PINS),
                   sequence[NUM_PINS], AT(SCORES), AT(TOUCHED), AT(TERMS), AT(DONE), AT(MARKS), sequence[WIDTH], AT(OUT));
}
