/* Processes: agent -> supervisor -> command.
 *
 * The supervisor is the subreaper of the command, so whatever forks twice, calls setsid or loses its parent stays below
 * it, and "all descendants of the supervisor" is the whole tree. It ends when the last of them is gone. A command may
 * kill its own supervisor; then its processes fall to the agent, which kills every child it did not start itself.
 */
#include "agent.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { PREFERRED = 300, MAX_PROCESSES = 32768 };

typedef struct { int error; char what[60]; } Failure;

static void close_range_of(unsigned first, unsigned last) {
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0) return;
    for (unsigned fd = first; fd <= last && fd < 65536; fd++) close((int)fd);
}

/* Closes every descriptor but these (-1 stands for none), whatever their numbers are. */
static void keep_only(const int *kept, int count) {
    int from = 0;
    for (;;) {
        int next = -1;
        for (int i = 0; i < count; i++)
            if (kept[i] >= from && (next < 0 || kept[i] < next)) next = kept[i];
        if (next < 0) break;
        if (next > from) close_range_of((unsigned)from, (unsigned)next - 1);
        from = next + 1;
    }
    close_range_of((unsigned)from, 0x7fffffffu);
}

static __attribute__((noreturn)) void fail(int report, const char *what) {
    Failure f = {.error = errno ? errno : EINVAL};
    snprintf(f.what, sizeof f.what, "%s", what);
    ssize_t ignored = write(report, &f, sizeof f);
    (void)ignored;
    _exit(127);
}

static void search(char **argv, char **env) {
    const char *path = "/usr/local/bin:/usr/bin:/bin";
    for (int i = 0; env[i]; i++)
        if (!strncmp(env[i], "PATH=", 5)) path = env[i] + 5;
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, env);
        return;
    }
    int kept = ENOENT;
    char full[4096];
    for (const char *p = path; p && *p;) {
        size_t n = strcspn(p, ":");
        if (n && n + strlen(argv[0]) + 2 < sizeof full) {
            snprintf(full, sizeof full, "%.*s/%s", (int)n, p, argv[0]);
            execve(full, argv, env);
            if (errno != ENOENT && errno != ENOTDIR) kept = errno;
        }
        p = p[n] ? p + n + 1 : NULL;
    }
    errno = kept;
}

/* In the new process; descriptors 0, 1, 2 (and 3) are already the command's. */
static __attribute__((noreturn)) void become_command(const Launch *l, int report) {
    char home[256] = "";
    const char *user = l->user ? l->user : settings.user;
    if (settings.user && (errno = become_user(user, home, sizeof home))) fail(report, "changing to its user");
    const char *cwd = l->cwd ? l->cwd : settings.cwd ? settings.cwd : *home ? home : "/";
    if (chdir(cwd)) fail(report, "changing to its working directory");
    if ((errno = confine_limits())) fail(report, "setting its limits");
    if ((errno = confine_powers())) fail(report, "giving up powers");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) fail(report, "giving up privileges");
    for (int n = 1; n < NSIG; n++) signal(n, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (settings.filter && (errno = confine_filter())) fail(report, "installing the system call filter");
    search(l->argv, l->env);
    fail(report, "starting the program");
}

static __attribute__((noreturn)) void supervise(const Launch *l, int fds[4], int control, int report) {
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    prctl(PR_SET_NAME, "supervisor", 0, 0, 0);
    forget_keys();
    setsid();
    int kept[6] = {fds[0], fds[1], fds[2], fds[3], control, report};
    keep_only(kept, 6);
    for (int i = 0; i < 6; i++) /* above the command's own numbers, so that dup2 below overwrites none of them */
        if (kept[i] >= 0) kept[i] = fcntl(kept[i], F_DUPFD_CLOEXEC, 20);
    keep_only(kept, 6);
    control = kept[4];
    report = kept[5];
    pid_t pid = fork();
    if (pid < 0) fail(report, "forking");
    if (pid == 0) {
        setsid();
        if (l->pty) ioctl(kept[0], TIOCSCTTY, 0);
        int own[5] = {-1, -1, -1, -1, report};
        for (int i = 0; i < 4; i++)
            if (kept[i] >= 0) own[i] = dup2(kept[i], i);
        keep_only(own, 5);
        become_command(l, report);
    }
    keep_only(&control, 1);
    for (int n = 1; n < NSIG; n++) signal(n, SIG_IGN);
    signal(SIGCHLD, SIG_DFL);
    for (;;) {
        int status;
        pid_t ended = waitpid(-1, &status, 0);
        if (ended < 0 && errno == EINTR) continue;
        if (ended < 0) _exit(0); /* nobody is left */
        if (ended == pid) {
            ssize_t ignored = write(control, &status, sizeof status);
            (void)ignored;
        }
    }
}

static int open_terminal(const Launch *l, int *master, int *slave) {
    *master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (*master < 0) return errno;
    int unlock = 0;
    struct winsize size = {.ws_row = (unsigned short)l->rows, .ws_col = (unsigned short)l->cols};
    if (ioctl(*master, TIOCSPTLCK, &unlock)) return errno;
    *slave = ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*slave < 0) {
        unsigned number;
        char name[40];
        if (ioctl(*master, TIOCGPTN, &number)) return errno;
        snprintf(name, sizeof name, "/dev/pts/%u", number);
        *slave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    }
    if (*slave < 0) return errno;
    ioctl(*slave, TIOCSWINSZ, &size);
    return 0;
}

static int pipes(const Launch *l, Launched *r, int theirs[4]) {
    int p[2];
    if (l->pty) {
        int slave = -1, error = open_terminal(l, &r->out, &slave);
        if (error) return error;
        theirs[0] = slave;
        theirs[1] = fcntl(slave, F_DUPFD_CLOEXEC, 3);
        theirs[2] = fcntl(slave, F_DUPFD_CLOEXEC, 3);
        r->in = fcntl(r->out, F_DUPFD_CLOEXEC, 3);
    } else {
        if (l->with_stdin) {
            if (pipe2(p, O_CLOEXEC)) return errno;
            theirs[0] = p[0];
            r->in = p[1];
            fcntl(r->in, F_SETFL, O_NONBLOCK);
        } else if ((theirs[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0) {
            return errno;
        }
        if (pipe2(p, O_CLOEXEC)) return errno;
        r->out = p[0];
        theirs[1] = p[1];
        if (pipe2(p, O_CLOEXEC)) return errno;
        r->err = p[0];
        theirs[2] = p[1];
        fcntl(r->out, F_SETFL, O_NONBLOCK);
        fcntl(r->err, F_SETFL, O_NONBLOCK);
    }
    if (l->status_pipe) {
        if (pipe2(p, O_CLOEXEC)) return errno;
        r->status = p[0];
        theirs[3] = p[1];
        fcntl(r->status, F_SETFL, O_NONBLOCK);
    }
    return 0;
}

/* When memory is used up the kernel ends the largest process, and memory may belong to files that no process has mapped:
 * then that would be the agent, and the sandbox with it. A value is inherited, and only raising it is free to all. */
static int preference = -1, usual;

void prepare_preference(void) {
    char text[16] = "";
    preference = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
    if (preference >= 0 && read(preference, text, sizeof text - 1) > 0) usual = atoi(text);
}

static void prefer(int value) {
    char text[16];
    int size = snprintf(text, sizeof text, "%d", value);
    if (preference >= 0) (void)!pwrite(preference, text, (size_t)size, 0);
}

int spawn_begun(int report, char *why, size_t why_size) {
    Failure f = {0};
    ssize_t n;
    while ((n = read(report, &f, sizeof f)) < 0 && errno == EINTR) {}
    if (n < 0 && errno == EAGAIN) return -1;
    if (n != sizeof f || !f.error) return 0; /* the program's beginning closes it, as does its end by a signal */
    f.what[sizeof f.what - 1] = 0;
    snprintf(why, why_size, "%s failed: %s", f.what, strerror(f.error));
    return f.error;
}

/* What runs inside may stop the processes before the program begins, for the same user may signal them. */
void spawn_continue(pid_t supervisor) {
    kill(supervisor, SIGCONT);
    signal_all(supervisor, SIGCONT);
}

void spawn_kill(pid_t supervisor) {
    signal_all(supervisor, SIGKILL);
    kill(supervisor, SIGKILL);
}

int spawn(const Launch *l, Launched *r, char *why, size_t why_size) {
    int theirs[4] = {-1, -1, -1, -1}, control[2] = {-1, -1}, report[2] = {-1, -1};
    *r = (Launched){.in = -1, .out = -1, .err = -1, .status = -1, .control = -1, .report = -1};
    int error = pipes(l, r, theirs);
    if (!error && (pipe2(control, O_CLOEXEC) || pipe2(report, O_CLOEXEC))) error = errno;
    const char *what = l->pty ? "opening a terminal" : "opening its pipes";
    if (!error) {
        prefer(usual > PREFERRED ? usual : PREFERRED);
        r->supervisor = fork();
        if (r->supervisor) prefer(usual);
        if (r->supervisor == 0) supervise(l, theirs, control[1], report[1]);
        if (r->supervisor < 0) {
            error = errno;
            what = "forking";
        }
    }
    for (int i = 0; i < 4; i++)
        if (theirs[i] >= 0) close(theirs[i]);
    if (control[1] >= 0) close(control[1]);
    if (report[1] >= 0) close(report[1]);
    if (!error) {
        r->control = control[0];
        r->report = report[0];
        fcntl(r->control, F_SETFL, O_NONBLOCK);
        fcntl(r->report, F_SETFL, O_NONBLOCK);
        return 0;
    }
    int all[] = {r->in, r->out, r->err, r->status, control[0], report[0]};
    for (int i = 0; i < 6; i++)
        if (all[i] >= 0) close(all[i]);
    snprintf(why, why_size, "%s failed: %s", what, strerror(error));
    return error;
}

typedef struct { pid_t pid, parent; } Process;

static int processes(Process *list, int room) {
    DIR *proc = opendir("/proc");
    int count = 0;
    if (!proc) return 0;
    struct dirent *e;
    while ((e = readdir(proc)) && count < room) {
        if (e->d_name[0] < '1' || e->d_name[0] > '9') continue;
        char path[300], text[512];
        snprintf(path, sizeof path, "/proc/%s/stat", e->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        ssize_t n = read(fd, text, sizeof text - 1);
        close(fd);
        if (n <= 0) continue;
        text[n] = 0;
        char *after = strrchr(text, ')'), state; /* the name may hold anything, brackets too */
        int parent;
        if (!after || sscanf(after + 1, " %c %d", &state, &parent) != 2) continue;
        if (state == 'Z' || state == 'X') continue;
        list[count++] = (Process){(pid_t)atoi(e->d_name), parent};
    }
    closedir(proc);
    return count;
}

static Process table[MAX_PROCESSES];
static pid_t below[MAX_PROCESSES + 1];

int descendants(pid_t root, pid_t *found, int room) {
    int total = processes(table, MAX_PROCESSES), count = 0;
    bool grew = true;
    below[count++] = root;
    while (grew) {
        grew = false;
        for (int i = 0; i < total; i++) {
            if (!table[i].pid) continue;
            for (int k = 0; k < count; k++)
                if (table[i].parent == below[k]) {
                    below[count++] = table[i].pid;
                    table[i].pid = 0;
                    grew = true;
                    break;
                }
        }
    }
    int n = count - 1 < room ? count - 1 : room;
    memcpy(found, below + 1, (size_t)n * sizeof *found);
    return n;
}

void signal_all(pid_t root, int number) {
    static pid_t list[MAX_PROCESSES];
    int before = -1, count = descendants(root, list, MAX_PROCESSES);
    if (number != SIGKILL) {
        for (int i = 0; i < count; i++) kill(list[i], number);
        return;
    }
    for (int round = 0; round < 20 && count != before; round++) { /* stopped processes cannot fork */
        for (int i = 0; i < count; i++) kill(list[i], SIGSTOP);
        before = count;
        count = descendants(root, list, MAX_PROCESSES);
    }
    for (int i = 0; i < count; i++) kill(list[i], SIGKILL);
}

/* Children of the agent that it did not start: what is left of a command that killed its supervisor. */
void kill_strays(void) {
    static pid_t roots[MAX_PROCESSES];
    int total = processes(table, MAX_PROCESSES), count = 0;
    for (int i = 0; i < total; i++)
        if (table[i].parent == getpid() && !command_owns(table[i].pid) && !file_job_owns(table[i].pid))
            roots[count++] = table[i].pid;
    for (int i = 0; i < count; i++) {
        kill(roots[i], SIGSTOP);
        signal_all(roots[i], SIGKILL);
        kill(roots[i], SIGKILL);
    }
}
