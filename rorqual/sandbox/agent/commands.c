/* Handles: commands that run or have run, with the head and the tail of what they wrote.
 *
 * Output is capped here, at the source: of each stream the first and the last half of `max_output` are kept, the middle
 * is only counted. A command that floods never waits for its reader and never takes more memory than that.
 */
#include "agent.h"
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    MAX_HANDLES = 64, MAX_NAME = 80, MAX_WAITERS = 8, MAX_REMEMBERED = 4096, STREAMS = 3,
    RETAINED_BYTES = 16 << 20, INLINE_BYTES = 128 << 10, CHUNK = 64 << 10, LATE_US = 50000, STDIN_ROOM = 1 << 20,
    SUPERVISOR_US = 1000000, BEGIN_STEP_US = 50000, BEGIN_STEP_MOST_US = 1000000, BEGIN_US = 60000000,
    SETTLE_US = 500000,
};

typedef struct {
    Watch watch;
    bool open;
    uint8_t *head, *tail; /* the tail is a ring of `half` bytes */
    size_t head_size, head_room, tail_room;
    uint64_t total, sent;
} Stream;

typedef struct {
    bool used, beginning, done, pty, stream, forgotten, killing, timed_out, exited, said, tree_gone;
    char name[MAX_NAME];
    pid_t supervisor, pid;
    int status;
    size_t half;
    Stream streams[STREAMS]; /* stdout (or the terminal), stderr, status pipe */
    Watch status_watch, in_watch, report_watch;
    bool status_open, in_open, in_closing;
    Buffer input;
    uint64_t in_total; /* bytes of input that were taken from clients */
    uint64_t started_us, deadline_us, exited_us, kill_since_us, paused_before_us, duration_us, paused_us, order, next_kill_us;
    uint64_t next_continue_us, continue_step_us;
    uint64_t waiters[MAX_WAITERS], starters[MAX_WAITERS]; /* who asked for its end, and for its beginning */
    int waiting, starting;
} Handle;

static Handle handles[MAX_HANDLES];
static uint64_t counter;
static uint64_t remembered[MAX_REMEMBERED]; /* digests of names whose results were dropped: never run again */
static uint64_t forgotten;

static uint64_t name_digest(const char *name) {
    uint8_t out[8];
    uint64_t value;
    blake2b(out, 8, NULL, 0, (const void *[]){name}, (size_t[]){strlen(name)}, 1);
    memcpy(&value, out, 8);
    return value;
}

static Handle *find(const char *name) {
    for (int i = 0; name && i < MAX_HANDLES; i++)
        if (handles[i].used && !strcmp(handles[i].name, name)) return &handles[i];
    return NULL;
}

static Handle *named(Slice payload) {
    char *name = find_text(payload, F_HANDLE);
    Handle *h = find(name);
    free(name);
    return h;
}

static size_t kept_bytes(const Handle *h) {
    size_t sum = 0;
    for (int i = 0; i < STREAMS; i++) sum += h->streams[i].head_room + h->streams[i].tail_room;
    return sum;
}

static void erase(Handle *h) {
    for (int i = 0; i < STREAMS; i++) {
        if (h->streams[i].open) watch_remove(&h->streams[i].watch);
        free(h->streams[i].head);
        free(h->streams[i].tail);
    }
    if (h->status_open) watch_remove(&h->status_watch);
    if (h->in_open) watch_remove(&h->in_watch);
    if (h->beginning) watch_remove(&h->report_watch);
    buffer_free(&h->input);
    memset(h, 0, sizeof *h);
}

static void drop(Handle *h) {
    remembered[forgotten++ % MAX_REMEMBERED] = name_digest(h->name);
    erase(h);
}

/* Oldest finished handles go when places or retained bytes run out. */
static Handle *place(size_t wanted) {
    for (;;) {
        size_t sum = 0;
        Handle *free_one = NULL, *oldest = NULL;
        for (int i = 0; i < MAX_HANDLES; i++) {
            Handle *h = &handles[i];
            if (!h->used) {
                free_one = h;
                continue;
            }
            sum += kept_bytes(h);
            if (h->done && !h->waiting && !h->status_open && (!oldest || h->order < oldest->order)) oldest = h;
        }
        if (free_one && (sum + wanted <= RETAINED_BYTES || !oldest)) return free_one;
        if (!oldest) return NULL;
        drop(oldest);
    }
}

static void store(Handle *h, Stream *s, const uint8_t *data, size_t size) {
    size_t half = h->half;
    if (s->head_size < half) {
        size_t take = half - s->head_size < size ? half - s->head_size : size;
        if (s->head_size + take > s->head_room) {
            size_t room = s->head_room ? s->head_room : 1024;
            while (room < s->head_size + take) room *= 2;
            if (room > half) room = half;
            uint8_t *grown = realloc(s->head, room);
            if (!grown) end("out of memory");
            s->head = grown;
            s->head_room = room;
        }
        memcpy(s->head + s->head_size, data, take);
        s->head_size += take;
        s->total += take;
        data += take;
        size -= take;
    }
    if (!size || !half) {
        s->total += size;
        return;
    }
    if (!s->tail) {
        s->tail = malloc(half);
        if (!s->tail) end("out of memory");
        s->tail_room = half;
    }
    if (size > half) {
        s->total += size - half;
        data += size - half;
        size = half;
    }
    size_t at = (s->total - s->head_size) % half, first = half - at < size ? half - at : size;
    memcpy(s->tail + at, data, first);
    memcpy(s->tail, data + first, size - first);
    s->total += size;
}

static uint64_t tail_start(const Handle *h, const Stream *s) {
    uint64_t behind = s->total - s->head_size;
    return behind > h->half ? s->total - h->half : s->head_size;
}

/* Bytes from `*offset` on, moved forward over the gap if they are gone. Returns how many were added. */
static size_t load(const Handle *h, const Stream *s, uint64_t *offset, size_t limit, Buffer *out) {
    if (*offset < s->head_size) {
        size_t n = s->head_size - *offset < limit ? (size_t)(s->head_size - *offset) : limit;
        buffer_add(out, s->head + *offset, n);
        return n;
    }
    uint64_t start = tail_start(h, s);
    if (*offset < start) *offset = start;
    if (*offset >= s->total || !h->half) return 0;
    size_t n = s->total - *offset < limit ? (size_t)(s->total - *offset) : limit;
    size_t at = (*offset - s->head_size) % h->half, first = h->half - at < n ? h->half - at : n;
    buffer_add(out, s->tail + at, first);
    buffer_add(out, s->tail, n - first);
    return n;
}

static void describe(Handle *h, Buffer *b, bool with_output) {
    static const uint8_t totals[] = {F_OUT_TOTAL, F_ERR_TOTAL}, lost[] = {F_OUT_LOST, F_ERR_LOST},
                         data[] = {F_OUT_DATA, F_ERR_DATA};
    field_text(b, F_HANDLE, h->name);
    field_number(b, F_PID, (uint64_t)h->pid);
    field_number(b, F_DONE, h->done);
    field_number(b, F_STATUS, (uint64_t)(uint32_t)h->status);
    field_number(b, F_TIMED_OUT, h->timed_out);
    field_number(b, F_DURATION_US, h->done ? h->duration_us : running_us() - h->started_us);
    field_number(b, F_IN_TOTAL, h->in_total);
    field_number(b, F_IN_CLOSED, !h->in_open || h->in_closing);
    field_number(b, F_PAUSED_US, h->done ? h->paused_us : settings.paused_total_us - h->paused_before_us);
    for (int i = 0; i < 2; i++) {
        Stream *s = &h->streams[i];
        field_number(b, totals[i], s->total);
        field_number(b, lost[i], tail_start(h, s) - s->head_size);
        uint64_t behind = s->total - tail_start(h, s);
        if (!with_output || s->head_size + behind > INLINE_BYTES) continue;
        Buffer all = {0};
        uint64_t offset = 0;
        size_t n;
        while ((n = load(h, s, &offset, SIZE_MAX, &all))) offset += n;
        field_bytes(b, data[i], all.data, all.size);
        buffer_free(&all);
    }
}

static void send_exited(Handle *h, uint64_t request) {
    Buffer b = {0};
    describe(h, &b, request != 0);
    send_frame(EXITED, request, &b);
    buffer_free(&b);
}

static void send_state(Handle *h, uint64_t request) {
    Buffer b = {0};
    describe(h, &b, false);
    send_frame(OK, request, &b);
    buffer_free(&b);
}

static void begun(Handle *h) {
    watch_remove(&h->report_watch);
    h->beginning = false;
    for (int i = 0; i < h->starting; i++) send_state(h, h->starters[i]);
    h->starting = 0;
}

/* The name is free again, for nothing ran. */
static void not_begun(Handle *h, int error, const char *why) {
    for (int i = 0; i < h->starting; i++) send_error(h->starters[i], error, why);
    for (int i = 0; i < h->waiting; i++) send_error(h->waiters[i], error, why);
    erase(h);
}

/* Whether the handle still stands: one whose program could not begin does not. */
static bool look_if_begun(Handle *h) {
    char why[200];
    int error = spawn_begun(h->report_watch.fd, why, sizeof why);
    if (!error) begun(h);
    else if (error > 0) not_begun(h, error, why);
    return error <= 0;
}

static void finish(Handle *h) {
    if (h->beginning) begun(h);
    h->done = true;
    h->duration_us = h->exited_us - h->started_us;
    h->paused_us = settings.paused_total_us - h->paused_before_us;
    if (h->in_open) {
        watch_remove(&h->in_watch);
        h->in_open = false;
    }
    for (int i = 0; i < h->waiting; i++) send_exited(h, h->waiters[i]);
    h->waiting = 0;
    touch();
    commands_pump();
}

static void close_stream(Stream *s) {
    if (s->open) watch_remove(&s->watch);
    s->open = false;
}

static bool streams_open(const Handle *h) { return h->streams[0].open || h->streams[1].open; }

static void read_stream(Handle *h, Stream *s, int rounds) {
    static uint8_t chunk[CHUNK];
    while (s->open && rounds-- > 0) {
        ssize_t n = read(s->watch.fd, chunk, sizeof chunk);
        if (n > 0) {
            store(h, s, chunk, (size_t)n);
            if ((size_t)n < sizeof chunk && !h->pty) return;
            continue;
        }
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        close_stream(s); /* a terminal whose last process is gone answers EIO */
        return;
    }
}

static void exited(Handle *h, int status) {
    if (h->exited) return;
    h->exited = true;
    h->status = status;
    h->exited_us = running_us();
    for (int i = 0; i < STREAMS; i++) read_stream(h, &h->streams[i], 64); /* what it wrote is in the pipes already */
    if (h->killing ? h->tree_gone : !streams_open(h)) finish(h);
}

static void feed_stdin(Handle *h) {
    while (h->in_open && h->input.size) {
        ssize_t n = write(h->in_watch.fd, h->input.data, h->input.size < CHUNK ? h->input.size : CHUNK);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0) { /* nobody reads it */
            buffer_free(&h->input);
            watch_remove(&h->in_watch);
            h->in_open = false;
            return;
        }
        buffer_drop(&h->input, (size_t)n);
    }
    if (!h->in_open) return;
    if (!h->input.size && h->in_closing) {
        watch_remove(&h->in_watch);
        h->in_open = false;
        return;
    }
    watch_change(&h->in_watch, h->input.size ? EPOLLOUT : 0);
}

void command_event(Watch *w, uint32_t events) {
    Handle *h = w->owner;
    /* before anything else: a child that could not begin says so, and then ends like any other */
    if (h->beginning && !look_if_begun(h)) return;
    if (w->kind == W_STDIN && h->in_open) {
        feed_stdin(h);
        if (h->in_open && events & (EPOLLERR | EPOLLHUP)) { /* nobody can read it any more */
            buffer_free(&h->input);
            watch_remove(&h->in_watch);
            h->in_open = false;
        }
    } else if (w->kind == W_STREAM) {
        read_stream(h, &h->streams[w->which], 4);
        if (h->exited && !h->done && !h->killing && !streams_open(h)) finish(h);
        else commands_pump();
    } else if (w->kind == W_STATUS) {
        int status;
        ssize_t n = read(w->fd, &status, sizeof status);
        if (n == sizeof status) {
            exited(h, status);
        } else if (n == 0) { /* the supervisor is gone: by an attack from inside if the command had not ended */
            watch_remove(&h->status_watch);
            h->status_open = false;
            h->tree_gone = true;
            if (!h->exited) exited(h, SIGKILL);
            if (!h->done && h->killing) finish(h);
            if (h->forgotten && h->done) drop(h);
        }
    }
}

void commands_pump(void) {
    for (int i = 0; i < MAX_HANDLES && client; i++) {
        Handle *h = &handles[i];
        if (!h->used || !h->stream || h->said) continue;
        bool behind = false;
        for (int k = 0; k < STREAMS; k++) {
            Stream *s = &h->streams[k];
            while (s->sent < s->total && client_may_stream()) {
                Buffer data = {0}, b = {0};
                size_t n = load(h, s, &s->sent, CHUNK, &data);
                field_text(&b, F_HANDLE, h->name);
                field_number(&b, F_STREAM, (uint64_t)k + 1);
                field_number(&b, F_OFFSET, s->sent);
                field_bytes(&b, F_DATA, data.data, data.size);
                send_frame(OUTPUT, 0, &b);
                buffer_free(&data);
                buffer_free(&b);
                s->sent += n;
                if (!n) break;
            }
            behind |= s->sent < s->total;
        }
        if (h->done && !behind && client) {
            h->said = true;
            send_exited(h, 0);
        }
    }
}

static void begin_kill(Handle *h) {
    if (h->done) {
        if (h->status_open) signal_all(h->supervisor, SIGKILL); /* what it left in the background */
        return;
    }
    if (!h->killing) h->kill_since_us = now_us();
    h->killing = true;
    h->next_kill_us = 0;
}

/* One round of ending a tree: stop all so that nothing can fork away, then kill all; again until nobody is left. */
static void kill_round(Handle *h) {
    if (!h->status_open) {
        h->tree_gone = true;
    } else {
        signal_all(h->supervisor, SIGKILL);
        pid_t one[1];
        if (!descendants(h->supervisor, one, 1)) h->tree_gone = true;
        /* a supervisor that says nothing although its tree is gone is kept from running by something inside */
        if (h->tree_gone && !h->exited && now_us() - h->kill_since_us > SUPERVISOR_US) kill(h->supervisor, SIGKILL);
    }
    h->next_kill_us = now_us() + 3000;
    if (h->tree_gone && h->exited && !h->done) {
        for (int i = 0; i < STREAMS; i++) read_stream(h, &h->streams[i], 64);
        finish(h);
    }
}

/* One look at a program that has not begun: its processes are continued again and again, for what runs inside may stop
 * them, and given up after a while; ever more rarely, for it may also be a slow machine, and looking for them costs. The
 * agent serves all others meanwhile. Whether the handle still stands. */
static bool help_begin(Handle *h) {
    if (running_us() - h->started_us >= BEGIN_US) {
        spawn_kill(h->supervisor);
        not_begun(h, ETIMEDOUT, "beginning failed: something inside stops it");
        return false;
    }
    if (now_us() >= h->next_continue_us) {
        spawn_continue(h->supervisor);
        h->continue_step_us = 2 * h->continue_step_us < BEGIN_STEP_MOST_US ? 2 * h->continue_step_us : BEGIN_STEP_MOST_US;
        h->next_continue_us = now_us() + h->continue_step_us;
    }
    return true;
}

void commands_settle(void) {
    uint64_t end = now_us() + SETTLE_US;
    for (int i = 0; i < MAX_HANDLES; i++) {
        Handle *h = &handles[i];
        while (h->beginning && !h->killing && now_us() < end) {
            struct pollfd p = {h->report_watch.fd, POLLIN, 0};
            int ready = poll(&p, 1, BEGIN_STEP_US / 1000);
            if (!(ready > 0 ? look_if_begun(h) : help_begin(h))) break;
        }
    }
}

static int sooner(int a, int64_t us) {
    int ms = us <= 0 ? 0 : (int)((us + 999) / 1000 < 3600000 ? (us + 999) / 1000 : 3600000);
    return a < 0 || ms < a ? ms : a;
}

int commands_tick(void) {
    int due = -1;
    if (settings.paused) return due;
    for (int i = 0; i < MAX_HANDLES; i++) {
        Handle *h = &handles[i];
        if (!h->used || h->done) continue;
        if (h->beginning && !h->killing) {
            if (!help_begin(h)) continue;
            due = sooner(due, (int64_t)(h->next_continue_us - now_us()));
        }
        if (h->deadline_us && !h->killing && !h->exited && running_us() >= h->deadline_us) {
            h->timed_out = true;
            begin_kill(h);
        }
        if (h->killing) {
            if (now_us() >= h->next_kill_us) kill_round(h);
            if (!h->done) due = sooner(due, (int64_t)(h->next_kill_us - now_us()));
        } else if (h->exited) {
            if (running_us() - h->exited_us >= LATE_US) finish(h); /* a background process keeps the pipes open */
            else due = sooner(due, (int64_t)(h->exited_us + LATE_US - running_us()));
        } else if (h->deadline_us) {
            due = sooner(due, (int64_t)(h->deadline_us - running_us()));
        }
    }
    return due;
}

int commands_running(bool bounded_only) {
    int count = 0;
    for (int i = 0; i < MAX_HANDLES; i++)
        count += handles[i].used && !handles[i].done && (!bounded_only || handles[i].deadline_us);
    return count;
}

bool command_owns(pid_t supervisor) {
    for (int i = 0; i < MAX_HANDLES; i++)
        if (handles[i].used && handles[i].status_open && handles[i].supervisor == supervisor) return true;
    return false;
}

void commands_detach(void) {
    for (int i = 0; i < MAX_HANDLES; i++) {
        handles[i].waiting = handles[i].starting = 0;
        handles[i].stream = handles[i].said = false;
    }
}

static char **texts(Slice payload, uint8_t tag, char **before, int before_count, int *count) {
    int n = before_count;
    Cursor c = {.rest = payload};
    while (next_field(&c)) n += c.tag == tag;
    char **list = calloc((size_t)n + 1, sizeof *list);
    if (!list) end("out of memory");
    int k = 0;
    for (; k < before_count; k++) list[k] = strdup(before[k]);
    c = (Cursor){.rest = payload};
    while (next_field(&c)) {
        if (c.tag != tag || memchr(c.value.data, 0, c.value.size)) continue;
        char *text = malloc(c.value.size + 1);
        if (!text) end("out of memory");
        memcpy(text, c.value.data, c.value.size);
        text[c.value.size] = 0;
        size_t name = strcspn(text, "=");
        for (int i = 0; tag == F_ENV && i < k; i++) /* a later value replaces an earlier one */
            if (!strncmp(list[i], text, name + 1)) {
                free(list[i]);
                memmove(list + i, list + i + 1, (size_t)(k - i - 1) * sizeof *list);
                k--;
                break;
            }
        list[k++] = text;
    }
    list[k] = NULL;
    *count = k;
    return list;
}

static void free_texts(char **list) {
    for (int i = 0; list[i]; i++) free(list[i]);
    free(list);
}

static void wait_for(Handle *h, uint64_t request) {
    if (h->done) send_exited(h, request);
    else if (h->waiting < MAX_WAITERS) h->waiters[h->waiting++] = request;
    else send_error(request, EAGAIN, "too many callers wait for this command");
}

/* Answers once the program has begun, with what there is to say of it then. */
static void answer_start(Handle *h, uint64_t request, bool wait) {
    if (wait) wait_for(h, request);
    else if (!h->beginning) send_state(h, request);
    else if (h->starting < MAX_WAITERS) h->starters[h->starting++] = request;
    else send_error(request, EAGAIN, "too many callers wait for this command");
}

static void watch_streams(Handle *h, const Launched *l) {
    int fds[STREAMS] = {l->out, l->err, l->status};
    for (int i = 0; i < STREAMS; i++) {
        if (fds[i] < 0) continue;
        h->streams[i].open = true;
        watch_add(&h->streams[i].watch, fds[i], W_STREAM, h, i, EPOLLIN);
    }
    h->status_open = h->beginning = true;
    watch_add(&h->report_watch, l->report, W_REPORT, h, 0, EPOLLIN);
    watch_add(&h->status_watch, l->control, W_STATUS, h, 0, EPOLLIN);
    if (l->in >= 0) {
        h->in_open = true;
        watch_add(&h->in_watch, l->in, W_STDIN, h, 0, 0);
    }
}

void command_start(uint64_t request, Slice payload) {
    uint64_t flags = find_number(payload, F_FLAGS, 0);
    char *name = find_text(payload, F_HANDLE);
    if (!name || strlen(name) >= MAX_NAME || !*name) {
        send_error(request, EINVAL, "a command needs a name of 1 to 79 bytes");
        free(name);
        return;
    }
    Handle *h = find(name);
    if (h) { /* the same call again: join it */
        free(name);
        answer_start(h, request, flags & FLAG_WAIT);
        return;
    }
    uint64_t digest = name_digest(name);
    for (int i = 0; i < MAX_REMEMBERED; i++)
        if (forgotten && remembered[i] == digest) {
            send_error(request, ESTALE, "this command ran and its result was dropped");
            free(name);
            return;
        }
    uint64_t max_output = find_number(payload, F_MAX_OUTPUT, 1 << 20);
    if (max_output > RETAINED_BYTES) max_output = RETAINED_BYTES;
    h = settings.paused ? NULL : place(0);
    if (!h) {
        send_error(request, EAGAIN, settings.paused ? "the sandbox is paused" : "64 commands run already");
        free(name);
        return;
    }
    int argc, envc;
    Launch launch = {
        .argv = texts(payload, F_ARG, NULL, 0, &argc),
        .env = texts(payload, F_ENV, settings.env, settings.env_count, &envc),
        .cwd = find_text(payload, F_CWD), .user = find_text(payload, F_USER),
        .pty = flags & FLAG_PTY, .with_stdin = flags & FLAG_STDIN, .status_pipe = flags & FLAG_STATUS_PIPE,
        .cols = (int)find_number(payload, F_COLS, 80), .rows = (int)find_number(payload, F_ROWS, 24)};
    Launched launched;
    char why[200] = "no program was named";
    int error = argc ? spawn(&launch, &launched, why, sizeof why) : EINVAL;
    free_texts(launch.argv);
    free_texts(launch.env);
    free(launch.cwd);
    free(launch.user);
    if (error) {
        send_error(request, error, why);
        free(name);
        return;
    }
    memset(h, 0, sizeof *h);
    h->used = true;
    strcpy(h->name, name);
    free(name);
    h->half = max_output / 2;
    h->pty = launch.pty;
    h->supervisor = h->pid = launched.supervisor;
    h->started_us = running_us(); /* its time runs from here, lest what stops it before it begins lengthens it */
    h->continue_step_us = BEGIN_STEP_US;
    h->next_continue_us = now_us() + BEGIN_STEP_US;
    h->paused_before_us = settings.paused_total_us;
    h->order = ++counter;
    h->stream = flags & FLAG_STREAM;
    uint64_t timeout = find_number(payload, F_TIMEOUT_MS, 0);
    if (timeout) h->deadline_us = h->started_us + timeout * 1000;
    watch_streams(h, &launched);
    Slice input;
    if (find_bytes(payload, F_DATA, &input)) {
        buffer_add(&h->input, input.data, input.size);
        h->in_total = input.size;
        h->in_closing = true;
        feed_stdin(h);
    }
    answer_start(h, request, flags & FLAG_WAIT);
}

static Handle *wanted(uint64_t request, Slice payload) {
    Handle *h = named(payload);
    if (!h) send_error(request, ESRCH, "no such command, or its result was dropped");
    return h;
}

void command_wait(uint64_t request, Slice payload) {
    Handle *h = wanted(request, payload);
    if (h) wait_for(h, request);
}

/* Takes the whole of it or nothing, and says how much it has: so a client whose connection broke, and one that comes in
 * a dead one's place, know where to go on. */
void command_write(uint64_t request, Slice payload) {
    Handle *h = wanted(request, payload);
    Slice data;
    if (!h) return;
    if (!h->in_open || h->in_closing) {
        send_error(request, EPIPE, "its standard input is closed");
    } else if (!find_bytes(payload, F_DATA, &data) || h->input.size + data.size > STDIN_ROOM) {
        send_error(request, EAGAIN, "it has not read what was sent before");
    } else {
        h->in_total += data.size;
        terminal_type(h->in_watch.fd, &h->input, data, h->pty && settings.keys_stay);
        feed_stdin(h);
        Buffer b = {0};
        field_number(&b, F_IN_TOTAL, h->in_total);
        send_frame(OK, request, &b);
        buffer_free(&b);
    }
}

void command_close_stdin(uint64_t request, Slice payload) {
    Handle *h = wanted(request, payload);
    if (!h) return;
    if (h->in_open && h->pty) { /* a terminal has no end of file, only the key for it */
        buffer_add(&h->input, "\x04", 1);
    } else {
        h->in_closing = true;
    }
    feed_stdin(h);
    send_ok(request);
}

void command_kill(uint64_t request, Slice payload) {
    Handle *h = wanted(request, payload);
    if (!h) return;
    int number = (int)find_number(payload, F_SIGNAL, SIGKILL);
    if (number == SIGKILL) begin_kill(h);
    else if (h->status_open) signal_all(h->supervisor, number);
    send_ok(request);
}

void command_resize(uint64_t request, Slice payload) {
    Handle *h = wanted(request, payload);
    if (!h) return;
    struct winsize size = {.ws_row = (unsigned short)find_number(payload, F_ROWS, 24),
                           .ws_col = (unsigned short)find_number(payload, F_COLS, 80)};
    if (h->pty && h->streams[0].open) ioctl(h->streams[0].watch.fd, TIOCSWINSZ, &size);
    send_ok(request);
}

void command_attach(uint64_t request, Slice payload) {
    Handle *h = wanted(request, payload);
    if (!h) return;
    h->streams[0].sent = find_number(payload, F_OFFSET, 0);
    h->streams[1].sent = find_number(payload, F_INDEX, 0);
    for (int i = 0; i < 2; i++)
        if (h->streams[i].sent > h->streams[i].total) h->streams[i].sent = h->streams[i].total;
    h->streams[2].sent = 0;
    h->stream = true;
    h->said = false;
    send_state(h, request);
    commands_pump();
}

void command_fetch(uint64_t request, Slice payload) {
    Handle *h = wanted(request, payload);
    uint64_t which = find_number(payload, F_STREAM, 1), offset = find_number(payload, F_OFFSET, 0);
    if (!h) return;
    if (which < 1 || which > STREAMS) {
        send_error(request, EINVAL, "no such stream");
        return;
    }
    Buffer data = {0}, b = {0};
    load(h, &h->streams[which - 1], &offset, MAX_PAYLOAD / 2, &data);
    field_number(&b, F_OFFSET, offset);
    field_bytes(&b, F_DATA, data.data, data.size);
    send_frame(OK, request, &b);
    buffer_free(&data);
    buffer_free(&b);
}

void command_list(uint64_t request) {
    Buffer b = {0};
    for (int i = 0; i < MAX_HANDLES; i++) {
        if (!handles[i].used) continue;
        Buffer one = {0};
        describe(&handles[i], &one, false);
        field_bytes(&b, F_ENTRY, one.data, one.size);
        buffer_free(&one);
    }
    send_frame(OK, request, &b);
    buffer_free(&b);
}

void command_forget(uint64_t request, Slice payload) {
    Handle *h = named(payload);
    if (h && h->done && !h->waiting) {
        h->forgotten = true; /* with processes in the background it stays until they end */
        if (!h->status_open) drop(h);
    }
    send_ok(request);
}
