/* The writable layer as a tar stream (POSIX pax), for a disk snapshot. overlayfs's marks become OCI's: a character device
 * 0:0 is an empty file `.wh.NAME`, an opaque folder has `.wh..wh..opq` in it. Walks by descriptors, follows no link.
 */
#include "agent.h"

#ifdef RORQUAL_GUEST_INIT
#include "vm_init.h"
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { BLOCK = 512, PIECE = 32 << 10, DEEPEST = 256, MAX_PATH = 4096, MAX_LINKS = 65536 };

static uint8_t piece[PIECE];
static size_t held;
static bool failed;
static struct { ino_t inode; char *path; } links[MAX_LINKS];
static int link_count;

static void send_piece(void) {
    uint32_t length = (uint32_t)held;
    control_write(&length, sizeof length);
    control_write(piece, held);
    held = 0;
}

static void put(const void *data, size_t size) {
    const uint8_t *p = data;
    while (size) {
        size_t take = size < PIECE - held ? size : PIECE - held;
        memcpy(piece + held, p, take);
        held += take;
        p += take;
        size -= take;
        if (held == PIECE) send_piece();
    }
}

static void pad(uint64_t size) {
    static const uint8_t zeros[BLOCK];
    if (size % BLOCK) put(zeros, BLOCK - size % BLOCK);
}

static void header(const char *name, char type, const struct stat *s, uint64_t size, const char *target) {
    uint8_t h[BLOCK] = {0};
    char *text = (char *)h;
    snprintf(text, 100, "%s", name);
    snprintf(text + 100, 8, "%07o", (unsigned)(s->st_mode & 07777));
    snprintf(text + 108, 8, "%07o", (unsigned)(s->st_uid & 07777777));
    snprintf(text + 116, 8, "%07o", (unsigned)(s->st_gid & 07777777));
    snprintf(text + 124, 12, "%011llo", (unsigned long long)(size & 077777777777));
    snprintf(text + 136, 12, "%011llo", (unsigned long long)s->st_mtim.tv_sec & 077777777777);
    memset(text + 148, ' ', 8);
    text[156] = type;
    if (target) snprintf(text + 157, 100, "%s", target);
    memcpy(text + 257, "ustar\00000", 8);
    unsigned sum = 0;
    for (int i = 0; i < BLOCK; i++) sum += h[i];
    snprintf(text + 148, 8, "%06o", sum);
    put(h, BLOCK);
}

static void record(Buffer *b, const char *key, const void *value, size_t size) {
    size_t body = strlen(key) + size + 3, total = body + 1; /* " key=value\n" and its own length in front */
    char number[24];
    while ((size_t)snprintf(number, sizeof number, "%zu", total) + body != total) total = (size_t)strlen(number) + body;
    buffer_add(b, number, strlen(number));
    buffer_add(b, " ", 1);
    buffer_add(b, key, strlen(key));
    buffer_add(b, "=", 1);
    buffer_add(b, value, size);
    buffer_add(b, "\n", 1);
}

static void attributes(Buffer *b, int fd) {
    char names[4096], key[300], value[4096];
    char place[40];
    snprintf(place, sizeof place, "/proc/self/fd/%d", fd);
    ssize_t n = listxattr(place, names, sizeof names);
    for (ssize_t at = 0; at < n; at += (ssize_t)strlen(names + at) + 1) {
        if (strncmp(names + at, "user.", 5) || !strncmp(names + at, "user.overlay.", 13)) continue;
        if (strlen(names + at) > NAME_MAX) continue;
        ssize_t size = getxattr(place, names + at, value, sizeof value);
        if (size < 0) continue;
        snprintf(key, sizeof key, "SCHILY.xattr.%s", names + at);
        record(b, key, value, (size_t)size);
    }
}

/* What the old header has no room for goes before it: long names, whole ids and sizes, nanoseconds, attributes. */
static void entry(const char *name, char type, int fd, const struct stat *s, uint64_t size, const char *target) {
    Buffer b = {0};
    char text[60];
    record(&b, "path", name, strlen(name));
    if (target) record(&b, "linkpath", target, strlen(target));
    snprintf(text, sizeof text, "%lld.%09ld", (long long)s->st_mtim.tv_sec, s->st_mtim.tv_nsec);
    record(&b, "mtime", text, strlen(text));
    snprintf(text, sizeof text, "%u", s->st_uid);
    record(&b, "uid", text, strlen(text));
    snprintf(text, sizeof text, "%u", s->st_gid);
    record(&b, "gid", text, strlen(text));
    snprintf(text, sizeof text, "%llu", (unsigned long long)size);
    record(&b, "size", text, strlen(text));
    if (fd >= 0 && (type == '0' || type == '5')) attributes(&b, fd);
    header("pax", 'x', &(struct stat){.st_mode = 0644}, b.size, NULL);
    put(b.data, b.size);
    pad(b.size);
    buffer_free(&b);
    header(name, type, s, size, target);
}

static const char *earlier_link(const struct stat *s, const char *name) {
    for (int i = 0; i < link_count; i++)
        if (links[i].inode == s->st_ino) return links[i].path;
    if (link_count < MAX_LINKS) {
        links[link_count].inode = s->st_ino;
        links[link_count++].path = strdup(name);
    } else {
        failed = true;
    }
    return NULL;
}

static void content(int fd, uint64_t size) {
    static uint8_t chunk[64 << 10];
    uint64_t left = size;
    while (left) {
        ssize_t n = read(fd, chunk, left < sizeof chunk ? left : sizeof chunk);
        if (n <= 0) break;
        put(chunk, (size_t)n);
        left -= (uint64_t)n;
    }
    if (left) failed = true; /* it shrank: nothing may run meanwhile */
    memset(chunk, 0, sizeof chunk);
    while (left) {
        size_t n = left < sizeof chunk ? left : sizeof chunk;
        put(chunk, n);
        left -= n;
    }
    pad(size);
}

static void walk(int folder, char *path, size_t length, int depth);

static void mark(char *path, size_t length, const char *name) { /* an empty file that stands for a deletion */
    struct stat none = {.st_mode = 0};
    char kept[NAME_MAX + 8];
    snprintf(kept, sizeof kept, "%s", path + length);
    if (length + strlen(name) + 1 > MAX_PATH) failed = true;
    else {
        strcpy(path + length, name);
        entry(path, '0', -1, &none, 0, NULL);
    }
    strcpy(path + length, kept);
}

static bool is_opaque(int fd) {
    char place[40], value[2];
    snprintf(place, sizeof place, "/proc/self/fd/%d", fd);
    return getxattr(place, "user.overlay.opaque", value, sizeof value) == 1 && value[0] == 'y';
}

static void one(int folder, const char *name, char *path, size_t length, int depth) {
    struct stat s;
    size_t size = strlen(name);
    if (length + size + 2 > MAX_PATH || depth > DEEPEST) {
        failed = true;
        return;
    }
    memcpy(path + length, name, size + 1);
    int fd = openat(folder, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &s)) {
        failed = true;
        if (fd >= 0) close(fd);
        return;
    }
    const char *other = !S_ISDIR(s.st_mode) && s.st_nlink > 1 && !S_ISCHR(s.st_mode) ? earlier_link(&s, path) : NULL;
    if (other) {
        entry(path, '1', fd, &s, 0, other);
    } else if (S_ISDIR(s.st_mode)) {
        int inside = openat(folder, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        entry(path, '5', fd, &s, 0, NULL);
        path[length + size] = '/';
        path[length + size + 1] = 0;
        if (is_opaque(fd)) mark(path, length + size + 1, ".wh..wh..opq");
        if (inside >= 0) walk(inside, path, length + size + 1, depth + 1);
        else failed = true;
    } else if (S_ISREG(s.st_mode)) {
        int file = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NOATIME);
        entry(path, '0', fd, &s, (uint64_t)s.st_size, NULL);
        content(file, (uint64_t)s.st_size);
        if (file >= 0) close(file);
    } else if (S_ISLNK(s.st_mode)) {
        char target[MAX_PATH];
        ssize_t n = readlinkat(fd, "", target, sizeof target - 1);
        target[n < 0 ? 0 : n] = 0;
        entry(path, '2', fd, &s, 0, target);
    } else if (S_ISFIFO(s.st_mode)) {
        entry(path, '6', fd, &s, 0, NULL);
    } else if (S_ISCHR(s.st_mode) && s.st_rdev == 0) {
        char mark_name[NAME_MAX + 8];
        snprintf(mark_name, sizeof mark_name, ".wh.%s", name);
        mark(path, length, mark_name);
    }
    close(fd);
}

static void walk(int folder, char *path, size_t length, int depth) { /* closes it */
    DIR *all = fdopendir(folder);
    struct dirent *e;
    if (!all) {
        failed = true;
        close(folder);
        return;
    }
    while ((e = readdir(all)))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) one(folder, e->d_name, path, length, depth);
    closedir(all);
}

bool write_tar(const char *folder) {
    static char path[MAX_PATH + 2];
    static const uint8_t end[2 * BLOCK];
    held = 0;
    failed = false;
    link_count = 0;
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) failed = true;
    else walk(fd, path, 0, 0);
    for (int i = 0; i < link_count; i++) free(links[i].path);
    put(end, sizeof end);
    if (held) send_piece();
    send_piece(); /* an empty piece: the end */
    control_write(failed ? "error\n" : "ok\n", failed ? 6 : 3);
    return !failed;
}
#endif
