/* ops/last_match.py: where the end of a text stood before. */

#include <stdint.h>

#define BLOCK 64 /* places that are looked at together */

/* ids [n]: of all i with ids[i - 1], ids[i] like the last two, the one with the longest match backwards (up to `most`),
 * the last of them -> found: the match's length (0: none) and i + 1. */
void last_match(const int32_t *ids, long n, long most, int64_t *found) {
    int32_t last = n ? ids[n - 1] : 0;
    found[0] = found[1] = 0;
    for (long end = n - 1; end > 1; end -= BLOCK) { /* of i in [end - BLOCK, end) */
        long begin = end - BLOCK > 1 ? end - BLOCK : 1;
        int is_there = 0;
        for (long i = begin; i < end; i++) is_there |= ids[i] == last;
        if (!is_there) continue;
        for (long i = end - 1; i >= begin; i--) {
            long length = 0;
            while (length < most && length <= i && ids[i - length] == ids[n - 1 - length]) length++;
            if (length < 2 || length <= found[0]) continue;
            found[0] = length, found[1] = i + 1;
            if (length == most) return;
        }
    }
}
