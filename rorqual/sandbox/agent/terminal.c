/* Keys of a terminal that send a signal (Ctrl-C, Ctrl-\, Ctrl-Z). gVisor's terminals send it and then leave the key in
 * the line that is being typed, where the next command would begin with it; so the agent types a correction after it. */
#include "agent.h"
#include <termios.h>

/* Adds what is typed to `input`; `corrected` where the kernel needs it. */
void terminal_type(int master, Buffer *input, Slice typed, bool corrected) {
    static const int KEYS[] = {VINTR, VQUIT, VSUSP};
    struct termios now;
    if (!corrected || tcgetattr(master, &now) || !(now.c_lflag & ISIG) || !(now.c_lflag & ICANON)) {
        buffer_add(input, typed.data, typed.size);
        return;
    }
    for (size_t i = 0; i < typed.size; i++) {
        buffer_add(input, typed.data + i, 1);
        for (size_t k = 0; k < sizeof KEYS / sizeof *KEYS; k++)
            if (now.c_cc[KEYS[k]] && typed.data[i] == now.c_cc[KEYS[k]]) buffer_add(input, &now.c_cc[VERASE], 1);
    }
}
