"""PVM: KVM's interface without virtualization in the processor, for guests whose kernel was built for it.

Its /dev/kvm opens and answers as any, but a stock kernel never leaves early boot on it. Source: the patches for Linux
("KVM: x86/PVM: Introduce a new hypervisor", February 2024).
"""

from pathlib import Path

REASON = "this /dev/kvm is PVM's: it runs only kernels built for it, not a stock one"


def is_pvm(root: Path = Path("/")) -> bool:
    """Whether this machine's KVM is PVM's: its module is there, and the processor offers no virtualization.

    It says why a guest did not boot; whether one boots is found out by booting one.
    """
    if not (root / "sys/module/kvm_pvm").exists():
        return False
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    return not flags & {"vmx", "svm"}
