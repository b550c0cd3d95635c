/* Preloaded into QEMU before 8.2, which opens the file behind a machine's memory for writing even where it maps it
 * privately. Machines of one shape share such a file (vm/share.py), so none may be able to write to it: opened by its
 * name, it is opened for reading. Everything else is opened as asked. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef open
#undef open64

static int opened(const char *path, int flags, unsigned mode) {
    const char *slash = strrchr(path, '/');
    if (!strcmp(slash ? slash + 1 : path, "template-memory")) flags = O_RDONLY | (flags & O_CLOEXEC);
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static unsigned mode_of(int flags, va_list words) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(words, unsigned) : 0;
}

#define OPEN(name)                                       \
    int name(const char *path, int flags, ...) {         \
        va_list words;                                   \
        va_start(words, flags);                          \
        unsigned mode = mode_of(flags, words);           \
        va_end(words);                                   \
        return opened(path, flags, mode);                \
    }                                                    \
    int name##_checked(const char *path, int flags) __asm__("__" #name "_2"); \
    int name##_checked(const char *path, int flags) { return opened(path, flags, 0); }

OPEN(open)
OPEN(open64)
