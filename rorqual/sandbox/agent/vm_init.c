/* Pid 1 of a virtual machine: builds the root from block devices, starts the agent in it, and answers the host's driver.
 *
 * The initramfs holds this program, kernel modules and nothing else. Layers (EROFS, read-only) and the writable disk
 * (ext4) are virtio disks told apart by their serial names: layer0 is the lowest, upper the writable one. The agent runs
 * as pid 1 of a process and mount namespace of its own, so what runs in the sandbox, root included, sees neither this
 * process nor the disks nor the ports. Two ports lead to the host: rorqual.agent is the agent's alone; rorqual.control
 * takes one line at a time from the driver:
 *
 *   threads N     bound on threads of the whole machine      -> "ok" or "error WHY"
 *   tar           the writable layer as a tar stream         -> pieces: u32 length, bytes; an empty one at the end
 *   clock US      time of day                             -> "ok" or "error WHY"
 *   oom           processes ended for want of memory         -> a number
 *   sync          everything to the disk                     -> "ok"
 *
 * Where the monitor has no such ports and no serial names (rorqual.channel=vsock: Firecracker), the two are vsock ports
 * 1024 and 1025, listened on, and the disks are taken in order, the writable one last.
 *
 * "ready" is said unasked, once or to each who connects. When the agent ends, the machine does, with the agent's code (isa-debug-exit).
 */
#include "agent.h"

#ifdef RORQUAL_GUEST_INIT
#include "vm_init.h"
#include <dirent.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EXIT_PORT = 0x501, BROKEN = 43, MAX_LAYERS = 24, WAIT_MS = 10000 };

static __attribute__((noreturn)) void switch_off(int code) {
    sync();
    if (ioperm(EXIT_PORT, 1, 1) == 0) outb((unsigned char)code, EXIT_PORT);
    reboot(RB_AUTOBOOT); /* the monitor is told not to start it again */
    for (;;) pause();
}

static __attribute__((noreturn, format(printf, 1, 2))) void give_up(const char *format, ...) {
    va_list list;
    int error = errno;
    va_start(list, format);
    printf("rorqual: ");
    vprintf(format, list);
    printf(": %s\n", strerror(error));
    fflush(stdout);
    switch_off(BROKEN);
}

static void load_modules(void) {
    FILE *order = fopen("/modules/order", "re");
    char name[200], path[240];
    while (order && fscanf(order, "%199s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)) give_up("loading %s", name);
        close(fd);
        unlink(path);
    }
    if (order) fclose(order);
}

static bool read_line(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0) close(fd);
    if (n < 0) return false;
    text[n] = 0;
    text[strcspn(text, "\n")] = 0;
    return true;
}

/* The device node of what `folder` (below /sys) calls `wanted` in its attribute file. */
static bool find_device(const char *folder, const char *attribute, const char *wanted, char *node, size_t size) {
    for (int tries = 0; tries < WAIT_MS / 5; tries++) {
        DIR *all = opendir(folder);
        struct dirent *e;
        while (all && (e = readdir(all))) {
            char path[600], text[100];
            if (e->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "%s/%s/%s", folder, e->d_name, attribute);
            if (!read_line(path, text, sizeof text) || strcmp(text, wanted)) continue;
            snprintf(node, size, "/dev/%.60s", e->d_name);
            closedir(all);
            return true;
        }
        if (all) closedir(all);
        usleep(5000); /* devices are found while we already run */
    }
    return false;
}

static int open_port(const char *name) {
    char node[80];
    int fd = -1;
    if (find_device("/sys/class/virtio-ports", "name", name, node, sizeof node)) fd = open(node, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) give_up("port %s", name);
    return fd;
}

static void attach(const char *from, const char *to, const char *type, unsigned long flags, const char *options) {
    if (mkdir(to, 0755) && errno != EEXIST) give_up("making %s", to);
    if (mount(from, to, type, flags, options)) give_up("mounting %s (%s) at %s", from, type, to);
}

static bool over_vsock;

static int listen_vsock(unsigned number) {
    struct sockaddr_vm a = {.svm_family = AF_VSOCK, .svm_port = number, .svm_cid = VMADDR_CID_ANY};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 8)) give_up("vsock port %u", number);
    return fd;
}

static void find_disk(const char *serial, int number, char *node, size_t size) {
    if (over_vsock) {
        snprintf(node, size, "/dev/vd%c", 'a' + number);
        for (int tries = 0; tries < WAIT_MS / 5 && access(node, F_OK); tries++) usleep(5000);
    } else if (!find_device("/sys/block", "serial", serial, node, size)) {
        give_up("disk %s", serial);
    }
}

/* Layers and upper become one root at /merged. */
static void build_root(int layers) {
    char node[80], name[20], place[40], options[2048] = "lowerdir=";
    size_t used = strlen(options);
    if (layers < 1 || layers > MAX_LAYERS) give_up("%d layers", layers);
    mkdir("/layers", 0755);
    for (int i = layers - 1; i >= 0; i--) {
        snprintf(name, sizeof name, "layer%d", i);
        snprintf(place, sizeof place, "/layers/%d", i);
        find_disk(name, i, node, sizeof node);
        attach(node, place, "erofs", MS_RDONLY | MS_NODEV, NULL);
        used += (size_t)snprintf(options + used, sizeof options - used, "%s%s", place, i ? ":" : "");
    }
    find_disk("upper", layers, node, sizeof node);
    attach(node, "/upper", "ext4", MS_NODEV | MS_NOATIME, "noinit_itable,errors=remount-ro");
    if ((mkdir(UPPER, 0755) || mkdir("/upper/work", 0755)) && errno != EEXIST) give_up("folders of the writable layer");
    snprintf(options + used, sizeof options - used,
             ",upperdir=" UPPER ",workdir=/upper/work,userxattr,xino=off");
    attach("overlay", "/merged", "overlay", MS_NODEV, options);
}

static void device(const char *path, mode_t mode, unsigned major, unsigned minor) {
    if (mknod(path, S_IFCHR | mode, makedev(major, minor)) || chmod(path, mode)) give_up("device %s", path);
}

/* The least of /dev: nothing that leads to a disk, a port or memory. */
static void build_devices(void) {
    attach("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k");
    device("dev/null", 0666, 1, 3);
    device("dev/zero", 0666, 1, 5);
    device("dev/full", 0666, 1, 7);
    device("dev/random", 0666, 1, 8);
    device("dev/urandom", 0666, 1, 9);
    device("dev/tty", 0666, 5, 0);
    attach("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5");
    attach("tmpfs", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=64m");
    static const char *const links[][2] = {{"pts/ptmx", "dev/ptmx"}, {"/proc/self/fd", "dev/fd"}, {"fd/0", "dev/stdin"},
                                           {"fd/1", "dev/stdout"}, {"fd/2", "dev/stderr"}};
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlink(links[i][0], links[i][1])) give_up("link %s", links[i][1]);
    if (mount(NULL, "dev", NULL, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NOEXEC, NULL)) give_up("closing /dev");
}

static void build_folders(void) {
    static const struct { const char *path; mode_t mode; uid_t owner; } folders[] = {
        {"dev", 0755, 0}, {"proc", 0755, 0}, {"sys", 0755, 0}, {"run", 0755, 0}, {"etc", 0755, 0}, {"home", 0755, 0},
        {"home/agent", 0755, 1000}, {"root", 0700, 0}, {"tmp", 01777, 0}, {"var", 0755, 0}, {"var/tmp", 01777, 0}};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        struct stat there;
        if (lstat(folders[i].path, &there) == 0 && !strcmp(folders[i].path, "home/agent") && there.st_uid) continue;
        if (mkdir(folders[i].path, folders[i].mode) && errno != EEXIST) continue; /* e.g. /tmp is a link in this image */
        if (folders[i].owner || folders[i].mode == 01777) {
            if (chown(folders[i].path, folders[i].owner, folders[i].owner)) give_up("owner of %s", folders[i].path);
            if (chmod(folders[i].path, folders[i].mode)) give_up("mode of %s", folders[i].path);
        }
    }
}

/* Root inside owns these files, and no capability is asked for: they would lead to the memory of the agent, to the first
 * process (a program for core dumps runs there) and to the kernel, which is all that stands between the two. */
static void hide_kernel_files(void) {
    static const char *const hidden[] = {
        "kcore", "kmsg", "kpagecgroup", "kpagecount", "kpageflags", "keys", "key-users", "kallsyms", "timer_list", "iomem",
        "ioports", "vmallocinfo", "slabinfo", "sysrq-trigger", "sched_debug", "modules", "interrupts", "config.gz"};
    char path[40];
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++) {
        snprintf(path, sizeof path, "proc/%s", hidden[i]);
        if (access(path, F_OK) == 0 && mount("dev/null", path, NULL, MS_BIND, NULL)) give_up("hiding %s", path);
    }
    const unsigned long closed = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
    if (mount("proc/sys", "proc/sys", NULL, MS_BIND, NULL) || mount(NULL, "proc/sys", NULL, closed, NULL))
        give_up("closing /proc/sys");
}

/* The agent's process: the new root becomes "/" of its own mount namespace, nothing of the old one stays in it. */
static __attribute__((noreturn)) void become_agent(int port) {
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) give_up("private mounts");
    if (chdir("/merged")) give_up("entering the new root");
    build_folders();
    build_devices();
    attach("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    hide_kernel_files();
    /* the initramfs is the root of all mounts and cannot be left by pivot_root: it is covered, then entered anew */
    if (mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/")) give_up("changing the root");
    umask(022);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    syscall(SYS_close_range, 3u, (unsigned)port - 1, 0);
    syscall(SYS_close_range, (unsigned)port + 1, 0x7fffffffu, 0);
    for (int fd = 0; fd < 3; fd++) close(fd);
    for (int fd = 0; fd < 3; fd++) open("/dev/null", O_RDWR);
    _exit(over_vsock ? serve(port, -1, -1) : serve(-1, port, port));
}

static void loopback(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request)) printf("rorqual: no loopback: %s\n", strerror(errno));
    if (fd >= 0) close(fd);
}

static pid_t start_agent(void) {
    int port = fcntl(over_vsock ? listen_vsock(1024) : open_port("rorqual.agent"), F_DUPFD_CLOEXEC, 10);
    pid_t pid = (pid_t)syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | SIGCHLD, 0, 0, 0, 0);
    if (pid < 0) give_up("starting the agent");
    if (pid == 0) become_agent(port);
    close(port);
    return pid;
}

static int layers_asked(void) {
    char line[4096];
    if (!read_line("/proc/cmdline", line, sizeof line)) return 0;
    over_vsock = strstr(line, "rorqual.channel=vsock") != NULL;
    const char *at = strstr(line, "rorqual.layers=");
    return at ? atoi(at + strlen("rorqual.layers=")) : 0;
}

int guest_init(int argc, char **argv) {
    (void)argc, (void)argv;
    umask(0);
    attach("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    attach("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    attach("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL);
    int console = open("/dev/console", O_RDWR | O_CLOEXEC | O_NOCTTY);
    for (int fd = 0; fd < 3 && console >= 0; fd++) dup2(console, fd);
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    load_modules();
    loopback();
    build_root(layers_asked());
    int control = over_vsock ? listen_vsock(1025) : open_port("rorqual.control");
    pid_t agent = start_agent();
    int ended = control_loop(control, over_vsock, agent, signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK));
    switch_off(WIFEXITED(ended) ? WEXITSTATUS(ended) : BROKEN);
}
#endif
