/* S6, S7 and S9: ways out, ways to the agent, and what lies around. */
#include "probe.h"
#include <arpa/inet.h>
#include <dirent.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* ---- S6 ---- */
static Verdict interfaces(const char *argument) {
    (void)argument;
    struct ifaddrs *list = NULL;
    if (getifaddrs(&list)) return judged(-1);
    for (; list; list = list->ifa_next)
        if (strcmp(list->ifa_name, "lo")) return note("%s", list->ifa_name), OPEN;
    return SHUT;
}

static Verdict connected(int fd, struct sockaddr *to, socklen_t size) {
    if (fd < 0) return judged(-1);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    int result = connect(fd, to, size);
    if (result && errno == EINPROGRESS) {
        struct pollfd p = {fd, POLLOUT, 0};
        socklen_t length = sizeof errno;
        if (poll(&p, 1, 500) != 1) return note("no answer"), SHUT;
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &errno, &length);
        result = errno ? -1 : 0;
    }
    if (result == 0) return OPEN;
    return note("%s", strerror(errno)), SHUT;
}

static Verdict address(const char *text) {
    struct sockaddr_un u = {.sun_family = AF_UNIX};
    if (!strncmp(text, "unix:", 5)) {
        snprintf(u.sun_path, sizeof u.sun_path, "%s", text + 5);
        return connected(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&u, sizeof u);
    }
    if (!strncmp(text, "abstract:", 9)) {
        snprintf(u.sun_path + 1, sizeof u.sun_path - 1, "%s", text + 9);
        return connected(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&u,
                         (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(text + 9)));
    }
    char ip[64];
    int port, udp = !strncmp(text, "udp:", 4);
    struct sockaddr_in a = {.sin_family = AF_INET};
    if (sscanf(text + 4, "%63[0-9.]:%d", ip, &port) != 2 || inet_pton(AF_INET, ip, &a.sin_addr) != 1) return note("address?"), SHUT;
    a.sin_port = htons((uint16_t)port);
    int fd = socket(AF_INET, udp ? SOCK_DGRAM : SOCK_STREAM, 0);
    if (!udp) return connected(fd, (struct sockaddr *)&a, sizeof a);
    if (sendto(fd, "x", 1, 0, (struct sockaddr *)&a, sizeof a) == 1) return OPEN;
    return note("%s", strerror(errno)), SHUT;
}

void network(int count, char **addresses) {
    attempt("interfaces", interfaces, NULL);
    for (int i = 0; i < count; i++) attempt(addresses[i], address, addresses[i]);
}

/* ---- S7 ---- */
static Verdict own_descriptors(const char *argument) { /* a socket or a stranger among what was inherited */
    (void)argument;
    for (int fd = 0; fd < 1024; fd++) {
        struct stat s;
        if (fstat(fd, &s)) continue;
        if (S_ISSOCK(s.st_mode)) return note("descriptor %d is a socket", fd), OPEN;
        if (fd > 2) return note("descriptor %d, mode %o", fd, s.st_mode), OPEN;
    }
    return SHUT;
}

static Verdict others_descriptors(const char *argument) { /* sockets of other processes that can be looked at */
    (void)argument;
    DIR *proc = opendir("/proc"), *d;
    struct dirent *e, *f;
    while (proc && (e = readdir(proc))) {
        char path[300], target[100];
        if (*e->d_name < '1' || *e->d_name > '9' || atoi(e->d_name) == getpid()) continue;
        snprintf(path, sizeof path, "/proc/%.20s/fd", e->d_name);
        if (!(d = opendir(path))) continue;
        while ((f = readdir(d))) {
            ssize_t n = readlinkat(dirfd(d), f->d_name, target, sizeof target - 1);
            if (n > 0 && (target[n] = 0, !strncmp(target, "socket:", 7))) return note("%s of %s", target, path), OPEN;
        }
        closedir(d);
    }
    return SHUT;
}

static Verdict sockets(const char *argument) { /* every socket that has a name here */
    (void)argument;
    FILE *f = fopen("/proc/net/unix", "r");
    char line[600], name[200], text[210];
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%*s %*s %*s %*s %*s %*s %*s %199s", name) != 1 || !strcmp(name, "Path")) continue;
        snprintf(text, sizeof text, *name == '@' ? "abstract:%s" : "unix:%s", *name == '@' ? name + 1 : name);
        if (address(text) == OPEN) return note("%s", text), OPEN;
    }
    return SHUT;
}

static Verdict ports(const char *argument) { /* virtio consoles and the like, which lead out of a machine */
    char path[300];
    DIR *d = opendir(argument);
    struct dirent *e;
    if (!d) return judged(-1);
    while ((e = readdir(d))) {
        if (strncmp(e->d_name, "vport", 5) && strncmp(e->d_name, "hvc", 3) && strncmp(e->d_name, "ttyS", 4)) continue;
        snprintf(path, sizeof path, "%s/%s", argument, e->d_name);
        if (open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY) >= 0) return note("%s", path), OPEN;
    }
    return SHUT;
}

static Verdict end_first(const char *argument) {
    (void)argument;
    if (kill(1, SIGKILL) == 0) note("sent");
    return SHUT; /* the caller sees whether the agent still answers */
}

void channel(void) {
    attempt("own descriptors", own_descriptors, NULL);
    attempt("others' descriptors", others_descriptors, NULL);
    attempt("named sockets", sockets, NULL);
    attempt("ports", ports, "/dev");
    attempt("kill init", end_first, NULL);
}

/* ---- S9 and walking ---- */
static char wanted[200], self[40];
static size_t wanted_size;
static double until;
static long files_read, bytes_read;

static int holds(const char *path, size_t most) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC | O_NOCTTY);
    if (fd < 0) return 0;
    static char data[1 << 20];
    size_t kept = 0, total = 0;
    ssize_t n;
    int found = 0;
    while (!found && total < most && now() < until && (n = read(fd, data + kept, sizeof data - kept)) > 0) {
        total += (size_t)n;
        kept += (size_t)n;
        if (wanted_size && memmem(data, kept, wanted, wanted_size)) found = 1;
        size_t rest = kept < sizeof wanted ? kept : sizeof wanted;
        memmove(data, data + kept - rest, rest);
        kept = rest;
    }
    close(fd);
    files_read += total > 0;
    bytes_read += (long)total;
    if (total && strstr(path, "kpage")) printf("kernel pages\topen\t%s gave %zu bytes\n", path, total);
    return found;
}

static void below(const char *folder, int skip_programs, size_t most) {
    DIR *d = opendir(folder);
    struct dirent *e;
    while (d && now() < until && (e = readdir(d))) {
        char path[4200];
        struct stat s;
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        snprintf(path, sizeof path, "%s%s%s", folder, folder[1] ? "/" : "", e->d_name);
        if (skip_programs && (!strcmp(path, "/usr") || !strcmp(path, "/proc") || !strcmp(path, "/sys") || !strcmp(path, "/dev"))) continue;
        if (lstat(path, &s)) continue;
        if (S_ISDIR(s.st_mode)) below(path, skip_programs, most);
        else if (S_ISREG(s.st_mode) && strcmp(path, self) && holds(path, most)) printf("file\topen\t%s\n", path);
    }
    if (d) closedir(d);
}

void secret(const char *masked) {
    unsigned byte;
    for (; sscanf(masked, "%2x", &byte) == 1 && wanted_size < sizeof wanted; masked += 2) wanted[wanted_size++] = (char)(byte ^ 0x5a);
    until = now() + 20;
    DIR *proc = opendir("/proc");
    struct dirent *e;
    while (proc && (e = readdir(proc)))
        for (int i = 0; i < 2 && *e->d_name > '0' && *e->d_name <= '9'; i++) {
            char path[300];
            snprintf(path, sizeof path, "/proc/%.20s/%s", e->d_name, i ? "cmdline" : "environ");
            if (holds(path, 1 << 20)) printf("%s\topen\t%s\n", i ? "command line" : "environment", path);
        }
    below("/", 1, 4 << 20);
    printf("searched\tshut\t%ld files, %ld bytes%s\n", files_read, bytes_read, now() < until ? "" : ", out of time");
}

void walk(double seconds, int count, char **paths) {
    until = now() + seconds;
    for (int i = 0; i < count; i++) below(paths[i], 0, 64 << 10);
    printf("walked\tshut\t%ld files, %ld bytes\n", files_read, bytes_read);
}

/* Two processes, and so one of them always runs where there are two processors, stop whatever is begun after them, before
 * its program can begin: a supervisor and its child have the next numbers. */
void storm(void) {
    signal(SIGTERM, SIG_IGN);
    pid_t mate = fork(), last = mate ? mate : getpid();
    if (mate) {
        puts("storms");
        fflush(stdout);
    }
    for (;;)
        for (pid_t pid = last + 1; pid <= last + 64; pid++) kill(pid, SIGSTOP);
}
