/* S2: takes as much of something as it gets, up to a bound that is given, and prints how much that was.
 *
 *   forks N          processes alive at once        memory MB        touched at once, in a child
 *   disk MB PATH     MiB written to a file          inodes N PATH    files made in a folder
 *   descriptors N    open at once                   count MS PROCESSES   rounds of arithmetic in the first of them
 *   hidden MB        memory no process has mapped: in-memory files and System V segments
 */
#include "probe.h"
#include <signal.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <time.h>

static long forks(long most) {
    pid_t *made = calloc((size_t)most, sizeof *made);
    long n = 0;
    while (n < most && (made[n] = fork()) >= 0) {
        if (made[n] == 0) for (;;) pause();
        n++;
    }
    for (long i = 0; i < n; i++) kill(made[i], SIGKILL);
    for (long i = 0; i < n; i++) waitpid(made[i], NULL, 0);
    return n;
}

static long memory(long mb) {
    long *done = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t pid = fork();
    for (; pid == 0 && *done < mb; ++*done) {
        char *p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) _exit(1);
        memset(p, 1, 1 << 20);
    }
    if (pid == 0) {
        usleep(300000); /* whoever only looks from time to time has to see it */
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) && !WEXITSTATUS(status) ? *done : *done < mb ? *done : -1;
}

static long disk(long mb, const char *path) {
    static char block[1 << 16];
    memset(block, 7, sizeof block);
    long written = 0;
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    while (fd >= 0 && written < mb << 20) {
        ssize_t n = write(fd, block, sizeof block);
        if (n <= 0) break;
        written += n;
    }
    if (fd >= 0) fsync(fd);
    close(fd);
    unlink(path);
    return written >> 20;
}

static long inodes(long most, const char *folder) {
    char path[400];
    long n = 0;
    mkdir(folder, 0755);
    for (; n < most; n++) {
        snprintf(path, sizeof path, "%s/%ld", folder, n);
        int fd = open(path, O_WRONLY | O_CREAT, 0600);
        if (fd < 0) break;
        close(fd);
    }
    for (long i = 0; i < n; i++) {
        snprintf(path, sizeof path, "%s/%ld", folder, i);
        unlink(path);
    }
    rmdir(folder);
    return n;
}

static long descriptors(long most) {
    long n = 0;
    while (n < most && open("/dev/null", O_RDONLY) >= 0) n++;
    return n;
}

static long count(long ms, long processes) {
    pid_t others[64];
    int made = 0;
    while (made < processes - 1 && made < 64 && (others[made] = fork()) > 0) made++;
    if (made < processes - 1 && made < 64 && others[made] == 0)
        for (volatile long i = 0;; i++) {}
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double end = (double)t.tv_sec + (double)t.tv_nsec / 1e9 + (double)ms / 1e3;
    volatile unsigned x = 1;
    long rounds = 0;
    do {
        for (int i = 0; i < 20000; i++) x = x * 1664525u + 1013904223u;
        rounds++;
        clock_gettime(CLOCK_MONOTONIC, &t);
    } while ((double)t.tv_sec + (double)t.tv_nsec / 1e9 < end);
    for (int i = 0; i < made; i++) kill(others[i], SIGKILL);
    return rounds;
}

static long hidden(long mb) {
    static char block[1 << 20];
    memset(block, 3, sizeof block);
    long n = 0;
    for (int fd = -1; n < mb; n++) {
        if (n % 16 == 0 && (fd = (int)syscall(SYS_memfd_create, "probe", 0)) < 0) break;
        if (write(fd, block, sizeof block) != sizeof block) break;
    }
    int segment = shmget(IPC_PRIVATE, 1 << 20, IPC_CREAT | 0600);
    if (segment >= 0) {
        shmctl(segment, IPC_RMID, NULL);
        n++;
    }
    return n;
}

int load(int argc, char **argv) {
    const char *what = argc > 2 ? argv[1] : "";
    long n = argc > 2 ? atol(argv[2]) : 0, got;
    if (!strcmp(what, "forks")) got = forks(n);
    else if (!strcmp(what, "memory")) got = memory(n);
    else if (!strcmp(what, "disk") && argc == 4) got = disk(n, argv[3]);
    else if (!strcmp(what, "inodes") && argc == 4) got = inodes(n, argv[3]);
    else if (!strcmp(what, "descriptors")) got = descriptors(n);
    else if (!strcmp(what, "count") && argc == 4) got = count(n, atol(argv[3]));
    else if (!strcmp(what, "hidden")) got = hidden(n);
    else return 2;
    printf("%s\t%ld\n", what, got);
    return 0;
}
