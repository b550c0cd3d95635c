/* What the parts of pid 1 of a virtual machine share. */
#ifndef RORQUAL_VM_INIT_H
#define RORQUAL_VM_INIT_H
#include "agent.h"

#define UPPER "/upper/files"

/* ---- vm_control.c ---- */
int control_loop(int port, bool listening, pid_t agent, int children); /* until the agent ends; its wait status */
void control_write(const void *data, size_t size);     /* to the host; waits while the port is full */

/* ---- vm_tar.c ---- */
bool write_tar(const char *folder); /* through control_write, in pieces */

#endif
