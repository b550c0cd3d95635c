/* The loop: waits for clients, commands, ports and times, and hands each event to its file. */
#include "agent.h"
#include <fcntl.h>
#include <linux/random.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_IDLE = 40, EXIT_LIFETIME = 41, EXIT_ASKED = 42, EXIT_BROKEN = 43, UNCLAIMED_MS = 600000, MAX_REAPED = 512 };

Settings settings;
static int epoll = -1;
static bool unreaped;
static bool machine; /* pid 1 of a virtual machine, which must switch it off */

void agent_is_machine(void) { machine = true; }

void watch_add(Watch *w, int fd, enum WatchKind kind, void *owner, int which, uint32_t events) {
    *w = (Watch){kind, owner, fd, which, events};
    struct epoll_event e = {.events = events, .data.ptr = w};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
}

void watch_change(Watch *w, uint32_t events) {
    if (w->events == events) return;
    w->events = events;
    struct epoll_event e = {.events = events, .data.ptr = w};
    epoll_ctl(epoll, EPOLL_CTL_MOD, w->fd, &e);
}

/* Events of the round that is being handled; a removed watch must not be handed one. */
static struct epoll_event ready[64];
static int ready_count;

void watch_remove(Watch *w) {
    for (int i = 0; i < ready_count; i++)
        if (ready[i].data.ptr == w) ready[i].data.ptr = NULL;
    epoll_ctl(epoll, EPOLL_CTL_DEL, w->fd, NULL);
    close(w->fd);
    w->fd = -1;
}

uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

uint64_t running_us(void) { return (settings.paused ? settings.paused_at_us : now_us()) - settings.paused_total_us; }

void touch(void) { settings.active_ms = now_us() / 1000; }

void end(const char *reason) {
    int code = !strcmp(reason, "idle")       ? EXIT_IDLE
               : !strcmp(reason, "lifetime") ? EXIT_LIFETIME
               : !strcmp(reason, "asked")    ? EXIT_ASKED
                                             : EXIT_BROKEN;
    if (getpid() == 1) kill(-1, SIGKILL);
    if (machine) {
        sync();
        reboot(RB_POWER_OFF);
    }
    _exit(code);
}

static void keep_text(char **where, char *fresh) {
    if (!fresh) return;
    free(*where);
    *where = fresh;
}

void provision(Slice p) {
    settings.provisioned = true;
    settings.born_ms = now_us() / 1000;
    touch();
    settings.idle_ms = find_number(p, F_IDLE_MS, 0);
    settings.life_ms = find_number(p, F_LIFE_MS, 0);
    settings.nproc = find_number(p, F_NPROC, 0);
    settings.nofile = find_number(p, F_NOFILE, 0);
    settings.fsize = find_number(p, F_FSIZE, 0);
    settings.data_limit = find_number(p, F_DATA_LIMIT, 0);
    settings.filter = find_number(p, F_FILTER, 1);
    settings.cpu_locked = find_number(p, F_CPU_LOCKED, 0);
    keep_text(&settings.user, find_text(p, F_USER));
    keep_text(&settings.cwd, find_text(p, F_CWD));
    remember_user();
    Cursor c = {.rest = p};
    int count = 0;
    while (next_field(&c)) count += c.tag == F_ENV;
    settings.env = calloc((size_t)count + 1, sizeof *settings.env);
    settings.env_count = 0;
    c = (Cursor){.rest = p};
    while (next_field(&c)) {
        if (c.tag != F_ENV || memchr(c.value.data, 0, c.value.size)) continue;
        char *text = calloc(1, c.value.size + 1);
        memcpy(text, c.value.data, c.value.size);
        settings.env[settings.env_count++] = text;
    }
}

/* Stops or continues all there is, in one call of the kernel; the agent and its clocks know how long it was. */
void set_pause(bool pause) {
    if (pause == settings.paused) return;
    if (pause) {
        settings.paused_at_us = now_us();
        settings.paused = true;
    } else {
        settings.paused_total_us += now_us() - settings.paused_at_us;
        settings.paused = false;
        touch();
    }
    if (getpid() == 1) {
        kill(-1, pause ? SIGSTOP : SIGCONT);
        return;
    }
    pid_t list[4096];
    int n = descendants(getpid(), list, 4096);
    for (int i = 0; i < n; i++) kill(list[i], pause ? SIGSTOP : SIGCONT);
}

/* After a restore: what two copies of one memory must not share. */
static void renew(Slice p) {
    Slice entropy;
    if (find_bytes(p, F_ENTROPY, &entropy) && entropy.size <= 256) {
        int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
        struct { int bits, size; uint8_t bytes[256]; } pool = {(int)entropy.size * 8, (int)entropy.size, {0}};
        memcpy(pool.bytes, entropy.data, entropy.size);
        if (fd >= 0) {
            if (ioctl(fd, RNDADDENTROPY, &pool)) {
                ssize_t ignored = write(fd, entropy.data, entropy.size);
                (void)ignored;
            }
            ioctl(fd, RNDRESEEDCRNG);
            close(fd);
        }
    }
    uint64_t time_us = find_number(p, F_TIME_US, 0);
    if (time_us) {
        struct timespec t = {(time_t)(time_us / 1000000u), (long)(time_us % 1000000u) * 1000};
        clock_settime(CLOCK_REALTIME, &t);
    }
    char *name = find_text(p, F_HOSTNAME);
    if (name && sethostname(name, strlen(name)) == 0) {
        FILE *f = fopen("/etc/hostname", "we");
        if (f) {
            fprintf(f, "%s\n", name);
            fclose(f);
        }
    }
    free(name);
    char *identity = find_text(p, F_TEXT);
    FILE *f = identity ? fopen("/etc/machine-id", "we") : NULL;
    if (f) {
        fprintf(f, "%s\n", identity);
        fclose(f);
    }
    free(identity);
    uint64_t idle = find_number(p, F_IDLE_MS, UINT64_MAX), life = find_number(p, F_LIFE_MS, UINT64_MAX);
    if (idle != UINT64_MAX) settings.idle_ms = idle;
    if (life != UINT64_MAX) settings.life_ms = life;
    settings.born_ms = now_us() / 1000;
    touch();
}

static void status(uint64_t request) {
    Buffer b = {0};
    field_text(&b, F_STATE, settings.paused ? "paused" : "ready");
    field_number(&b, F_RUNNING, (uint64_t)commands_running(false));
    field_number(&b, F_IDLE_FOR_MS, now_us() / 1000 - settings.active_ms);
    field_number(&b, F_PAUSED_US, settings.paused_total_us);
    field_number(&b, F_TIME_US, now_us());
    send_frame(OK, request, &b);
    buffer_free(&b);
}

void dispatch(Header *h, Slice p) {
    switch (h->type) { /* looking is not use: it leaves the idle clock alone */
    case WAIT: case ATTACH: case FETCH: case LIST: case FORGET: case PING: case PAUSE: case SYNC:
    case REKEY: case PORT_CLOSE: break;
    default: touch();
    }
    switch (h->type) {
    case START: command_start(h->request, p); break;
    case WAIT: command_wait(h->request, p); break;
    case WRITE: command_write(h->request, p); break;
    case CLOSE_STDIN: command_close_stdin(h->request, p); break;
    case KILL: command_kill(h->request, p); break;
    case RESIZE: command_resize(h->request, p); break;
    case ATTACH: command_attach(h->request, p); break;
    case FETCH: command_fetch(h->request, p); break;
    case LIST: command_list(h->request); break;
    case FORGET: command_forget(h->request, p); break;
    case FILE_READ: case FILE_WRITE: case FILE_LIST: case FILE_STAT: case FILE_MKDIR: case FILE_MOVE: case FILE_REMOVE:
    case FILE_LINK: file_request(h, p); break;
    case PORT_OPEN: case PORT_DATA: case PORT_CLOSE: port_request(h, p); break;
    case PING: status(h->request); break;
    case PAUSE: commands_settle(); set_pause(true); send_ok(h->request); break;
    case RESUME: set_pause(false); send_ok(h->request); break;
    case SYNC: {
        int root = open("/", O_RDONLY | O_CLOEXEC); /* its own file system: the machine's others are not its affair */
        if (root >= 0 && syncfs(root) == 0) send_ok(h->request);
        else send_error(h->request, errno, "the files could not be synced");
        if (root >= 0) close(root);
        break;
    }
    case REKEY: renew(p); send_ok(h->request); break;
    case SET_TTL:
        settings.idle_ms = find_number(p, F_IDLE_MS, settings.idle_ms);
        settings.life_ms = find_number(p, F_LIFE_MS, settings.life_ms);
        send_ok(h->request);
        break;
    case POWER_OFF: send_ok(h->request); end("asked");
    default: send_error(h->request, ENOSYS, "this agent does not know that request");
    }
}

static int sooner(int a, int64_t ms) {
    int wait = ms < 0 ? 0 : ms > 3600000 ? 3600000 : (int)ms;
    return a < 0 || wait < a ? wait : a;
}

/* Ends what has lasted too long; milliseconds until the next such time, or -1. */
static int lifetimes(void) {
    int64_t now = (int64_t)(now_us() / 1000);
    int due = -1;
    if (!settings.provisioned) {
        int64_t left = (int64_t)settings.born_ms + UNCLAIMED_MS - now;
        if (left <= 0) end("lifetime");
        return sooner(due, left);
    }
    if (settings.life_ms) {
        int64_t left = (int64_t)(settings.born_ms + settings.life_ms) - now;
        if (left <= 0) end("lifetime");
        due = sooner(due, left);
    }
    if (settings.idle_ms && !settings.paused) {
        if (commands_running(true)) touch();
        int64_t left = (int64_t)(settings.active_ms + settings.idle_ms) - now;
        if (left <= 0) end("idle");
        due = sooner(due, left);
    }
    return due;
}

/* Whether there may be more to reap. */
static bool reap(void) {
    int status;
    bool murdered = false;
    pid_t pid;
    int rounds = 0; /* what is continued may be stopped again before the next look, for ever; others wait to be served */
    while (rounds++ < MAX_REAPED && (pid = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0) {
        murdered |= WIFSIGNALED(status);
        if (WIFSTOPPED(status) && !settings.paused) kill(pid, SIGCONT); /* nobody inside may stop a supervisor */
    }
    if (murdered) kill_strays(); /* a supervisor ends by itself, unless its own command killed it */
    return rounds > MAX_REAPED;
}

static void handle(Watch *w, uint32_t events, int listen_fd) {
    switch (w->kind) {
    case W_LIFE: end("broken"); /* a death signal may be lost where its sender died before it was asked for */
    case W_LISTEN: connection_accept(listen_fd); break;
    case W_CONNECTION: connection_ready(w->owner, events); break;
    case W_STREAM: case W_STATUS: case W_STDIN: case W_REPORT: command_event(w, events); break;
    case W_PORT: port_event(w, events); break;
    case W_JOB: file_job_event(w, events); break;
    case W_CHILD: {
        struct signalfd_siginfo info;
        while (read(w->fd, &info, sizeof info) == sizeof info) {}
        unreaped = reap();
        break;
    }
    }
}

static int life_fd = -1;

void live_while_open(int fd) { life_fd = fd; }

int serve(int listen_fd, int in_fd, int out_fd) {
    prepare_preference();
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0); /* memory and descriptors are out of reach of its own user too */
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    prctl(PR_SET_NAME, "agent", 0, 0, 0);
    signal(SIGPIPE, SIG_IGN);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    settings.born_ms = now_us() / 1000;
    settings.filter = true;
    Watch child, listener, life;
    if (life_fd >= 0) watch_add(&life, life_fd, W_LIFE, NULL, 0, EPOLLHUP);
    watch_add(&child, signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), W_CHILD, NULL, 0, EPOLLIN);
    if (listen_fd >= 0) {
        fcntl(listen_fd, F_SETFD, FD_CLOEXEC);
        fcntl(listen_fd, F_SETFL, O_NONBLOCK);
        watch_add(&listener, listen_fd, W_LISTEN, NULL, 0, EPOLLIN);
    } else {
        fcntl(in_fd, F_SETFD, FD_CLOEXEC);
        fcntl(out_fd, F_SETFD, FD_CLOEXEC);
        connection_stream(in_fd, out_fd);
    }
    for (;;) {
        int due = commands_tick(), other = lifetimes();
        if (due < 0 || (other >= 0 && other < due)) due = other;
        ready_count = epoll_wait(epoll, ready, 64, unreaped ? 0 : due);
        if (unreaped) unreaped = reap();
        for (int i = 0; i < ready_count; i++)
            if (ready[i].data.ptr) handle(ready[i].data.ptr, ready[i].events, listen_fd);
        ready_count = 0;
        connections_reap();
        commands_pump();
        ports_pump();
    }
}
