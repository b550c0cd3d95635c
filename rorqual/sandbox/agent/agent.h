/* The guest agent: one small static program that runs commands, files, terminals and ports of a sandbox.
 *
 * It is pid 1 of the sandbox, so nothing inside can signal it, and it never runs a program of the sandbox for its own
 * needs. One thread, one epoll loop, no allocation without a bound. The client's side is rorqual/sandbox/wire.py.
 *
 * Files: blake2b.c message codes; wire.c frames and fields; connection.c clients, hello and sending; commands.c
 * handles; spawn.c processes; confine.c limits and the system call filter; files.c; ports.c; serve.c the loop;
 * keep.c the keeper on the host; agent.c chooses the mode.
 */
#ifndef RORQUAL_AGENT_H
#define RORQUAL_AGENT_H

#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* ---- blake2b.c ---- */
void blake2b(uint8_t *out, size_t out_bytes, const void *key, size_t key_bytes, const void *parts[], const size_t sizes[],
             int count);

/* ---- wire.c: a frame is a header, a payload of fields, and a message code ---- */
enum {
    MAGIC_BYTES = 16,
    HEADER_BYTES = 32,
    MAC_BYTES = 16,
    MAX_PAYLOAD = 1 << 20,
    KEY_BYTES = 32,
};
extern const uint8_t MAGIC[MAGIC_BYTES];

typedef struct { /* 32 bytes on the wire, little endian */
    uint8_t magic[MAGIC_BYTES];
    uint8_t type;
    uint8_t reserved[3];
    uint32_t length;
    uint64_t request;
} Header;

enum Type { /* client to agent */
    HELLO = 1, START = 2, WAIT = 3, WRITE = 4, CLOSE_STDIN = 5, KILL = 6, RESIZE = 7, ATTACH = 8, FETCH = 9, LIST = 10,
    FORGET = 11, FILE_READ = 20, FILE_WRITE = 21, FILE_LIST = 22, FILE_STAT = 23, FILE_MKDIR = 24, FILE_MOVE = 25,
    FILE_REMOVE = 26, FILE_LINK = 27, PORT_OPEN = 30, PORT_DATA = 31, PORT_CLOSE = 32, PING = 40, PAUSE = 41,
    RESUME = 42, SET_TTL = 43, POWER_OFF = 44, REKEY = 45, SYNC = 46,
    /* agent to client */
    WELCOME = 64, OK = 65, ERROR = 66, OUTPUT = 67, EXITED = 68, PORT_BYTES = 69, PORT_ENDED = 70, STALE = 71,
};

enum Field {
    F_NONCE = 1, F_EPOCH = 2, F_SECRET = 3, F_HANDLE = 4, F_ARG = 5, F_ENV = 6, F_CWD = 7, F_USER = 8, F_TIMEOUT_MS = 9,
    F_MAX_OUTPUT = 10, F_FLAGS = 11, F_STREAM = 12, F_OFFSET = 13, F_DATA = 14, F_SIGNAL = 15, F_COLS = 16, F_ROWS = 17,
    F_STATUS = 18, F_TIMED_OUT = 19, F_DURATION_US = 20, F_PAUSED_US = 21, F_OUT_TOTAL = 22, F_ERR_TOTAL = 23,
    F_OUT_LOST = 24, F_ERR_LOST = 25, F_OUT_DATA = 26, F_ERR_DATA = 27, F_PID = 28, F_ERRNO = 29, F_TEXT = 30,
    F_PATH = 31, F_MODE = 32, F_LIMIT = 33, F_SIZE = 34, F_MTIME_US = 35, F_TARGET = 36, F_KIND = 37, F_TOKEN = 38,
    F_DEPTH = 39, F_PORT = 40, F_ID = 41, F_IDLE_MS = 42, F_LIFE_MS = 43, F_RUNNING = 44, F_DONE = 45, F_OOM = 46,
    F_NPROC = 47, F_NOFILE = 48, F_FSIZE = 49, F_DATA_LIMIT = 50, F_FILTER = 51, F_STATE = 52, F_TRUNCATED = 53,
    F_HOSTNAME = 54, F_ENTROPY = 55, F_CPU_LOCKED = 56, F_ENTRY = 57, F_TIME_US = 58, F_IDLE_FOR_MS = 59, F_INDEX = 60,
    F_IN_TOTAL = 61, F_IN_CLOSED = 62,
};

enum StartFlags { FLAG_PTY = 1, FLAG_STDIN = 2, FLAG_STREAM = 4, FLAG_WAIT = 8, FLAG_STATUS_PIPE = 16 };

typedef struct { uint8_t *data; size_t size, room; } Buffer;
void buffer_add(Buffer *b, const void *data, size_t size);
void buffer_drop(Buffer *b, size_t size);
void buffer_free(Buffer *b);
void field_bytes(Buffer *b, uint8_t tag, const void *data, size_t size);
void field_text(Buffer *b, uint8_t tag, const char *text);
void field_number(Buffer *b, uint8_t tag, uint64_t value);

typedef struct { const uint8_t *data; size_t size; } Slice;
typedef struct { Slice rest; uint8_t tag; Slice value; } Cursor;
bool next_field(Cursor *c);
bool find_bytes(Slice payload, uint8_t tag, Slice *value);
uint64_t find_number(Slice payload, uint8_t tag, uint64_t otherwise);
char *find_text(Slice payload, uint8_t tag); /* malloced, NULL when absent or with a zero byte inside */

/* ---- connection.c ---- */
typedef struct Connection Connection;
extern Connection *client; /* the one that said a right hello last, or NULL */
bool client_may_stream(void);
void send_frame(uint8_t type, uint64_t request, const Buffer *payload);
void send_ok(uint64_t request);
void send_error(uint64_t request, int error, const char *text);
void connection_accept(int listen_fd);
void connection_stream(int in_fd, int out_fd);
void connection_ready(Connection *c, uint32_t events);
void connections_reap(void);
void forget_keys(void); /* in a child, before it runs anything */

/* ---- serve.c ---- */
typedef struct {
    bool provisioned, paused;
    uint64_t idle_ms, life_ms, born_ms, active_ms, paused_at_us, paused_total_us;
    uint64_t nproc, nofile, fsize, data_limit;
    bool filter, cpu_locked, keys_stay; /* keys_stay: see terminal.c */
    char *user, *cwd;
    char **env;
    int env_count;
} Settings;
extern Settings settings;
enum WatchKind { W_LISTEN, W_CONNECTION, W_STREAM, W_STATUS, W_STDIN, W_REPORT, W_PORT, W_CHILD, W_JOB, W_LIFE };
typedef struct { enum WatchKind kind; void *owner; int fd, which; uint32_t events; } Watch;
void watch_add(Watch *w, int fd, enum WatchKind kind, void *owner, int which, uint32_t events);
void watch_change(Watch *w, uint32_t events);
void watch_remove(Watch *w); /* also closes the descriptor */
uint64_t now_us(void);         /* since boot, suspended time included */
uint64_t running_us(void);     /* stands still while the sandbox is paused */
void touch(void);              /* what counts as use, for the idle clock */
void dispatch(Header *h, Slice payload);
void provision(Slice payload);
int serve(int listen_fd, int in_fd, int out_fd);
void live_while_open(int fd); /* before serve: a pipe whose other end is the keeper's alone */
void set_pause(bool pause);
void agent_is_machine(void);
void end(const char *reason) __attribute__((noreturn));

/* ---- terminal.c ---- */
void terminal_type(int master, Buffer *input, Slice typed, bool corrected);

/* ---- commands.c and spawn.c ---- */
void command_start(uint64_t request, Slice payload);
void command_wait(uint64_t request, Slice payload);
void command_write(uint64_t request, Slice payload);
void command_close_stdin(uint64_t request, Slice payload);
void command_kill(uint64_t request, Slice payload);
void command_resize(uint64_t request, Slice payload);
void command_attach(uint64_t request, Slice payload);
void command_fetch(uint64_t request, Slice payload);
void command_list(uint64_t request);
void command_forget(uint64_t request, Slice payload);
void command_event(Watch *w, uint32_t events);
void commands_pump(void);
void commands_detach(void); /* the client is gone: nobody waits any more */
void commands_settle(void); /* before all is stopped: what is about to begin does so */
int commands_tick(void);    /* milliseconds until something is due, or -1 */
int commands_running(bool bounded_only);
bool command_owns(pid_t supervisor);

typedef struct {
    char **argv, **env;
    char *cwd, *user;
    bool pty, with_stdin, status_pipe;
    int cols, rows;
} Launch;
typedef struct { pid_t supervisor; int in, out, err, status, control, report; } Launched;
int spawn(const Launch *launch, Launched *result, char *why, size_t why_size); /* 0 or an errno; it begins later */
int spawn_begun(int report, char *why, size_t why_size); /* -1: not yet; 0: it begins; or why not, an errno */
void spawn_continue(pid_t supervisor);
void spawn_kill(pid_t supervisor);
int descendants(pid_t root, pid_t *found, int room); /* without the root */
void signal_all(pid_t root, int number);
void kill_strays(void);
void prepare_preference(void); /* while the process may still open its own files in /proc */

/* ---- confine.c ---- */
int confine_limits(void);
int confine_powers(void); /* leaves root inside what installing packages takes */
int confine_filter(void);
int become_user(const char *name, char *home, size_t home_size); /* 0 or an errno */
void remember_user(void); /* the sandbox's own, before anything inside could change the list of users */
int look_up_user(const char *name, uid_t *uid, gid_t *gid, char *home, size_t home_size);

/* ---- files.c, ports.c ---- */
void file_request(Header *h, Slice payload);
bool file_job_owns(pid_t pid);
void file_job_event(Watch *w, uint32_t events);
void file_jobs_detach(void); /* the client is gone: what still runs is finished and answered to nobody */
void port_request(Header *h, Slice payload);
void port_event(Watch *w, uint32_t events);
void ports_pump(void);
void ports_close_all(void);

/* ---- keep.c: the host's side ---- */
int keep(int argc, char **argv);

/* ---- init.c: pid 1 of a virtual machine ---- */
int guest_init(int argc, char **argv);

#endif
