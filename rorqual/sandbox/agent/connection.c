/* Clients: bytes in, frames checked, frames out.
 *
 * A hello carries a fresh nonce, the caller's epoch and, the first time, the secret. It is sealed with the secret; what
 * follows in both directions is sealed with a key made of the secret and both nonces, with a running number in every
 * code, so no frame can be repeated, left out or taken from another connection. A hello may come at any place of the
 * stream, also in the middle of a frame that a dead client left unfinished. The newest hello whose epoch is not below
 * the highest one seen wins; the one before is told that it is stale.
 */
#include "agent.h"
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 8, HELLO_WITHIN_US = 20000000, STREAM_BELOW = 512 << 10, NONCE_BYTES = 16 };

struct Connection {
    Watch in_watch, out_watch;
    int in, out;       /* one socket, or two ends of pipes */
    bool open, single; /* single: a lasting device such as a serial port; it is never closed */
    bool greeted;
    uint64_t since_us, sent, received;
    uint8_t key[KEY_BYTES];
    Buffer input, output;
};

static Connection connections[MAX_CONNECTIONS];
Connection *client;
static uint8_t secret[KEY_BYTES];
static uint64_t epoch;

bool client_may_stream(void) { return client && client->output.size < STREAM_BELOW; }

void forget_keys(void) {
    explicit_bzero(secret, sizeof secret);
    for (int i = 0; i < MAX_CONNECTIONS; i++) explicit_bzero(connections[i].key, KEY_BYTES);
}

static void message_code(uint8_t out[MAC_BYTES], const uint8_t *key, uint64_t number, uint8_t side, const void *frame,
                         size_t size) {
    uint8_t place[9];
    for (int i = 0; i < 8; i++) place[i] = (uint8_t)(number >> (8 * i));
    place[8] = side;
    blake2b(out, MAC_BYTES, key, KEY_BYTES, (const void *[]){place, frame}, (size_t[]){sizeof place, size}, 2);
}

static bool same(const uint8_t *a, const uint8_t *b, size_t size) { /* takes as long for any difference */
    uint8_t difference = 0;
    for (size_t i = 0; i < size; i++) difference |= a[i] ^ b[i];
    return !difference;
}

static void client_gone(void) {
    client = NULL;
    commands_detach();
    file_jobs_detach();
    ports_close_all();
}

static void close_connection(Connection *c) {
    if (client == c) client_gone();
    c->greeted = false;
    explicit_bzero(c->key, KEY_BYTES);
    if (c->single) {
        buffer_free(&c->output);
        return;
    }
    c->open = false;
    watch_remove(&c->in_watch);
    buffer_free(&c->input);
    buffer_free(&c->output);
}

static void flush_output(Connection *c) {
    while (c->open && c->output.size) {
        ssize_t n = write(c->out, c->output.data, c->output.size < (256u << 10) ? c->output.size : 256u << 10);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno != EAGAIN) {
            close_connection(c);
            return;
        }
        if (n <= 0) break;
        buffer_drop(&c->output, (size_t)n);
    }
    if (!c->open) return;
    if (c->out == c->in)
        watch_change(&c->in_watch, EPOLLIN | (c->single ? EPOLLET : 0) | (c->output.size ? EPOLLOUT : 0));
    else
        watch_change(&c->out_watch, c->output.size ? EPOLLOUT : 0);
}

static void send_on(Connection *c, const uint8_t *key, uint64_t number, uint8_t type, uint64_t request, const Buffer *payload) {
    Header h = {.type = type, .length = payload ? (uint32_t)payload->size : 0, .request = request};
    memcpy(h.magic, MAGIC, MAGIC_BYTES);
    size_t start = c->output.size;
    buffer_add(&c->output, &h, sizeof h);
    if (payload) buffer_add(&c->output, payload->data, payload->size);
    uint8_t code[MAC_BYTES];
    message_code(code, key, number, 1, c->output.data + start, c->output.size - start);
    buffer_add(&c->output, code, MAC_BYTES);
    flush_output(c);
}

void send_frame(uint8_t type, uint64_t request, const Buffer *payload) {
    if (client) send_on(client, client->key, client->sent++, type, request, payload);
}

void send_ok(uint64_t request) { send_frame(OK, request, NULL); }

void send_error(uint64_t request, int error, const char *text) {
    Buffer b = {0};
    field_number(&b, F_ERRNO, (uint64_t)error);
    field_text(&b, F_TEXT, text);
    send_frame(ERROR, request, &b);
    buffer_free(&b);
}

static bool hello(Connection *c, const Header *h, Slice payload, const uint8_t *frame, size_t frame_bytes) {
    Slice nonce, given;
    uint8_t code[MAC_BYTES];
    if (!find_bytes(payload, F_NONCE, &nonce) || nonce.size != NONCE_BYTES) return false;
    bool first = !settings.provisioned && find_bytes(payload, F_SECRET, &given) && given.size == KEY_BYTES;
    if (!settings.provisioned && !first) return false;
    message_code(code, first ? given.data : secret, 0, 0, frame, frame_bytes);
    if (!same(code, frame + frame_bytes, MAC_BYTES)) return false;
    if (first) {
        memcpy(secret, given.data, KEY_BYTES);
        provision(payload);
    }
    uint64_t theirs = find_number(payload, F_EPOCH, 0);
    bool stale = theirs < epoch;
    if (!stale) epoch = theirs;
    if (client && !stale) {
        Connection *old = client;
        if (old != c) {
            send_frame(STALE, 0, NULL);
            close_connection(old);
        } else {
            client_gone();
            buffer_free(&c->output);
        }
    }
    uint8_t mine[NONCE_BYTES];
    if (getrandom(mine, sizeof mine, 0) != sizeof mine) end("no random numbers");
    Buffer b = {0};
    field_bytes(&b, F_NONCE, nonce.data, nonce.size);
    field_bytes(&b, F_TOKEN, mine, sizeof mine);
    field_number(&b, F_EPOCH, epoch);
    field_number(&b, F_PID, (uint64_t)getpid());
    send_on(c, secret, 0, stale ? STALE : WELCOME, h->request, &b);
    buffer_free(&b);
    if (stale || !c->open) return true;
    blake2b(c->key, KEY_BYTES, secret, KEY_BYTES, (const void *[]){nonce.data, mine},
            (size_t[]){NONCE_BYTES, sizeof mine}, 2);
    c->sent = c->received = 0;
    c->greeted = true;
    client = c;
    return true;
}

/* Bytes that can be dropped because no frame begins there: all before the next possible magic. */
static size_t garbage(const uint8_t *data, size_t size, size_t from) {
    while (from < size) {
        const uint8_t *p = memchr(data + from, MAGIC[0], size - from);
        if (!p) return size;
        size_t left = size - (size_t)(p - data);
        if (!memcmp(p, MAGIC, left < MAGIC_BYTES ? left : MAGIC_BYTES)) return (size_t)(p - data);
        from = (size_t)(p - data) + 1;
    }
    return size;
}

/* A whole and right hello inside an unfinished frame: the client was replaced by another on the same stream. */
static size_t later_hello(Connection *c) {
    const uint8_t *data = c->input.data;
    size_t size = c->input.size, at = garbage(data, size, 1);
    while (at + HEADER_BYTES + MAC_BYTES <= size) {
        Header h;
        memcpy(&h, data + at, sizeof h);
        if (h.type == HELLO && h.length <= (64u << 10) && at + HEADER_BYTES + h.length + MAC_BYTES <= size) {
            uint8_t code[MAC_BYTES];
            message_code(code, secret, 0, 0, data + at, HEADER_BYTES + h.length);
            if (settings.provisioned && same(code, data + at + HEADER_BYTES + h.length, MAC_BYTES)) return at;
        }
        at = garbage(data, size, at + 1);
    }
    return 0;
}

static void take_frames(Connection *c) {
    while (c->open && c->input.size) {
        size_t skip = garbage(c->input.data, c->input.size, 0);
        if (skip) {
            buffer_drop(&c->input, skip);
            continue;
        }
        if (c->input.size < HEADER_BYTES) return;
        Header h;
        memcpy(&h, c->input.data, sizeof h);
        size_t whole = HEADER_BYTES + (size_t)h.length + MAC_BYTES;
        if (h.length > MAX_PAYLOAD) {
            buffer_drop(&c->input, 1);
            continue;
        }
        if (c->input.size < whole) {
            size_t at = c->single ? later_hello(c) : 0;
            if (!at) return;
            buffer_drop(&c->input, at);
            continue;
        }
        Slice payload = {c->input.data + HEADER_BYTES, h.length};
        bool right;
        if (h.type == HELLO) {
            right = hello(c, &h, payload, c->input.data, HEADER_BYTES + h.length);
        } else {
            uint8_t code[MAC_BYTES];
            right = c->greeted;
            if (right) {
                message_code(code, c->key, c->received, 0, c->input.data, HEADER_BYTES + h.length);
                right = same(code, c->input.data + HEADER_BYTES + h.length, MAC_BYTES);
            }
            if (right) {
                c->received++;
                Buffer copy = {0}; /* the request may close this connection */
                buffer_add(&copy, payload.data, payload.size);
                Slice kept = {copy.data, copy.size};
                if (h.type == REKEY) {
                    Slice fresh;
                    if (find_bytes(kept, F_SECRET, &fresh) && fresh.size == KEY_BYTES) memcpy(secret, fresh.data, KEY_BYTES);
                    epoch = find_number(kept, F_EPOCH, epoch); /* a copy of a sandbox counts its clients anew */
                }
                dispatch(&h, kept);
                buffer_free(&copy);
            }
        }
        if (!c->open) return;
        buffer_drop(&c->input, right ? whole : 1);
    }
}

static Connection *free_place(void) {
    for (int i = 0; i < MAX_CONNECTIONS; i++)
        if (!connections[i].open) return &connections[i];
    return NULL;
}

void connection_accept(int listen_fd) {
    int fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    Connection *c = free_place();
    if (!c) {
        close(fd);
        return;
    }
    memset(c, 0, sizeof *c);
    c->open = true;
    c->in = c->out = fd;
    c->since_us = now_us();
    watch_add(&c->in_watch, fd, W_CONNECTION, c, 0, EPOLLIN);
}

void connection_stream(int in_fd, int out_fd) {
    Connection *c = free_place();
    memset(c, 0, sizeof *c);
    c->open = c->single = true;
    c->in = in_fd;
    c->out = out_fd;
    fcntl(in_fd, F_SETFL, fcntl(in_fd, F_GETFL) | O_NONBLOCK);
    fcntl(out_fd, F_SETFL, fcntl(out_fd, F_GETFL) | O_NONBLOCK);
    watch_add(&c->in_watch, in_fd, W_CONNECTION, c, 0, EPOLLIN | EPOLLET); /* a hung-up port would wake us for ever */
    if (out_fd != in_fd) watch_add(&c->out_watch, out_fd, W_CONNECTION, c, 1, 0);
}

void connection_ready(Connection *c, uint32_t events) {
    if (!c->open) return;
    if (events & EPOLLOUT) {
        flush_output(c);
        if (!c->open) return;
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    static uint8_t chunk[64 << 10];
    do {
        ssize_t n = read(c->in, chunk, sizeof chunk);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            if (!c->single) close_connection(c);
            return; /* the host's end of a serial port is shut for now; its opening is another event */
        }
        buffer_add(&c->input, chunk, (size_t)n);
        take_frames(c);
    } while (c->open && c->single);
}

void connections_reap(void) {
    for (int i = 0; i < MAX_CONNECTIONS; i++) {
        Connection *c = &connections[i];
        if (c->open && !c->single && !c->greeted && now_us() - c->since_us > HELLO_WITHIN_US) close_connection(c);
    }
}
