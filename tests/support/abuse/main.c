/* Chooses the part, and runs one attempt. */
#include "probe.h"
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>

static char *seen; /* shared with the children */

void note(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(seen, 400, format, list);
    va_end(list);
}

Verdict judged(long result) {
    if (result >= 0) return OPEN;
    note("%s", strerror(errno));
    return errno == ENOENT || errno == ENODEV || errno == ENXIO || errno == ENOSYS || errno == EAFNOSUPPORT ? ABSENT : SHUT;
}

void attempt(const char *name, Attempt try, const char *argument) {
    *seen = 0;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(5);
        _exit(try(argument));
    }
    int status = 0;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) {
        printf("%s\tbroken\tcould not fork: %s\n", name, strerror(errno));
        return;
    }
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : SHUT;
    if (WIFSIGNALED(status)) snprintf(seen, 400, "killed by signal %d", WTERMSIG(status));
    printf("%s\t%s\t%s\n", name, code == OPEN ? "open" : code == ABSENT ? "absent" : "shut", seen);
}

int main(int argc, char **argv) {
    const char *part = argc > 1 ? argv[1] : "";
    seen = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(part, "kernel")) kernel();
    else if (!strcmp(part, "network")) network(argc - 2, argv + 2);
    else if (!strcmp(part, "channel")) channel();
    else if (!strcmp(part, "storm")) storm();
    else if (!strcmp(part, "secret") && argc == 3) secret(argv[2]);
    else if (!strcmp(part, "walk") && argc > 3) walk(atof(argv[2]), argc - 3, argv + 3);
    else return load(argc, argv);
    return 0;
}
