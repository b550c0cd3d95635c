/* What a command may not do: limits, its user, and the system calls it is refused.
 *
 * The filter knows every call up to NEWEST; later ones do not exist for the command (ENOSYS), so a new kernel brings no
 * new surface. Calls of another architecture or the x32 numbering end the process.
 */
#include "agent.h"
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "the system call filter knows x86-64 and AArch64"
#endif

enum { NEWEST = 462, MAX_RULES = 400, NAMESPACE_FLAGS = 0x7e020000, MAX_USERS_FILE = 4 << 20 };
enum { NR_QUOTACTL_FD = 443, NR_MEMFD_SECRET = 447, NR_STATMOUNT = 457, NR_LISTMOUNT = 458, NR_PIDFD_GETFD = 438 };

static const int REFUSED[] = {
    /* mounts and roots */
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_move_mount, SYS_open_tree, SYS_fsopen, SYS_fsconfig,
    SYS_fsmount, SYS_fspick, 442 /* mount_setattr */, NR_STATMOUNT, NR_LISTMOUNT, SYS_swapon, SYS_swapoff, SYS_quotactl,
    NR_QUOTACTL_FD, SYS_open_by_handle_at, SYS_name_to_handle_at, SYS_fanotify_init, SYS_acct,
    /* namespaces (clone has a rule of its own) */
    SYS_unshare, SYS_setns,
    /* looking into others */
    SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, NR_PIDFD_GETFD, SYS_kcmp, SYS_perf_event_open,
    /* large parts of the kernel that no ordinary program needs */
    SYS_bpf, SYS_userfaultfd, SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register, SYS_keyctl, SYS_add_key,
    SYS_request_key, SYS_move_pages, SYS_migrate_pages, SYS_lookup_dcookie, SYS_syslog, SYS_vhangup,
    /* the machine itself */
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load,
#ifdef SYS_kexec_file_load
    SYS_kexec_file_load,
#endif
    SYS_reboot, SYS_sethostname, SYS_setdomainname, SYS_settimeofday, SYS_clock_settime, SYS_adjtimex, SYS_clock_adjtime,
#ifdef __x86_64__
    SYS_iopl, SYS_ioperm, SYS_modify_ldt, SYS_uselib, SYS_ustat, SYS_sysfs, SYS__sysctl, SYS_create_module,
    SYS_get_kernel_syms, SYS_query_module, SYS_nfsservctl,
#else
    SYS_nfsservctl,
#endif
};

static const uint32_t REFUSED_IOCTLS[] = {
    0x5412,     /* TIOCSTI: types into a terminal */
    0x541c,     /* TIOCLINUX: the same through the console's selection */
    0xc0c0586d, /* XFS_IOC_SWAPEXT */
    0x40285881, /* XFS_IOC_EXCHANGE_RANGE */
    0xc028660f, /* EXT4_IOC_MOVE_EXT */
    0xc0189436, /* FIDEDUPERANGE */
};

static struct sock_filter rules[MAX_RULES];
static int used;

static void rule(uint16_t code, uint32_t k, uint8_t yes, uint8_t no) {
    if (used < MAX_RULES) rules[used++] = (struct sock_filter){code, yes, no, k};
}

#define LOAD(what) rule(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(what), 0, 0)
#define IS(value, yes, no) rule(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), yes, no)
#define ANSWER(value) rule(BPF_RET | BPF_K, (uint32_t)(value), 0, 0)
#define REFUSE(error) ANSWER(SECCOMP_RET_ERRNO | (error))
#define ARGUMENT(i) (offsetof(struct seccomp_data, args) + 8 * (i)) /* the low half: both architectures are little endian */

static void build(void) {
    used = 0;
    LOAD(offsetof(struct seccomp_data, arch));
    IS(ARCHITECTURE, 1, 0);
    ANSWER(SECCOMP_RET_KILL_PROCESS);
    LOAD(offsetof(struct seccomp_data, nr));
#ifdef __x86_64__
    rule(BPF_JMP | BPF_JSET | BPF_K, 0x40000000, 0, 1);
    ANSWER(SECCOMP_RET_KILL_PROCESS);
#endif
    rule(BPF_JMP | BPF_JGT | BPF_K, NEWEST, 0, 1);
    REFUSE(ENOSYS);
    IS(SYS_clone3, 0, 1); /* its flags lie in memory, out of a filter's reach; libraries fall back to clone */
    REFUSE(ENOSYS);
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++) {
        IS(REFUSED[i], 0, 1);
        REFUSE(EPERM);
    }
    if (settings.data_limit) { /* without a control group nobody counts memory that no process has mapped */
        static const int hidden[] = {SYS_memfd_create, NR_MEMFD_SECRET, SYS_shmget};
        for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++) {
            IS(hidden[i], 0, 1);
            REFUSE(ENOSYS);
        }
    }
    if (settings.cpu_locked) { /* the bound on processor time is the set of processors */
        IS(SYS_sched_setaffinity, 0, 1);
        REFUSE(EPERM);
    }
    IS(SYS_clone, 0, 4);
    LOAD(ARGUMENT(0));
    rule(BPF_JMP | BPF_JSET | BPF_K, NAMESPACE_FLAGS, 0, 1);
    REFUSE(EPERM);
    ANSWER(SECCOMP_RET_ALLOW);
    int ioctls = sizeof REFUSED_IOCTLS / sizeof *REFUSED_IOCTLS;
    IS(SYS_ioctl, 0, (uint8_t)(2 + 2 * ioctls));
    LOAD(ARGUMENT(1));
    for (int i = 0; i < ioctls; i++) {
        IS(REFUSED_IOCTLS[i], 0, 1);
        REFUSE(EPERM);
    }
    ANSWER(SECCOMP_RET_ALLOW);
    IS(SYS_socket, 0, 9);
    LOAD(ARGUMENT(0));
    IS(1, 5, 0);   /* AF_UNIX */
    IS(2, 4, 0);   /* AF_INET */
    IS(10, 3, 0);  /* AF_INET6 */
    IS(16, 0, 3);  /* AF_NETLINK, and of it only routes, which the C library asks for addresses */
    LOAD(ARGUMENT(2));
    IS(0, 0, 1);
    ANSWER(SECCOMP_RET_ALLOW);
    REFUSE(EAFNOSUPPORT);
    ANSWER(SECCOMP_RET_ALLOW);
}

int confine_filter(void) {
    build();
    if (used >= MAX_RULES) return E2BIG;
    struct sock_fprog program = {(unsigned short)used, rules};
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) ? errno : 0;
}

static int limit(int which, uint64_t value) {
    struct rlimit now, wanted = {value, value};
    if (getrlimit(which, &now)) return errno;
    if (now.rlim_max != RLIM_INFINITY && now.rlim_max < value) wanted.rlim_cur = wanted.rlim_max = now.rlim_max;
    return setrlimit(which, &wanted) ? errno : 0;
}

/* Of a whole root (in a machine of its own) as of one with a range of ids: never what reaches the kernel or the agent.
 * What is given up here no program gives back, for no_new_privs follows. */
int confine_powers(void) {
    static const int kept[] = {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID};
    uint64_t keep = 0;
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) keep |= 1ull << kept[i];
    for (int power = 0; power < 64; power++)
        if (!(keep >> power & 1)) prctl(PR_CAPBSET_DROP, power, 0, 0, 0); /* refused where the set is small already */
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct set[2] = {{0}};
    if (syscall(SYS_capget, &head, set)) return errno;
    for (int i = 0; i < 2; i++) {
        set[i].effective &= (uint32_t)(keep >> (32 * i));
        set[i].permitted &= (uint32_t)(keep >> (32 * i));
        set[i].inheritable = 0;
    }
    return syscall(SYS_capset, &head, set) ? errno : 0;
}

int confine_limits(void) {
    int error = limit(RLIMIT_CORE, 0);
    if (!error && settings.nofile) error = limit(RLIMIT_NOFILE, settings.nofile);
    if (!error && settings.fsize) error = limit(RLIMIT_FSIZE, settings.fsize);
    if (!error && settings.nproc) error = limit(RLIMIT_NPROC, settings.nproc);
    if (!error && settings.data_limit) error = limit(RLIMIT_DATA, settings.data_limit);
    return error;
}

static struct { bool known; uid_t uid; gid_t gid; char home[256]; } own;

void remember_user(void) {
    own.known = false;
    own.known = settings.user && look_up_user(settings.user, &own.uid, &own.gid, own.home, sizeof own.home) == 0;
}

int look_up_user(const char *name, uid_t *uid, gid_t *gid, char *home, size_t home_size) {
    if (own.known && !strcmp(name, settings.user)) {
        *uid = own.uid;
        *gid = own.gid;
        snprintf(home, home_size, "%s", own.home);
        return 0;
    }
    /* the sandbox may have put anything in its place: a pipe would never open, a huge file never end */
    int fd = open("/etc/passwd", O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat s;
    FILE *f = fd >= 0 && fstat(fd, &s) == 0 && S_ISREG(s.st_mode) && s.st_size <= MAX_USERS_FILE ? fdopen(fd, "r") : NULL;
    if (!f && fd >= 0) close(fd);
    char line[1024];
    int error = ENOENT;
    char *rest;
    unsigned long number = strtoul(name, &rest, 10);
    bool numeric = *name && !*rest;
    while (f && fgets(line, sizeof line, f)) {
        char *field[7], *p = line;
        int n = 0;
        line[strcspn(line, "\n")] = 0;
        while (n < 7 && (field[n] = strsep(&p, ":"))) n++;
        if (n < 6) continue;
        if (strcmp(field[0], name) && !(numeric && strtoul(field[2], NULL, 10) == number)) continue;
        *uid = (uid_t)strtoul(field[2], NULL, 10);
        *gid = (gid_t)strtoul(field[3], NULL, 10);
        snprintf(home, home_size, "%s", field[5]);
        error = 0;
        break;
    }
    if (f) fclose(f);
    if (error && numeric) {
        *uid = *gid = (uid_t)number;
        snprintf(home, home_size, "/");
        error = 0;
    }
    return error;
}

int become_user(const char *name, char *home, size_t home_size) {
    uid_t uid;
    gid_t gid;
    int error = look_up_user(name, &uid, &gid, home, home_size);
    if (error && geteuid() != 0 && name == settings.user) return 0; /* an image without its name: it is the only user */
    if (error) return error;
    if (uid == geteuid()) return 0;
    if (geteuid() != 0) return EPERM;
    if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)) return errno;
    return 0;
}
