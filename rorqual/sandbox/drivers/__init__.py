"""One file a substrate; which of them work here is found out by running a command in each (`probe.py`)."""
