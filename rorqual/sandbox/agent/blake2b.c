/* BLAKE2b with a key (RFC 7693), over several pieces of memory as if they were one. */
#include "agent.h"
#include <string.h>

typedef struct { uint64_t h[8], t; uint8_t block[128]; size_t filled, out_bytes; } State;

static const uint64_t START_VALUES[8] = {
    0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
    0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};
static const uint8_t ORDER[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

static uint64_t turn(uint64_t x, int by) { return (x >> by) | (x << (64 - by)); }

static void mix(uint64_t *v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x; v[d] = turn(v[d] ^ v[a], 32);
    v[c] += v[d];     v[b] = turn(v[b] ^ v[c], 24);
    v[a] += v[b] + y; v[d] = turn(v[d] ^ v[a], 16);
    v[c] += v[d];     v[b] = turn(v[b] ^ v[c], 63);
}

static void compress(State *s, bool last) {
    uint64_t v[16], m[16];
    memcpy(m, s->block, 128);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int i = 0; i < 16; i++) m[i] = __builtin_bswap64(m[i]);
#endif
    memcpy(v, s->h, 64);
    memcpy(v + 8, START_VALUES, 64);
    v[12] ^= s->t;
    if (last) v[14] = ~v[14];
    for (int round = 0; round < 12; round++) {
        const uint8_t *o = ORDER[round % 10];
        mix(v, 0, 4, 8, 12, m[o[0]], m[o[1]]);   mix(v, 1, 5, 9, 13, m[o[2]], m[o[3]]);
        mix(v, 2, 6, 10, 14, m[o[4]], m[o[5]]);  mix(v, 3, 7, 11, 15, m[o[6]], m[o[7]]);
        mix(v, 0, 5, 10, 15, m[o[8]], m[o[9]]);  mix(v, 1, 6, 11, 12, m[o[10]], m[o[11]]);
        mix(v, 2, 7, 8, 13, m[o[12]], m[o[13]]); mix(v, 3, 4, 9, 14, m[o[14]], m[o[15]]);
    }
    for (int i = 0; i < 8; i++) s->h[i] ^= v[i] ^ v[i + 8];
}

static void update(State *s, const uint8_t *data, size_t size) {
    while (size) {
        if (s->filled == 128) { /* a full block is only compressed when more follows: the last one is marked */
            s->t += 128;
            compress(s, false);
            s->filled = 0;
        }
        size_t take = 128 - s->filled < size ? 128 - s->filled : size;
        memcpy(s->block + s->filled, data, take);
        s->filled += take; data += take; size -= take;
    }
}

void blake2b(uint8_t *out, size_t out_bytes, const void *key, size_t key_bytes, const void *parts[], const size_t sizes[],
             int count) {
    State s = {.out_bytes = out_bytes};
    memcpy(s.h, START_VALUES, 64);
    s.h[0] ^= 0x01010000u ^ (key_bytes << 8) ^ out_bytes;
    if (key_bytes) {
        uint8_t block[128] = {0};
        memcpy(block, key, key_bytes);
        update(&s, block, 128);
        explicit_bzero(block, sizeof block);
    }
    for (int i = 0; i < count; i++) update(&s, parts[i], sizes[i]);
    s.t += s.filled;
    memset(s.block + s.filled, 0, 128 - s.filled);
    compress(&s, true);
    for (size_t i = 0; i < out_bytes; i++) out[i] = (uint8_t)(s.h[i / 8] >> (8 * (i % 8)));
    explicit_bzero(&s, sizeof s);
}
