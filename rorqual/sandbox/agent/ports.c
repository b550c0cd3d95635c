/* Ports: the agent connects to 127.0.0.1 inside and carries the bytes over the channel; no network leads in or out. */
#include "agent.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_LINKS = 64, LINK_ROOM = 1 << 20, PORT_CHUNK = 32 << 10, WINDOW = 512 << 10 };

typedef struct {
    Watch watch;
    bool used, connecting, half_closed, shut;
    uint64_t id, request; /* the request that waits: to be connected, or for its bytes to be taken */
    uint64_t ahead; /* bytes sent to the client that it has not passed on yet */
    Buffer output;
} Link;

static Link links[MAX_LINKS];

static Link *by_id(uint64_t id) {
    for (int i = 0; i < MAX_LINKS; i++)
        if (links[i].used && links[i].id == id) return &links[i];
    return NULL;
}

static void interest(Link *l) {
    uint32_t events = 0;
    if (l->connecting || l->output.size) events |= EPOLLOUT;
    if (!l->connecting && !l->half_closed && l->ahead < WINDOW && client_may_stream()) events |= EPOLLIN;
    watch_change(&l->watch, events);
}

static void close_link(Link *l, bool tell) {
    Buffer b = {0};
    uint64_t request = l->request;
    tell = tell && !l->half_closed;
    field_number(&b, F_ID, l->id);
    buffer_free(&l->output);
    watch_remove(&l->watch);
    memset(l, 0, sizeof *l); /* before a send, which closes every link when it fails: this one must be gone by then */
    if (request) send_error(request, ECONNRESET, "the connection inside was closed");
    if (tell) send_frame(PORT_ENDED, 0, &b);
    buffer_free(&b);
}

static void flush_link(Link *l) {
    while (l->output.size) {
        ssize_t n = send(l->watch.fd, l->output.data, l->output.size, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0) {
            close_link(l, true);
            return;
        }
        buffer_drop(&l->output, (size_t)n);
    }
    if (!l->output.size && l->request) {
        uint64_t request = l->request;
        l->request = 0;
        send_ok(request);
    }
    if (!l->output.size && l->shut) shutdown(l->watch.fd, SHUT_WR);
    interest(l);
}

void port_request(Header *h, Slice p) {
    uint64_t id = find_number(p, F_ID, 0);
    Link *l = by_id(id);
    if (h->type == PORT_OPEN) {
        for (int i = 0; i < MAX_LINKS && !l; i++)
            if (!links[i].used) l = &links[i];
        int fd = l && !l->used ? socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0) : -1;
        if (fd < 0) {
            send_error(h->request, EMFILE, "64 connections are open already");
            return;
        }
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)find_number(p, F_PORT, 0)),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        if (connect(fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
            send_error(h->request, errno, strerror(errno));
            close(fd);
            return;
        }
        *l = (Link){.used = true, .connecting = true, .id = id, .request = h->request};
        watch_add(&l->watch, fd, W_PORT, l, 0, EPOLLOUT);
        return;
    }
    Slice data;
    if (!l) {
        send_error(h->request, ENOTCONN, "this connection is closed");
    } else if (h->type == PORT_CLOSE) {
        if (find_number(p, F_DONE, 1)) {
            close_link(l, false);
        } else {
            l->shut = true;
            flush_link(l);
        }
        send_ok(h->request);
    } else if (find_number(p, F_SIZE, 0)) {
        uint64_t taken = find_number(p, F_SIZE, 0);
        l->ahead -= taken < l->ahead ? taken : l->ahead;
        interest(l);
        send_ok(h->request);
    } else if (l->request || !find_bytes(p, F_DATA, &data) || data.size > LINK_ROOM) {
        send_error(h->request, EAGAIN, "wait for the answer to the bytes sent before");
    } else {
        l->request = h->request; /* answered when all is handed over: the sender cannot run ahead */
        buffer_add(&l->output, data.data, data.size);
        flush_link(l);
    }
}

void port_event(Watch *w, uint32_t events) {
    Link *l = w->owner;
    if (l->connecting) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(w->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        uint64_t request = l->request;
        l->request = 0;
        if (error) {
            send_error(request, error, strerror(error));
            close_link(l, false);
            return;
        }
        l->connecting = false;
        send_ok(request);
        interest(l);
        return;
    }
    if (events & EPOLLOUT) {
        flush_link(l);
        if (!l->used) return;
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || l->ahead >= WINDOW || !client_may_stream()) return;
    static uint8_t chunk[PORT_CHUNK];
    ssize_t n = recv(w->fd, chunk, sizeof chunk, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    Buffer b = {0};
    field_number(&b, F_ID, l->id);
    if (n > 0) {
        l->ahead += (uint64_t)n;
        field_bytes(&b, F_DATA, chunk, (size_t)n);
        send_frame(PORT_BYTES, 0, &b);
    } else if (n < 0) {
        close_link(l, true);
    } else if (!l->half_closed) {
        send_frame(PORT_ENDED, 0, &b);
        l->half_closed = true;
    } else if (events & (EPOLLHUP | EPOLLERR)) {
        close_link(l, false);
    }
    buffer_free(&b);
    if (l->used) interest(l);
}

void ports_pump(void) {
    for (int i = 0; i < MAX_LINKS; i++)
        if (links[i].used) interest(&links[i]);
}

void ports_close_all(void) {
    for (int i = 0; i < MAX_LINKS; i++) {
        if (!links[i].used) continue;
        links[i].request = 0;
        close_link(&links[i], false);
    }
}
