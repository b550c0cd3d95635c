/* A hostile program: tries what sandboxed code has tried, and says for each attempt how it went.
 *
 *   probe kernel                 S1, S11: system calls, devices, kernel files      (kernel.c)
 *   probe network ADDRESS...     S6: interfaces, and tcp:IP:PORT, unix:PATH, abstract:NAME, udp:IP:PORT   (reach.c)
 *   probe channel                S7: descriptors, sockets and ports that lead to the agent               (reach.c)
 *   probe secret MASKED          S9: a text (hex, every byte xor 0x5a) in environments, command lines, files (reach.c)
 *   probe storm                  S7: stops whatever is begun after it, for ever                             (reach.c)
 *   probe walk SECONDS PATH...   reads everything below the paths, as a recursive grep does              (reach.c)
 *   probe forks|memory|disk|inodes|descriptors|count ... S2: see load.c
 *
 * A line of output is NAME, TAB, "open" (it worked: a breach), "shut" (refused) or "absent" (there is no such thing
 * here), TAB, what was seen. Every attempt runs in a child of its own with a time limit. Nothing here harms a machine on
 * which an attempt succeeds: what is opened is closed, what is written is what was there.
 */
#ifndef PROBE_H
#define PROBE_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

typedef enum { OPEN = 10, SHUT, ABSENT } Verdict;
typedef Verdict (*Attempt)(const char *argument);
void attempt(const char *name, Attempt try, const char *argument);
void note(const char *format, ...) __attribute__((format(printf, 1, 2))); /* what was seen, in an attempt */
Verdict judged(long result);                                              /* by the result of a call and errno */

void kernel(void);
void network(int count, char **addresses);
void channel(void);
void secret(const char *masked);
void storm(void) __attribute__((noreturn));
void walk(double seconds, int count, char **paths);
int load(int argc, char **argv);
#endif
