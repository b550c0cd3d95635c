/* Fields of a payload: tag (1 byte), length (4), bytes. A number is 8 bytes, little endian. A tag may come again. */
#include "agent.h"
#include <stdlib.h>
#include <string.h>

const uint8_t MAGIC[MAGIC_BYTES] = {0xf7, 'r', 'o', 'r', 'q', 'u', 'a', 'l', 0x00, 0xd3, 0x9e, 0x51, 0xc8, 0x1a, 0xb6, 0x01};

void buffer_add(Buffer *b, const void *data, size_t size) {
    if (b->size + size > b->room) {
        size_t room = b->room ? b->room : 256;
        while (room < b->size + size) room *= 2;
        uint8_t *grown = realloc(b->data, room);
        if (!grown) end("out of memory");
        b->data = grown;
        b->room = room;
    }
    if (size) memcpy(b->data + b->size, data, size);
    b->size += size;
}

void buffer_drop(Buffer *b, size_t size) {
    memmove(b->data, b->data + size, b->size - size);
    b->size -= size;
    if (!b->size && b->room > (64u << 10)) buffer_free(b);
}

void buffer_free(Buffer *b) {
    free(b->data);
    memset(b, 0, sizeof *b);
}

void field_bytes(Buffer *b, uint8_t tag, const void *data, size_t size) {
    uint8_t head[5] = {tag, (uint8_t)size, (uint8_t)(size >> 8), (uint8_t)(size >> 16), (uint8_t)(size >> 24)};
    buffer_add(b, head, sizeof head);
    buffer_add(b, data, size);
}

void field_text(Buffer *b, uint8_t tag, const char *text) { field_bytes(b, tag, text, strlen(text)); }

void field_number(Buffer *b, uint8_t tag, uint64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(value >> (8 * i));
    field_bytes(b, tag, bytes, 8);
}

bool next_field(Cursor *c) {
    if (c->rest.size < 5) return false;
    const uint8_t *p = c->rest.data;
    size_t size = p[1] | (size_t)p[2] << 8 | (size_t)p[3] << 16 | (size_t)p[4] << 24;
    if (size > c->rest.size - 5) return false;
    c->tag = p[0];
    c->value = (Slice){p + 5, size};
    c->rest = (Slice){p + 5 + size, c->rest.size - 5 - size};
    return true;
}

bool find_bytes(Slice payload, uint8_t tag, Slice *value) {
    Cursor c = {.rest = payload};
    while (next_field(&c))
        if (c.tag == tag) {
            *value = c.value;
            return true;
        }
    return false;
}

uint64_t find_number(Slice payload, uint8_t tag, uint64_t otherwise) {
    Slice s;
    if (!find_bytes(payload, tag, &s) || s.size != 8) return otherwise;
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--) value = value << 8 | s.data[i];
    return value;
}

char *find_text(Slice payload, uint8_t tag) {
    Slice s;
    if (!find_bytes(payload, tag, &s) || memchr(s.data, 0, s.size)) return NULL;
    char *text = malloc(s.size + 1);
    if (!text) end("out of memory");
    memcpy(text, s.data, s.size);
    text[s.size] = 0;
    return text;
}
