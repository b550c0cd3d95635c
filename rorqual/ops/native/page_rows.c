/* Pages from rows of bytes (ops/page_rows.py): row i holds, part after part, what page pages[i] of each part becomes.
 * `places` has each part's address and the bytes of one of its pages. */

#include <stdint.h>
#include <string.h>

void scatter_pages(const uint8_t *content, const int64_t *pages, const int64_t *places, long rows, long stride,
                   long parts) {
    for (long row = 0; row < rows; row++) {
        const uint8_t *from = content + row * stride;
        for (long part = 0; part < parts; part++) {
            char *to = (char *)(intptr_t)places[2 * part];
            size_t size = (size_t)places[2 * part + 1];
            memcpy(to + (size_t)pages[row] * size, from, size);
            from += size;
        }
    }
}
