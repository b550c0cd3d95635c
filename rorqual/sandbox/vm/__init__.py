"""Virtual machines: what a guest boots from, how the machine monitor is started and spoken to, and its snapshots.

`drivers/qemu.py` and `drivers/firecracker.py` are made of these parts.
"""
