"""One way to get a logger; library code never prints."""

import logging
import os


def get(name: str) -> logging.Logger:
    """Logger under the `rorqual` tree. On ranks other than zero only warnings pass unless RORQUAL_LOG_ALL is set."""
    logger = logging.getLogger(name if name.startswith("rorqual") else f"rorqual.{name}")
    if os.environ.get("RANK", "0") != "0" and not os.environ.get("RORQUAL_LOG_ALL"):
        logger.setLevel(logging.WARNING)
    return logger
