/* The keeper: on the host, one for each sandbox, so that a sandbox outlives a client that is killed.
 *
 *   keeper -> holder -> bwrap -> agent (pid 1 of the sandbox)
 *
 * The keeper makes the channel's socket, ends the sandbox when its time is over and writes `exit.json`. The holder gives
 * up root (`--uid`), enters a user and a mount namespace of its own, stacks the layers below a bounded private upper
 * folder there, and starts bwrap on the result; it stays to hold that namespace, through which the host reads the upper
 * folder. Each dies with the one before it.
 *
 *   agent keep --home DIR [--uid N --inner-uid N] --lower DIR... --disk-mb N --inodes N [--memory-mb N] [--cpus LIST] -- bwrap ARGS
 *
 *   agent keep --home DIR --plain yes -- PROGRAM ARGS
 *
 * starts a program that builds its own walls (a machine monitor), without a user, layers or a socket of ours. A machine
 * whose agent ends with code C leaves with 2 C + 1 (QEMU's isa-debug-exit), which is read as C.
 *
 * With `--channel fifos` the program gets the FIFOs `in` and `out` of DIR as its input and output and no socket; with
 * `--show FOLDER` it finds that folder at /mnt/show, read-only, and one of its own at /mnt/run (and
 * /mnt/up/own, for files, where the limits on the disk hold); gVisor is started so.
 *
 * In ARGS, @merged stands for the stacked root and @agent for this program. On standard output: one line
 * "keeper PID holder PID"; the holder goes on when a byte arrives on standard input (meanwhile it can be put into a
 * control group) and ends when there is none.
 *
 * With --range N the sandbox has the host ids UID to UID + N - 1: layers and the upper folder are shown to it through that
 * range, and the program, runc, is started as root and gives up its powers itself, in a user namespace over the range.
 */
#include "agent.h"
#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_LOWERS = 64, LISTEN_FD = 5, AGENT_FD = 6, LIFE_FD = 7, MAX_TREE = 4096, BUSY_MS = 50, QUIET_MS = 200 };
#define STAGE "/mnt"

static struct {
    const char *home, *cpus, *plain, *channel, *show, *lowers[MAX_LOWERS];
    int lower_count;
    long uid, inner_uid, range, disk_mb, inodes, memory_mb;
    char **bwrap;
} ask = {.uid = -1, .inner_uid = 1000};

static __attribute__((noreturn, format(printf, 1, 2))) void give_up(const char *format, ...) {
    va_list list;
    int error = errno;
    va_start(list, format);
    fprintf(stderr, "keeper: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, ": %s\n", strerror(error));
    _exit(50);
}

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) give_up("writing %s", path);
    close(fd);
}

static void own_user_namespace(void) {
    char map[60];
    long uid = (long)geteuid(), gid = (long)getegid();
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0); /* after a change of user its own /proc files would belong to root */
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS)) give_up("user and mount namespace for uid %ld", uid);
    put("/proc/self/setgroups", "deny");
    snprintf(map, sizeof map, "0 %ld 1", uid);
    put("/proc/self/uid_map", map);
    snprintf(map, sizeof map, "0 %ld 1", gid);
    put("/proc/self/gid_map", map);
}

static void folder(const char *path, mode_t mode, long uid) {
    if (mkdir(path, mode) && errno != EEXIST) give_up("making %s", path);
    if (chmod(path, mode)) give_up("mode of %s", path);
    if (uid >= 0 && chown(path, (uid_t)uid, (gid_t)uid)) give_up("owner of %s", path);
}

static void machine_id(const char *path, long uid) {
    uint8_t bytes[16];
    char text[34];
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, bytes, 16) != 16) give_up("random numbers");
    close(fd);
    for (int i = 0; i < 16; i++) snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    strcpy(text + 32, "\n");
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0444);
    if (fd < 0 || write(fd, text, 33) != 33 || (uid >= 0 && fchown(fd, (uid_t)uid, (gid_t)uid))) give_up("%s", path);
    close(fd);
}

/* A user namespace for mounts in which files of the sandbox's own user in a layer belong to this sandbox's uid. */
static int id_map(void) {
    int ready[2], done[2];
    char path[60], map[200], byte = 0;
    if (pipe2(ready, O_CLOEXEC) || pipe2(done, O_CLOEXEC)) return -1;
    pid_t child = fork();
    if (child == 0) {
        byte = unshare(CLONE_NEWUSER) == 0;
        close(done[1]);
        if (write(ready[1], &byte, 1) == 1) (void)!read(done[0], &byte, 1);
        _exit(0);
    }
    int made = -1;
    close(ready[1]); /* so that the end of the child is an end of file */
    if (child > 0 && read(ready[0], &byte, 1) == 1 && byte) {
        int n = 0;
        if (ask.range) snprintf(map, sizeof map, "0 %ld %ld\n", ask.uid, ask.range);
        else if (ask.inner_uid) n = snprintf(map, sizeof map, "0 0 %ld\n", ask.inner_uid);
        if (!ask.range) snprintf(map + n, sizeof map - (size_t)n, "%ld %ld 1\n%ld %ld %ld\n", ask.inner_uid, ask.uid, ask.inner_uid + 1,
                 ask.inner_uid + 1, 65535 - ask.inner_uid);
        snprintf(path, sizeof path, "/proc/%d/uid_map", child);
        put(path, map);
        snprintf(path, sizeof path, "/proc/%d/gid_map", child);
        put(path, map);
        snprintf(path, sizeof path, "/proc/%d/ns/user", child);
        made = open(path, O_RDONLY | O_CLOEXEC);
    }
    close(done[1]);
    close(done[0]);
    close(ready[0]);
    if (child > 0) waitpid(child, NULL, 0);
    return made;
}

struct attributes { uint64_t set, clear, propagation, userns; };
enum { TREE_CLONE = 1, EMPTY_PATH = 0x1000, RECURSIVE = 0x8000, MOVE_EMPTY_PATH = 4, ATTRIBUTE_IDMAP = 0x100000 };

/* Puts a layer at `path`, with its user's files translated; false where the kernel or file system cannot do that. */
static bool bind_translated(const char *layer, const char *path, int map) {
    if (map < 0) return false;
    int fd = (int)syscall(SYS_open_tree, AT_FDCWD, layer, TREE_CLONE | O_CLOEXEC);
    if (fd < 0) return false;
    struct attributes a = {.set = ATTRIBUTE_IDMAP, .userns = (uint64_t)map};
    bool done = syscall(442 /* mount_setattr */, fd, "", EMPTY_PATH, &a, sizeof a) == 0 &&
                syscall(SYS_move_mount, fd, "", AT_FDCWD, path, MOVE_EMPTY_PATH) == 0;
    close(fd);
    return done;
}

/* Lowers and upper on a private tmpfs at STAGE; both are opened before it hides what may lie there. */
static void stage(void) {
    int fds[MAX_LOWERS];
    char path[80], options[160];
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) give_up("private mounts");
    for (int i = 0; i < ask.lower_count; i++)
        if ((fds[i] = open(ask.lowers[i], O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0) give_up("layer %s", ask.lowers[i]);
    int map = ask.uid >= 0 ? id_map() : -1;
    int show = ask.show ? open(ask.show, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
    if (ask.show && show < 0) give_up("folder %s", ask.show);
    if (mount("tmpfs", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, ask.show ? "size=8m,mode=755" : "size=256k,mode=755")) give_up("tmpfs at " STAGE);
    for (int i = 0; i < ask.lower_count; i++) {
        char from[40];
        snprintf(path, sizeof path, STAGE "/l%d", i);
        snprintf(from, sizeof from, "/proc/self/fd/%d", fds[i]);
        folder(path, 0755, -1);
        if (!bind_translated(from, path, map) && mount(from, path, NULL, MS_BIND | MS_REC, NULL)) give_up("binding layer %s", ask.lowers[i]);
        close(fds[i]);
    }
    if (map >= 0) close(map);
    if (ask.show) {
        char from[40];
        snprintf(from, sizeof from, "/proc/self/fd/%d", show);
        folder(STAGE "/show", 0755, -1);
        folder(STAGE "/run", 0700, ask.uid);
        if (mount(from, STAGE "/show", NULL, MS_BIND, NULL)) give_up("binding %s", ask.show);
        close(show);
    }
    folder(STAGE "/up", 0755, -1);
    folder(STAGE "/merged", 0755, -1);
    snprintf(options, sizeof options, "size=%ldm,nr_inodes=%ld,mode=755", ask.disk_mb, ask.inodes);
    if (mount("tmpfs", STAGE "/up", "tmpfs", MS_NOSUID | MS_NODEV, options)) give_up("tmpfs for the upper folder");
    static const struct { const char *path; mode_t mode; } folders[] = {
        {"", 0755}, {"/etc", 0755}, {"/home", 0755}, {"/home/agent", 0755}, {"/root", 0755}, {"/tmp", 01777},
        {"/var", 0755}, {"/var/tmp", 01777}};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        snprintf(path, sizeof path, STAGE "/up/upper%s", folders[i].path);
        bool agents = ask.range && !strcmp(folders[i].path, "/home/agent");
        folder(path, folders[i].mode, agents ? ask.uid + 1000 : ask.uid);
    }
    machine_id(STAGE "/up/upper/etc/machine-id", ask.uid);
    folder(STAGE "/up/work", 0755, ask.uid);
    if (ask.show) folder(STAGE "/up/own", 0700, ask.uid);
}

static void stack(void) {
    char options[4096] = "lowerdir=";
    size_t used = strlen(options);
    for (int i = 0; i < ask.lower_count; i++)
        used += (size_t)snprintf(options + used, sizeof options - used, "%s" STAGE "/l%d", i ? ":" : "", i);
    snprintf(options + used, sizeof options - used, ",upperdir=" STAGE "/up/upper,workdir=" STAGE "/up/work,userxattr");
    if (mount("overlay", STAGE "/merged", "overlay", MS_NOSUID | MS_NODEV, options)) give_up("stacking layers (%s)", options);
}

static void use_cpus(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    char *list = strdup(ask.cpus), *rest = list, *one;
    while ((one = strsep(&rest, ","))) CPU_SET((unsigned)atoi(one), &set);
    free(list);
    if (sched_setaffinity(0, sizeof set, &set)) give_up("processors %s", ask.cpus);
}

static int life[2]; /* the agent reads the end of it when the keeper is gone, whatever became of those between them */

static __attribute__((noreturn)) void start_bwrap(int listener, int agent) {
    char text[64];
    for (char **a = ask.bwrap; *a; a++) {
        if (!strcmp(*a, "@merged")) *a = STAGE "/merged";
        snprintf(text, sizeof text, "/proc/self/fd/%d", AGENT_FD);
        if (!strcmp(*a, "@agent")) *a = strdup(text);
    }
    if (listener >= 0) dup2(listener, LISTEN_FD);
    if (!ask.channel) dup2(agent, AGENT_FD);
    if (listener >= 0) dup2(life[0], LIFE_FD);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    execv(ask.bwrap[0], ask.bwrap);
    give_up("starting %s", ask.bwrap[0]);
}

static __attribute__((noreturn)) void start_plain(void) {
    dup2(2, 1);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    execv(ask.bwrap[0], ask.bwrap);
    give_up("starting %s", ask.bwrap[0]);
}

static void open_fifos(int fds[2]) { /* both ways each, so that none of them ever ends */
    fds[0] = open("in", O_RDWR | O_CLOEXEC);
    fds[1] = open("out", O_RDWR | O_CLOEXEC);
    if (fds[0] < 0 || fds[1] < 0) give_up("opening the channel in %s", ask.home);
}

static __attribute__((noreturn)) void hold(int listener, pid_t keeper) {
    char go;
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    prctl(PR_SET_NAME, "holder", 0, 0, 0);
    if (getppid() != keeper) _exit(50);
    syscall(SYS_close_range, 3u, 0x7fffffffu, 4u /* close on exec: the keeper alone has the locks on layers */);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    int agent = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    agent = fcntl(agent, F_DUPFD_CLOEXEC, 10);
    if (listener >= 0) listener = fcntl(listener, F_DUPFD_CLOEXEC, 10);
    close(life[1]);
    life[0] = fcntl(life[0], F_DUPFD_CLOEXEC, 10);
    if (read(0, &go, 1) != 1) _exit(50);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(null, 0);
    int fifos[2] = {-1, -1};
    if (ask.channel) open_fifos(fifos);
    if (!ask.plain && chdir("/")) give_up("chdir");
    umask(022);
    if (ask.cpus) use_cpus();
    if (ask.plain) {
    } else if (ask.uid >= 0) {
        if (unshare(CLONE_NEWNS)) give_up("mount namespace");
        stage();
    } else {
        own_user_namespace();
        stage();
    }
    if (ask.uid >= 0 && !ask.range) {
        if (setgroups(0, NULL) || setresgid((gid_t)ask.uid, (gid_t)ask.uid, (gid_t)ask.uid) ||
            setresuid((uid_t)ask.uid, (uid_t)ask.uid, (uid_t)ask.uid))
            give_up("becoming uid %ld", ask.uid);
        own_user_namespace();
    }
    if (!ask.plain) stack();
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0); /* a change of user clears it */
    if (getppid() != keeper) _exit(50);
    pid_t pid = fork();
    if (pid < 0) give_up("fork");
    if (pid == 0 && ask.plain) start_plain();
    if (pid == 0 && ask.channel) {
        dup2(fifos[0], 0);
        dup2(fifos[1], 1);
    }
    if (pid == 0) start_bwrap(listener, agent);
    if (listener >= 0) close(listener);
    close(agent);
    dup2(null, 1);
    int status;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

/* ---- the keeper's own watch ---- */

static int64_t boot_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* `lifetime` holds lines "MILLISECONDS-SINCE-BOOT REASON"; the earliest counts. */
static int64_t read_deadline(char *reason, size_t size) {
    int64_t earliest = INT64_MAX;
    FILE *f = fopen("lifetime", "re");
    long long at;
    char why[40];
    while (f && fscanf(f, "%lld %39s", &at, why) == 2)
        if (at < earliest) {
            earliest = at;
            snprintf(reason, size, "%s", why);
        }
    if (f) fclose(f);
    return earliest;
}

/* All below `root`, parents first; a child may have been forked by any thread. */
static int tree(pid_t root, pid_t *list) {
    int count = 0;
    for (int i = -1; i < count; i++) {
        pid_t parent = i < 0 ? root : list[i];
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/task", parent);
        DIR *threads = opendir(path);
        struct dirent *thread;
        while (threads && (thread = readdir(threads))) {
            char children[400];
            if (thread->d_name[0] == '.') continue;
            snprintf(children, sizeof children, "/proc/%d/task/%s/children", parent, thread->d_name);
            FILE *f = fopen(children, "re");
            int pid;
            while (f && count < MAX_TREE && fscanf(f, "%d", &pid) == 1) list[count++] = pid;
            if (f) fclose(f);
        }
        if (threads) closedir(threads);
    }
    return count;
}

static long private_kib(pid_t pid) { /* what is its own: anonymous and shared memory, not mapped files */
    char path[40], line[200];
    long sum = 0, value;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "RssAnon: %ld", &value) == 1 || sscanf(line, "RssShmem: %ld", &value) == 1) sum += value;
    if (f) fclose(f);
    return sum;
}

/* Without a control group: adds up the tree's memory and ends its largest process when it is over the limit. */
static int guard_memory(pid_t holder) {
    static pid_t list[MAX_TREE];
    static int killed;
    int count = tree(holder, list);
    if (count <= 2) return QUIET_MS; /* bwrap and the agent alone */
    long sum = 0, largest = 0;
    pid_t victim = 0;
    for (int i = 2; i < count; i++) {
        long kib = private_kib(list[i]);
        sum += kib;
        if (kib > largest) largest = kib, victim = list[i];
    }
    if (sum > ask.memory_mb * 1024 && victim && kill(victim, SIGKILL) == 0) {
        FILE *f = fopen("oom.tmp", "we");
        if (f) {
            fprintf(f, "%d\n", ++killed);
            fclose(f);
            rename("oom.tmp", "oom");
        }
    }
    return BUSY_MS;
}

static __attribute__((noreturn)) void finish_keeping(const char *reason, int status) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    FILE *f = fopen("exit.tmp", "we");
    if (f) {
        fprintf(f, "{\"reason\": \"%s\", \"status\": %d, \"time\": %lld.%03ld}\n", reason, status, (long long)t.tv_sec,
                t.tv_nsec / 1000000);
        fclose(f);
        rename("exit.tmp", "exit.json");
    }
    unlink("channel");
    _exit(0);
}

static __attribute__((noreturn)) void watch(pid_t holder) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    char reason[40] = "";
    int64_t deadline = read_deadline(reason, sizeof reason);
    const char *why = NULL;
    for (;;) {
        int status;
        if (waitpid(holder, &status, WNOHANG) == holder) {
            int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            if (ask.plain && code > 80 && code < 90 && code % 2) code /= 2;
            if (!why) why = code == 40 ? "idle" : code == 41 ? "lifetime" : code == 42 ? "closed" : "crashed";
            finish_keeping(why, code);
        }
        int64_t wait = deadline - boot_ms();
        if (wait <= 0 && !why) {
            why = reason;
            kill(holder, SIGKILL);
        }
        if (wait <= 0 || wait > 3600000) wait = 3600000;
        if (ask.memory_mb) {
            int soon = guard_memory(holder);
            if (soon < wait) wait = soon;
        }
        struct timespec t = {wait / 1000, wait % 1000 * 1000000};
        int got = sigtimedwait(&set, NULL, &t);
        if (got == SIGHUP) deadline = read_deadline(reason, sizeof reason);
        if (got == SIGTERM) {
            if (!why) why = "closed";
            kill(holder, SIGKILL);
        }
    }
}

/* `keeper`: "PID START PID START" of keeper and holder, so that they are known although nobody waited for the line. */
static unsigned long long started(pid_t pid) {
    char path[40], text[1024];
    unsigned long long ticks = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "re");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    if (f) fclose(f);
    text[n] = 0;
    char *p = strrchr(text, ')');
    for (int field = 2; p && field < 22; field++) p = strchr(p + 1, ' ');
    if (p) ticks = strtoull(p, NULL, 10);
    return ticks;
}

static void note(pid_t self, pid_t holder) {
    FILE *f = fopen("keeper.tmp", "we");
    if (!f) give_up("writing in %s", ask.home);
    fprintf(f, "%d %llu %d %llu\n", self, started(self), holder, started(holder));
    fclose(f);
    if (rename("keeper.tmp", "keeper")) give_up("writing in %s", ask.home);
}

static int listener(void) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un a = {.sun_family = AF_UNIX, .sun_path = "channel"};
    unlink("channel");
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 8)) give_up("socket %s/channel", ask.home);
    return fd;
}

static bool parse(int argc, char **argv) {
    for (int i = 2; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(name, "--")) {
            ask.bwrap = argv + i + 1;
            break;
        }
        if (!value) return false;
        if (!strcmp(name, "--home")) ask.home = value;
        else if (!strcmp(name, "--cpus")) ask.cpus = value;
        else if (!strcmp(name, "--plain")) ask.plain = value;
        else if (!strcmp(name, "--channel") && !strcmp(value, "fifos")) ask.channel = value;
        else if (!strcmp(name, "--show")) ask.show = value;
        else if (!strcmp(name, "--uid")) ask.uid = atol(value);
        else if (!strcmp(name, "--inner-uid")) ask.inner_uid = atol(value);
        else if (!strcmp(name, "--range")) ask.range = atol(value);
        else if (!strcmp(name, "--disk-mb")) ask.disk_mb = atol(value);
        else if (!strcmp(name, "--inodes")) ask.inodes = atol(value);
        else if (!strcmp(name, "--memory-mb")) ask.memory_mb = atol(value);
        else if (!strcmp(name, "--lower") && ask.lower_count < MAX_LOWERS) ask.lowers[ask.lower_count++] = value;
        else return false;
        i++;
    }
    if (ask.plain) return ask.home && ask.bwrap && ask.bwrap[0] && !ask.lower_count && ask.uid < 0;
    if (geteuid() == 0 && ask.uid <= 0) return false; /* bwrap as root keeps its powers: there is no such form */
    return ask.home && ask.lower_count && ask.disk_mb && ask.inodes && ask.bwrap && ask.bwrap[0];
}

int keep(int argc, char **argv) {
    if (!parse(argc, argv)) {
        fprintf(stderr, "keeper: wrong arguments (and --uid is needed when started by root)\n");
        return 2;
    }
    if (chdir(ask.home)) give_up("entering %s", ask.home);
    int socket_fd = ask.plain || ask.channel ? -1 : listener();
    pid_t first = fork();
    if (first < 0) give_up("fork");
    if (first > 0) _exit(0); /* whoever started it does not have to wait for it */
    setsid();
    prctl(PR_SET_NAME, "keeper", 0, 0, 0);
    signal(SIGPIPE, SIG_IGN);
    if (pipe2(life, O_CLOEXEC)) give_up("pipe");
    pid_t self = getpid(), holder = fork();
    if (holder < 0) give_up("fork");
    if (holder == 0) hold(socket_fd, self);
    close(life[0]);
    if (socket_fd >= 0) close(socket_fd);
    note(self, holder);
    printf("keeper %d holder %d\n", self, holder);
    fflush(stdout);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(null, 0);
    dup2(null, 1);
    watch(holder);
}
