/* Answers the driver on the host: one line a request, see vm_init.c. */
#include "agent.h"

#ifdef RORQUAL_GUEST_INIT
#include "vm_init.h"
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 200, PATIENCE_MS = 30000, AGENT_THREADS = 16 };

static int port = -1;

void control_write(const void *data, size_t size) {
    const uint8_t *p = data;
    int waited = 0;
    while (size && waited < PATIENCE_MS) {
        ssize_t n = write(port, p, size);
        if (n > 0) {
            p += n;
            size -= (size_t)n;
            waited = 0;
            continue;
        }
        if (n < 0 && errno != EAGAIN && errno != EINTR) return;
        struct pollfd wait = {.fd = port, .events = POLLOUT};
        int ready = poll(&wait, 1, 20);
        if (ready > 0 && wait.revents & POLLHUP) usleep(20000); /* nobody is there to read */
        if (ready <= 0 || wait.revents & POLLHUP) waited += 20;
    }
}

static void say(const char *text) {
    control_write(text, strlen(text));
    control_write("\n", 1);
}

/* All threads of the machine count, the kernel's too: the bound is what runs now, N more, and the agent's own few. */
static bool bound_threads(long n) {
    char text[200], *slash;
    int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (got <= 0 || n < 1) return false;
    text[got] = 0;
    slash = strchr(text, '/');
    if (!slash) return false;
    snprintf(text, sizeof text, "%ld", atol(slash + 1) + n + AGENT_THREADS);
    fd = open("/proc/sys/kernel/threads-max", O_WRONLY | O_CLOEXEC);
    bool done = fd >= 0 && write(fd, text, strlen(text)) > 0;
    if (fd >= 0) close(fd);
    return done;
}

static void answer(const char *line) {
    if (!strncmp(line, "threads ", 8)) {
        say(bound_threads(atol(line + 8)) ? "ok" : "error threads-max could not be set");
    } else if (!strcmp(line, "tar")) {
        sync();
        write_tar(UPPER);
    } else if (!strncmp(line, "clock ", 6)) { /* microseconds since 1970: the machine stood still for a while */
        long long us = atoll(line + 6);
        struct timespec t = {us / 1000000, us % 1000000 * 1000};
        say(us > 0 && clock_settime(CLOCK_REALTIME, &t) == 0 ? "ok" : "error the clock could not be set");
    } else if (!strcmp(line, "oom")) {
        char text[100], key[60];
        unsigned long long value, kills = 0;
        FILE *f = fopen("/proc/vmstat", "re");
        while (f && fgets(text, sizeof text, f))
            if (sscanf(text, "%59s %llu", key, &value) == 2 && !strcmp(key, "oom_kill")) kills = value;
        if (f) fclose(f);
        snprintf(text, sizeof text, "%llu", kills);
        say(text);
    } else if (!strcmp(line, "sync")) {
        sync();
        say("ok");
    } else {
        say("error unknown request");
    }
}

static ssize_t take_lines(void) { /* what the last read said */
    static char line[LINE];
    static size_t used;
    char chunk[256];
    ssize_t n;
    while ((n = read(port, chunk, sizeof chunk)) > 0)
        for (ssize_t i = 0; i < n; i++) {
            if (chunk[i] == '\n') {
                line[used] = 0;
                used = 0;
                answer(line);
            } else if (used + 1 < LINE) {
                line[used++] = chunk[i];
            }
        }
    return n;
}

/* One client after the other on a listening socket; the machine's end is noticed between them. */
static void serve_client(int listener) {
    port = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (port < 0) return;
    say("ready");
    for (;;) {
        struct pollfd wait = {.fd = port, .events = POLLIN};
        if (poll(&wait, 1, PATIENCE_MS) <= 0) break;
        ssize_t n = take_lines();
        if (n == 0 || (n < 0 && errno != EAGAIN)) break;
    }
    close(port);
}

int control_loop(int the_port, bool listening, pid_t agent, int children) {
    port = the_port;
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event on_port = {.events = EPOLLIN | (listening ? 0 : EPOLLET), .data.fd = the_port}; /* a shut port would wake us for ever */
    struct epoll_event on_child = {.events = EPOLLIN, .data.fd = children};
    epoll_ctl(epoll, EPOLL_CTL_ADD, the_port, &on_port);
    epoll_ctl(epoll, EPOLL_CTL_ADD, children, &on_child);
    if (!listening) say("ready");
    for (;;) {
        struct epoll_event ready[4];
        int n = epoll_wait(epoll, ready, 4, -1);
        for (int i = 0; i < n; i++) {
            if (ready[i].data.fd == the_port) {
                if (listening) serve_client(the_port);
                else take_lines();
                continue;
            }
            struct signalfd_siginfo info;
            while (read(children, &info, sizeof info) == sizeof info) {}
            int status;
            pid_t ended;
            while ((ended = waitpid(-1, &status, WNOHANG)) > 0)
                if (ended == agent) return status;
        }
    }
}
#endif
