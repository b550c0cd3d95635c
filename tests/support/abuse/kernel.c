/* S1 and S11: the kernel's own interfaces. */
#include "probe.h"
#include <dirent.h>
#include <stdint.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#ifdef __x86_64__
#include <sys/io.h>
#endif

enum { PROC = 0x9fa0 };
#define ATTEMPT(name) static Verdict name(const char *argument)
#define UNUSED (void)argument

/* Whether a privileged caller got past the question of rights: any answer but "you may not" and "there is no such call". */
static Verdict reached(long result) {
    if (result < 0) note("%s", strerror(errno));
    return result < 0 && (errno == EPERM || errno == EACCES) ? SHUT : result < 0 && errno == ENOSYS ? ABSENT : OPEN;
}

ATTEMPT(mount_tmpfs) { UNUSED; mkdir("probe-mount", 0755); return judged(mount("tmpfs", "probe-mount", "tmpfs", 0, "size=4k")); }
ATTEMPT(mount_proc) { UNUSED; mkdir("probe-mount", 0755); return judged(mount("proc", "probe-mount", "proc", 0, NULL)); }
ATTEMPT(mount_new) { UNUSED; return judged(syscall(SYS_fsopen, "tmpfs", 0)); }
ATTEMPT(mount_tree) { UNUSED; return judged(syscall(SYS_open_tree, AT_FDCWD, "/", 1 | O_CLOEXEC)); }
ATTEMPT(change_root) { UNUSED; return judged(chroot("/")); }
ATTEMPT(unshare_user) { UNUSED; return judged(unshare(CLONE_NEWUSER)); }
ATTEMPT(unshare_time) { UNUSED; return judged(unshare(0x80)); }
ATTEMPT(unshare_net) { UNUSED; return judged(unshare(CLONE_NEWNET)); }
ATTEMPT(unshare_mount) { UNUSED; return judged(unshare(CLONE_NEWNS)); }
ATTEMPT(join_namespace) { UNUSED; return judged(setns(open("/proc/self/ns/uts", O_RDONLY), CLONE_NEWUTS)); }

static Verdict born(long pid) {
    if (pid == 0) _exit(0);
    if (pid > 0) waitpid((pid_t)pid, NULL, 0);
    return judged(pid);
}
#ifdef __aarch64__
ATTEMPT(clone_user) { UNUSED; return born(syscall(SYS_clone, SIGCHLD | CLONE_NEWUSER, 0, 0, 0, 0)); }
#else
ATTEMPT(clone_user) { UNUSED; return born(syscall(SYS_clone, (long)(SIGCHLD | CLONE_NEWUSER), 0, 0, 0, 0)); }
#endif
ATTEMPT(clone3_user) {
    UNUSED;
    uint64_t arguments[11] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
    return born(syscall(435, arguments, sizeof arguments));
}

ATTEMPT(trace_child) {
    UNUSED;
    pid_t child = fork();
    if (child == 0) for (;;) pause();
    long result = ptrace(PTRACE_SEIZE, child, 0, 0);
    int kept = errno;
    kill(child, SIGKILL);
    errno = kept;
    return judged(result);
}
ATTEMPT(trace_first) {
    UNUSED;
    long result = ptrace(PTRACE_SEIZE, 1, 0, 0);
    if (result == 0) ptrace(PTRACE_DETACH, 1, 0, 0);
    return judged(result);
}
ATTEMPT(read_first) {
    UNUSED;
    char byte;
    struct iovec mine = {&byte, 1}, theirs = {&byte, 1};
    return reached(syscall(SYS_process_vm_readv, 1, &mine, 1, &theirs, 1, 0));
}
ATTEMPT(compare_first) { UNUSED; return judged(syscall(SYS_kcmp, getpid(), 1, 2, 0, 0)); }
ATTEMPT(steal_descriptor) {
    UNUSED;
    int pidfd = (int)syscall(434, 1, 0);
    return pidfd < 0 ? judged(pidfd) : reached(syscall(438, pidfd, 0, 0));
}
ATTEMPT(list_folder) {
    DIR *d = opendir(argument);
    if (!d) return judged(-1);
    struct dirent *e;
    while ((e = readdir(d)))
        if (*e->d_name != '.') return note("%s", e->d_name), OPEN;
    return note("empty"), SHUT;
}
ATTEMPT(follow_descriptor) { /* their numbers may be seen; where they lead may not */
    char target[100];
    DIR *d = opendir(argument);
    if (!d) return judged(-1);
    struct dirent *e;
    while ((e = readdir(d)))
        if (*e->d_name != '.' && readlinkat(dirfd(d), e->d_name, target, sizeof target) > 0) return note("%s", e->d_name), OPEN;
    return SHUT;
}
ATTEMPT(open_descriptors) { /* the channel, or the end of another command's pipe */
    char path[100], target[100];
    for (int fd = 3; fd < 64; fd++) {
        snprintf(path, sizeof path, "%s/%d", argument, fd);
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n > 0 && !strncmp(target, "/proc/", 6)) continue; /* a file that has a name of its own */
        for (int flags = O_RDONLY; n > 0 && flags <= O_RDWR; flags++)
            if (open(path, flags | O_NONBLOCK) >= 0) return target[n] = 0, note("%s is %s", path, target), OPEN;
    }
    return SHUT;
}
/* A file of /proc or /sys that gives something; a mask of another file system in its place does not count. */
static Verdict kernel_file(const char *path, int flags) {
    int fd = open(path, flags | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return judged(-1);
    struct statfs fs;
    if (fstatfs(fd, &fs) || (!strncmp(path, "/proc", 5) && fs.f_type != PROC)) return note("masked"), SHUT;
    if ((flags & O_ACCMODE) != O_RDONLY) return OPEN;
    char byte[64];
    ssize_t n = read(fd, byte, sizeof byte);
    if (n < 0) return errno == EAGAIN ? OPEN : judged(-1);
    return n ? OPEN : (note("empty"), SHUT);
}
ATTEMPT(read_file) { return kernel_file(argument, O_RDONLY); }
ATTEMPT(write_file) { return kernel_file(argument, O_WRONLY); }
ATTEMPT(open_file) { return judged(open(argument, O_RDONLY | O_NONBLOCK)); }

ATTEMPT(load_bpf) {
    UNUSED;
    union bpf_attr a;
    memset(&a, 0, sizeof a);
    a.map_type = BPF_MAP_TYPE_ARRAY, a.key_size = 4, a.value_size = 4, a.max_entries = 1;
    return judged(syscall(SYS_bpf, BPF_MAP_CREATE, &a, sizeof a));
}
ATTEMPT(io_uring) { UNUSED; char p[256] = {0}; return judged(syscall(SYS_io_uring_setup, 1, p)); }
ATTEMPT(fault_handler) { UNUSED; return judged(syscall(SYS_userfaultfd, 1)); }
ATTEMPT(add_key) { UNUSED; return judged(syscall(SYS_add_key, "user", "probe", "x", 1, -2)); }
ATTEMPT(key_ring) { UNUSED; return judged(syscall(SYS_keyctl, 0, -2, 1)); }
ATTEMPT(perf) {
    UNUSED;
    struct perf_event_attr a = {.type = PERF_TYPE_SOFTWARE, .size = sizeof a, .config = PERF_COUNT_SW_TASK_CLOCK, .exclude_kernel = 1};
    return judged(syscall(SYS_perf_event_open, &a, 0, -1, -1, 0));
}
ATTEMPT(open_handle) {
    UNUSED;
    struct { unsigned bytes; int type; unsigned char data[128]; } handle = {8, 1, {0}};
    return reached(syscall(SYS_open_by_handle_at, open(".", O_RDONLY), &handle, 0));
}
ATTEMPT(watch_all) { UNUSED; return judged(syscall(SYS_fanotify_init, 0, 0)); }
ATTEMPT(kernel_log) { UNUSED; char text[64]; return judged(syscall(SYS_syslog, 3, text, sizeof text)); }
ATTEMPT(load_module) { UNUSED; return reached(syscall(SYS_init_module, NULL, 0, "")); }
ATTEMPT(load_kernel) { UNUSED; return reached(syscall(SYS_kexec_load, 0, 0, NULL, 0xdeadUL)); }
ATTEMPT(restart) { UNUSED; return reached(syscall(SYS_reboot, 0, 0, 0, 0)); } /* wrong magic: never obeyed */
ATTEMPT(host_name) {
    UNUSED;
    char name[65] = "";
    gethostname(name, sizeof name);
    return judged(sethostname(name, strlen(name)));
}
ATTEMPT(swap_on) { UNUSED; return reached(syscall(SYS_swapon, "/nonexistent-probe", 0)); }
ATTEMPT(quota) { UNUSED; return reached(syscall(SYS_quotactl, 0x800002 << 8, "/nonexistent-probe", 0, NULL)); }
ATTEMPT(process_accounting) { UNUSED; return reached(syscall(SYS_acct, "/nonexistent-probe")); }
ATTEMPT(make_device) { /* the kernel log's device, in a folder of ours */
    UNUSED;
    unlink("probe-node");
    if (mknod("probe-node", S_IFCHR | 0600, makedev(1, 11))) return judged(-1);
    int fd = open("probe-node", O_RDONLY | O_NONBLOCK), kept = errno;
    unlink("probe-node");
    errno = kept;
    return judged(fd);
}
ATTEMPT(socket_of) {
    int family, type, protocol;
    sscanf(argument, "%d,%d,%d", &family, &type, &protocol);
    return judged(socket(family, type, protocol));
}
ATTEMPT(strange_devices) { /* nodes beyond those that every program needs */
    static const char *const usual[] = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"};
    DIR *d = opendir("/dev");
    UNUSED;
    if (!d) return judged(-1);
    struct dirent *e;
    while ((e = readdir(d))) {
        struct stat s;
        int known = 0;
        for (size_t i = 0; i < sizeof usual / sizeof *usual; i++) known |= !strcmp(e->d_name, usual[i]);
        if (known || fstatat(dirfd(d), e->d_name, &s, AT_SYMLINK_NOFOLLOW)) continue;
        if (S_ISCHR(s.st_mode) || S_ISBLK(s.st_mode)) return note("/dev/%s", e->d_name), OPEN;
    }
    return SHUT;
}
ATTEMPT(control_groups) { /* a group of its own in any hierarchy that is mounted */
    UNUSED;
    FILE *f = fopen("/proc/self/mounts", "r");
    char line[1000], path[400], type[40], name[460];
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%*s %399s %39s", path, type) != 2 || strncmp(type, "cgroup", 6)) continue;
        snprintf(name, sizeof name, "%s/probe-%d", path, getpid());
        if (mkdir(name, 0755) == 0) return rmdir(name), note("%s", path), OPEN;
    }
    return SHUT;
}
ATTEMPT(status_field) { /* NAME=VALUE that /proc/self/status has to say */
    char wanted[64], line[400];
    size_t name = strcspn(argument, "=");
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, argument, name) || line[name] != ':') continue;
        note("%s", line);
        snprintf(wanted, sizeof wanted, "%s", argument + name + 1);
        return strcmp(line + name + 2, wanted) ? OPEN : SHUT;
    }
    return ABSENT;
}
#ifdef __x86_64__
ATTEMPT(port_access) { UNUSED; return judged(iopl(3)); }
ATTEMPT(segments) { UNUSED; char table[64]; return judged(syscall(SYS_modify_ldt, 0, table, sizeof table)); }
ATTEMPT(x32_call) { UNUSED; return judged(syscall(0x40000000L + 39)); }
ATTEMPT(i386_call) {
    UNUSED;
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
    return result > 0 ? OPEN : SHUT;
}
#endif
/* S11 */
ATTEMPT(type_into_terminal) {
    UNUSED;
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY);
    char name[64];
    if (master < 0 || grantpt(master) || unlockpt(master) || ptsname_r(master, name, sizeof name)) return judged(-1);
    setsid();
    int slave = open(name, O_RDWR);
    ioctl(slave, TIOCSCTTY, 0);
    return judged(ioctl(slave, TIOCSTI, "x"));
}
ATTEMPT(ioctl_on_file) { /* one that reaches the file system is a breach, whatever that answers */
    unsigned char room[512] = {0};
    int fd = open("probe-file", O_RDWR | O_CREAT, 0600);
    long result = fd < 0 ? -1 : ioctl(fd, strtoul(argument, NULL, 16), room);
    int kept = errno;
    unlink("probe-file");
    errno = kept;
    return reached(result);
}

void kernel(void) {
    static const struct { const char *name; Attempt try; const char *argument; } all[] = {
        {"mount", mount_tmpfs, 0}, {"mount proc", mount_proc, 0}, {"fsopen", mount_new, 0}, {"open_tree", mount_tree, 0},
        {"chroot", change_root, 0}, {"unshare user", unshare_user, 0}, {"unshare time", unshare_time, 0},
        {"unshare net", unshare_net, 0}, {"unshare mount", unshare_mount, 0}, {"setns", join_namespace, 0},
        {"clone user", clone_user, 0}, {"clone3 user", clone3_user, 0}, {"ptrace child", trace_child, 0},
        {"ptrace init", trace_first, 0}, {"process_vm_readv init", read_first, 0}, {"kcmp init", compare_first, 0},
        {"pidfd_getfd init", steal_descriptor, 0}, {"descriptors of init", follow_descriptor, "/proc/1/fd"},
        {"opening descriptors of init", open_descriptors, "/proc/1/fd"},
        {"environment of init", read_file, "/proc/1/environ"}, {"memory of init", open_file, "/proc/1/mem"},
        {"maps of init", read_file, "/proc/1/maps"}, {"root of init", list_folder, "/proc/1/root/"},
        {"bpf", load_bpf, 0}, {"io_uring", io_uring, 0}, {"userfaultfd", fault_handler, 0}, {"add_key", add_key, 0},
        {"keyctl", key_ring, 0}, {"perf_event_open", perf, 0}, {"open_by_handle_at", open_handle, 0},
        {"fanotify", watch_all, 0}, {"kernel log", kernel_log, 0}, {"init_module", load_module, 0},
        {"kexec_load", load_kernel, 0}, {"reboot", restart, 0}, {"sethostname", host_name, 0}, {"swapon", swap_on, 0},
        {"quotactl", quota, 0}, {"acct", process_accounting, 0}, {"mknod", make_device, 0},
        {"device nodes", strange_devices, 0}, {"control groups", control_groups, 0},
        {"kcore", read_file, "/proc/kcore"}, {"kmsg", read_file, "/proc/kmsg"},
        {"kpagecgroup", read_file, "/proc/kpagecgroup"}, {"kpagecount", read_file, "/proc/kpagecount"},
        {"kpageflags", read_file, "/proc/kpageflags"}, {"keys", read_file, "/proc/keys"},
        {"timer_list", read_file, "/proc/timer_list"}, {"kallsyms", read_file, "/proc/kallsyms"},
        {"vmallocinfo", read_file, "/proc/vmallocinfo"}, {"slabinfo", read_file, "/proc/slabinfo"},
        {"iomem", read_file, "/proc/iomem"}, {"sysrq-trigger", write_file, "/proc/sysrq-trigger"},
        {"sysctl core_pattern", write_file, "/proc/sys/kernel/core_pattern"},
        {"sysctl drop_caches", write_file, "/proc/sys/vm/drop_caches"},
        {"sysctl overcommit", write_file, "/proc/sys/vm/overcommit_memory"},
        {"sysfs", list_folder, "/sys/kernel"}, {"power state", write_file, "/sys/power/state"},
        {"/dev/mem", open_file, "/dev/mem"}, {"/dev/kmsg", open_file, "/dev/kmsg"}, {"/dev/kvm", open_file, "/dev/kvm"},
        {"/dev/fuse", open_file, "/dev/fuse"}, {"/dev/loop-control", open_file, "/dev/loop-control"},
        {"/dev/loop0", open_file, "/dev/loop0"}, {"/dev/vda", open_file, "/dev/vda"}, {"/dev/sda", open_file, "/dev/sda"},
        {"/dev/net/tun", open_file, "/dev/net/tun"}, {"AF_PACKET", socket_of, "17,3,0"}, {"AF_VSOCK", socket_of, "40,1,0"},
        {"AF_ALG", socket_of, "38,5,0"}, {"raw socket", socket_of, "2,3,1"}, {"netlink generic", socket_of, "16,3,16"},
        {"netlink audit", socket_of, "16,3,9"}, {"capabilities", status_field, "CapEff=0000000000000000"},
        {"no_new_privs", status_field, "NoNewPrivs=1"}, {"filter", status_field, "Seccomp=2"},
#ifdef __x86_64__
        {"iopl", port_access, 0}, {"modify_ldt", segments, 0}, {"x32 call", x32_call, 0}, {"i386 call", i386_call, 0},
#endif
        {"TIOCSTI", type_into_terminal, 0}, {"XFS_IOC_SWAPEXT", ioctl_on_file, "c0c0586d"},
        {"XFS_IOC_EXCHANGE_RANGE", ioctl_on_file, "40285881"}, {"EXT4_IOC_MOVE_EXT", ioctl_on_file, "c028660f"},
        {"FIDEDUPERANGE", ioctl_on_file, "c0189436"}, {"TIOCLINUX", ioctl_on_file, "541c"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) attempt(all[i].name, all[i].try, all[i].argument);
    umount2("probe-mount", MNT_DETACH);
    rmdir("probe-mount");
}
