"""Giving way to the threads that wait for a token."""

import os
import time


def let_others_run() -> None:
    """Let threads that were just woken run before this one goes on.

    Where they share its processor, or want the interpreter while it computes in Python, they would otherwise see what
    was delivered only some milliseconds later.
    """
    if hasattr(os, "sched_yield"):
        os.sched_yield()  # which also lets go of the interpreter
    else:
        time.sleep(0)
