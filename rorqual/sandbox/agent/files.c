/* Files, as the sandbox's user sees them: the agent opens them inside, with the rights of that user.
 *
 * A path may lead through links that the sandbox made. Therefore no magic link of /proc is followed and nothing on a
 * proc file system is opened: it could be the agent's own memory. A whole file is written to a temporary name and renamed.
 * What can take long (lists, removing trees) runs in a child, which sends one reply through a pipe.
 */
#include "agent.h"
#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { MAX_JOBS = 8, MAX_LISTED = 50000, LIST_BYTES = 512 << 10, MAX_DEPTH = 200, CHUNK_BYTES = 512 << 10, PROC_MAGIC = 0x9fa0 };

static int open_safely(const char *path, uint64_t flags, uint64_t mode) {
    struct open_how how = {.flags = flags | O_CLOEXEC | (flags & O_PATH ? 0 : O_NONBLOCK | O_NOCTTY), .mode = mode,
                           .resolve = RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd < 0 && errno == ENOSYS) fd = open(path, (int)how.flags, (mode_t)how.mode); /* gVisor has no openat2 */
    if (fd < 0) return -1;
    struct statfs fs;
    if (fstatfs(fd, &fs) == 0 && fs.f_type == PROC_MAGIC) {
        close(fd);
        errno = EACCES;
        return -1;
    }
    return fd;
}

/* The user whose rights count; only an agent that is root has to change anything. */
static uid_t owner_uid;
static gid_t owner_gid;
static int is_another; /* the effective ids are the user's, not only those for files */

static int as_user(const char *named) {
    char home[256];
    const char *name = named ? named : settings.user;
    owner_uid = geteuid();
    owner_gid = getegid();
    if (!name) return 0;
    int error = look_up_user(name, &owner_uid, &owner_gid, home, sizeof home);
    if (error && geteuid() != 0 && name == settings.user) return 0;
    if (error || owner_uid == geteuid()) return error;
    if (geteuid() != 0) return EPERM;
    setfsgid(owner_gid);
    setfsuid(owner_uid);
    if ((uid_t)setfsuid((uid_t)-1) == owner_uid) return 0;
    /* gVisor takes that call and does nothing; the saved id is still root's, so nobody inside may signal this */
    if (setresgid((gid_t)-1, owner_gid, (gid_t)-1) || setresuid((uid_t)-1, owner_uid, (uid_t)-1)) {
        error = errno;
        if (setresgid((gid_t)-1, 0, (gid_t)-1)) {}
        return error;
    }
    is_another = 1;
    return 0;
}

static void as_self(void) {
    if (is_another && (setresuid((uid_t)-1, 0, (uid_t)-1) || setresgid((gid_t)-1, 0, (gid_t)-1))) _exit(1);
    is_another = 0;
    if (geteuid() == 0) {
        setfsuid(0);
        setfsgid(0);
    }
}

static int parents(char *path) { /* makes what lies above the last part */
    for (char *p = path + 1; (p = strchr(p, '/')); p++) {
        *p = 0;
        int failed = mkdir(path, 0755) && errno != EEXIST && errno != EROFS && errno != EACCES;
        *p = '/';
        if (failed) return -1;
    }
    return 0;
}

static void put_stat(Buffer *b, const char *name, size_t name_size, const struct stat *s, const char *target) {
    static const struct { mode_t type; const char *name; } kinds[] = {
        {S_IFREG, "file"}, {S_IFDIR, "folder"}, {S_IFLNK, "link"}, {S_IFIFO, "fifo"}, {S_IFSOCK, "socket"},
        {S_IFCHR, "device"}, {S_IFBLK, "device"}};
    const char *kind = "other";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if ((s->st_mode & S_IFMT) == kinds[i].type) kind = kinds[i].name;
    field_bytes(b, F_PATH, name, name_size);
    field_text(b, F_KIND, kind);
    field_number(b, F_SIZE, (uint64_t)s->st_size);
    field_number(b, F_MODE, s->st_mode & 07777);
    field_number(b, F_MTIME_US, (uint64_t)s->st_mtim.tv_sec * 1000000u + (uint64_t)s->st_mtim.tv_nsec / 1000u);
    if (target) field_text(b, F_TARGET, target);
}

static int read_part(const char *path, Slice p, Buffer *b) {
    uint64_t offset = find_number(p, F_OFFSET, 0), limit = find_number(p, F_LIMIT, CHUNK_BYTES);
    if (limit > CHUNK_BYTES) limit = CHUNK_BYTES;
    int fd = open_safely(path, O_RDONLY, 0);
    struct stat s;
    if (fd < 0) return errno;
    if (fstat(fd, &s) || !S_ISREG(s.st_mode)) {
        int error = S_ISDIR(s.st_mode) ? EISDIR : EINVAL;
        close(fd);
        return error;
    }
    uint8_t *data = malloc(limit + 1);
    ssize_t n = pread(fd, data, limit, (off_t)offset);
    int error = n < 0 ? errno : 0;
    close(fd);
    if (!error) {
        field_bytes(b, F_DATA, data, (size_t)n);
        field_number(b, F_SIZE, (uint64_t)s.st_size);
    }
    free(data);
    return error;
}

static int write_all(int fd, Slice data, uint64_t offset, bool append) {
    while (data.size) {
        ssize_t n = append ? write(fd, data.data, data.size) : pwrite(fd, data.data, data.size, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno;
        data.data += n;
        data.size -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

/* A link is written through: the name that is replaced is that of the file it leads to. */
static int final_name(const char *path, char *out) {
    snprintf(out, 4096, "%s", path);
    for (int depth = 0; depth < 16; depth++) {
        char target[4096], joined[8300];
        ssize_t n = readlink(out, target, sizeof target - 1);
        if (n < 0) return 0;
        target[n] = 0;
        char *slash = strrchr(out, '/');
        int above = slash ? (int)(slash - out) : 0;
        if (*target == '/' || !slash) snprintf(joined, sizeof joined, "%s", target);
        else snprintf(joined, sizeof joined, "%.*s/%s", above, out, target);
        if (strlen(joined) >= 4096) return ENAMETOOLONG;
        strcpy(out, joined);
    }
    return ELOOP;
}

/* Chunks of one file carry the same token; the last one (F_DONE) puts the whole in its place. */
static int write_part(const char *path, Slice p) {
    char final[4096 + 64], temporary[4096 + 200], token[33] = "";
    Slice data = {0}, t;
    uint64_t offset = find_number(p, F_OFFSET, 0), mode = find_number(p, F_MODE, 0644);
    bool append = find_number(p, F_FLAGS, 0) & 1, make = find_number(p, F_FLAGS, 0) & 2, last = find_number(p, F_DONE, 1);
    if (strlen(path) >= 4096) return ENAMETOOLONG;
    int error = final_name(path, final);
    if (error) return error;
    find_bytes(p, F_DATA, &data);
    if (make && offset == 0) parents(final);
    struct stat s;
    int there = open_safely(final, O_PATH, 0);
    if (there < 0 && errno == EACCES) return EACCES;
    if (there >= 0) {
        fstat(there, &s);
        close(there);
        if (S_ISDIR(s.st_mode)) return EISDIR;
        if (!S_ISREG(s.st_mode)) return EINVAL;
    }
    if (append) {
        int fd = open_safely(final, O_WRONLY | O_CREAT | O_APPEND, mode & 0777);
        if (fd < 0) return errno;
        error = write_all(fd, data, 0, true);
        close(fd);
        return error;
    }
    if (find_bytes(p, F_TOKEN, &t) && t.size == 16) {
        for (size_t i = 0; i < 16; i++) snprintf(token + 2 * i, 3, "%02x", t.data[i]);
    } else {
        return EINVAL;
    }
    char *slash = strrchr(final, '/');
    int above = slash ? (int)(slash - final) + 1 : 0;
    snprintf(temporary, sizeof temporary, "%.*s.%s.part", above, final, token);
    int fd = open_safely(temporary, O_WRONLY | O_CREAT | (offset ? 0 : O_TRUNC) | O_NOFOLLOW, 0600);
    if (fd < 0) return errno;
    error = write_all(fd, data, offset, false);
    if (!error && last && fchmod(fd, mode & 0777)) error = errno;
    if (!error && last && find_number(p, F_FLAGS, 0) & 4 && fsync(fd)) error = errno;
    close(fd);
    if (!error && last && rename(temporary, final)) error = errno;
    if (error) unlink(temporary);
    return error;
}

static int stat_one(const char *path, bool follow, Buffer *b) {
    struct stat s;
    char target[4096];
    int fd = open_safely(path, O_PATH | (follow ? 0 : O_NOFOLLOW), 0);
    if (fd < 0) return errno;
    int error = fstat(fd, &s) ? errno : 0;
    ssize_t n = S_ISLNK(s.st_mode) ? readlinkat(fd, "", target, sizeof target - 1) : -1;
    close(fd);
    if (error) return error;
    if (n >= 0) target[n] = 0;
    put_stat(b, path, strlen(path), &s, n >= 0 ? target : NULL);
    return 0;
}

static bool list_into(int at, const char *prefix, int depth, Buffer *b, int *count) {
    DIR *d = fdopendir(at);
    if (!d) {
        close(at);
        return true;
    }
    bool whole = true;
    struct dirent *e;
    while (whole && (e = readdir(d))) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        struct stat s;
        char name[8192], target[4096];
        if (fstatat(dirfd(d), e->d_name, &s, AT_SYMLINK_NOFOLLOW)) continue;
        int size = snprintf(name, sizeof name, "%s%s%s", prefix, *prefix ? "/" : "", e->d_name);
        if (size < 0 || (size_t)size >= sizeof name) continue;
        if (++*count > MAX_LISTED || b->size > LIST_BYTES) {
            whole = false;
            break;
        }
        ssize_t n = S_ISLNK(s.st_mode) ? readlinkat(dirfd(d), e->d_name, target, sizeof target - 1) : -1;
        if (n >= 0) target[n] = 0;
        Buffer one = {0};
        put_stat(&one, name, (size_t)size, &s, n >= 0 ? target : NULL);
        field_bytes(b, F_ENTRY, one.data, one.size);
        buffer_free(&one);
        if (S_ISDIR(s.st_mode) && depth > 1) {
            int below = openat(dirfd(d), e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            if (below >= 0) whole = list_into(below, name, depth - 1, b, count);
        }
    }
    closedir(d);
    return whole;
}

static int list_folder(const char *path, int depth, Buffer *b) {
    int fd = open_safely(path, O_RDONLY | O_DIRECTORY, 0), count = 0;
    if (fd < 0) return errno;
    if (depth > MAX_DEPTH) depth = MAX_DEPTH; /* each level takes some of the stack, and who nests folders is the sandbox */
    if (!list_into(fd, "", depth, b, &count)) field_number(b, F_TRUNCATED, 1);
    return 0;
}

static int remove_at(int at, const char *name, int depth) {
    if (unlinkat(at, name, 0) == 0) return 0;
    if (errno != EISDIR && errno != EPERM) return errno;
    if (unlinkat(at, name, AT_REMOVEDIR) == 0) return 0;
    if (errno != ENOTEMPTY && errno != EEXIST) return errno;
    if (depth > 2000) return ELOOP;
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return errno;
    DIR *d = fdopendir(fd);
    int error = d ? 0 : errno;
    struct dirent *e;
    while (d && !error && (e = readdir(d)))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) error = remove_at(dirfd(d), e->d_name, depth + 1);
    if (d) closedir(d);
    if (error) return error;
    return unlinkat(at, name, AT_REMOVEDIR) ? errno : 0;
}

static int perform(uint8_t type, Slice p, Buffer *b) {
    char *path = find_text(p, F_PATH), *other = find_text(p, F_TARGET), *user = find_text(p, F_USER);
    int error = path && *path == '/' ? as_user(user) : EINVAL;
    if (!error) switch (type) {
    case FILE_READ: error = read_part(path, p, b); break;
    case FILE_WRITE: error = write_part(path, p); break;
    case FILE_STAT: error = stat_one(path, find_number(p, F_FLAGS, 1), b); break;
    case FILE_LIST: error = list_folder(path, (int)find_number(p, F_DEPTH, 1), b); break;
    case FILE_MKDIR: {
        struct stat s;
        parents(path);
        if (mkdir(path, find_number(p, F_MODE, 0755) & 0777)) error = errno;
        if (error == EEXIST && stat(path, &s) == 0 && S_ISDIR(s.st_mode)) error = 0;
        break;
    }
    case FILE_MOVE: error = !other || *other != '/' ? EINVAL : rename(path, other) ? errno : 0; break;
    case FILE_LINK: error = !other ? EINVAL : symlink(other, path) ? errno : 0; break;
    case FILE_REMOVE:
        if (find_number(p, F_FLAGS, 0) & 1) error = remove_at(AT_FDCWD, path, 0);
        else if (unlink(path)) error = errno == EISDIR || errno == EPERM ? (rmdir(path) ? errno : 0) : errno;
        break;
    default: error = ENOSYS;
    }
    as_self();
    free(path);
    free(other);
    free(user);
    return error;
}

static void reply(uint64_t request, int error, const Buffer *b) {
    if (error) send_error(request, error, strerror(error));
    else send_frame(OK, request, b);
}

typedef struct { Watch watch; bool used, orphaned; uint64_t request; Buffer result; pid_t pid; } Job;
static Job jobs[MAX_JOBS];

bool file_job_owns(pid_t pid) {
    for (int i = 0; i < MAX_JOBS; i++)
        if (jobs[i].used && jobs[i].pid == pid) return true;
    return false;
}

void file_jobs_detach(void) { /* the next client counts its requests anew: no answer of these is its */
    for (int i = 0; i < MAX_JOBS; i++) jobs[i].orphaned = true;
}

static bool in_child(Header *h, Slice p) {
    Job *job = NULL;
    for (int i = 0; i < MAX_JOBS && !job; i++)
        if (!jobs[i].used) job = &jobs[i];
    int ends[2];
    if (!job || pipe2(ends, O_CLOEXEC)) return false;
    pid_t pid = fork();
    if (pid == 0) {
        Buffer b = {0};
        forget_keys();
        int error = perform(h->type, p, &b);
        uint32_t code = (uint32_t)error;
        Slice parts[2] = {{(uint8_t *)&code, 4}, {b.data, error ? 0 : b.size}};
        for (int i = 0; i < 2; i++) write_all(ends[1], parts[i], 0, true);
        _exit(0);
    }
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return false;
    }
    *job = (Job){.used = true, .request = h->request, .pid = pid};
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    watch_add(&job->watch, ends[0], W_JOB, job, 0, EPOLLIN);
    return true;
}

void file_job_event(Watch *w, uint32_t events) {
    (void)events;
    Job *job = w->owner;
    uint8_t chunk[16 << 10];
    ssize_t n = read(w->fd, chunk, sizeof chunk);
    if (n > 0) {
        buffer_add(&job->result, chunk, (size_t)n);
        return;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    watch_remove(w);
    uint32_t code = EIO;
    if (job->result.size >= 4) {
        memcpy(&code, job->result.data, 4);
        buffer_drop(&job->result, 4);
    }
    if (!job->orphaned) reply(job->request, (int)code, &job->result);
    buffer_free(&job->result);
    job->used = false;
}

void file_request(Header *h, Slice p) {
    if ((h->type == FILE_LIST || h->type == FILE_REMOVE) && in_child(h, p)) return;
    Buffer b = {0};
    int error = perform(h->type, p, &b);
    reply(h->request, error, &b);
    buffer_free(&b);
}
