/* Chooses the mode: `serve` inside a sandbox, `keep` on the host, `init` as pid 1 of a virtual machine. */
#include "agent.h"
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* serve --listen FD [--life FD] | serve --stdio: everything but the channel is closed before anything else happens. */
static int serve_arguments(int argc, char **argv) {
    int listen_fd = -1, life_fd = -1;
    if (argc == 4 && !strcmp(argv[2], "--listen")) listen_fd = atoi(argv[3]);
    else if (argc == 6 && !strcmp(argv[2], "--listen") && !strcmp(argv[4], "--life")) {
        listen_fd = atoi(argv[3]);
        life_fd = fcntl(atoi(argv[5]), F_DUPFD_CLOEXEC, 10);
    } else if (argc != 3 || strcmp(argv[2], "--stdio")) return 2;
    int in = -1, out = -1;
    if (listen_fd < 0) { /* only gVisor's agent has no socket */
        settings.keys_stay = true;
        if (getuid() == 0 && chown("/home/agent", 1000, 1000)) {} /* gVisor shows the host's own user as root */
        in = fcntl(0, F_DUPFD_CLOEXEC, 10);
        out = fcntl(1, F_DUPFD_CLOEXEC, 10);
    } else {
        listen_fd = fcntl(listen_fd, F_DUPFD_CLOEXEC, 10);
    }
    for (int fd = 0; fd < 256; fd++)
        if (fd != in && fd != out && fd != listen_fd && fd != life_fd) close(fd);
    syscall(SYS_close_range, 256u, 0x7fffffffu, 0);
    if (listen_fd >= 0) prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0); /* runc's child outlives runc otherwise */
    for (int fd = 0; fd < 3; fd++) open("/dev/null", O_RDWR);
    if (life_fd >= 0) live_while_open(life_fd);
    return serve(listen_fd, in, out);
}

int main(int argc, char **argv) {
    if (argc >= 2 && !strcmp(argv[1], "serve")) {
        int code = serve_arguments(argc, argv);
        if (code == 2) fprintf(stderr, "usage: agent serve --listen FD [--life FD] | agent serve --stdio\n");
        return code;
    }
    if (argc >= 2 && !strcmp(argv[1], "keep")) return keep(argc, argv);
#ifdef RORQUAL_GUEST_INIT
    if (getpid() == 1) return guest_init(argc, argv);
#endif
    fprintf(stderr, "usage: agent serve|keep ...\n");
    return 2;
}
