"""Where a run computes: checked before anything is read, so that a wrong word costs no waiting."""

import torch

from rorqual.errors import ConfigError
from rorqual.ops.device import accelerator
from rorqual.parallel.launch import is_joined_from_outside, local_world


def check_device(name: str, processes: int) -> torch.device:
    """The device called `name` (`cpu`, or an accelerator by torch's name, with or without an index).

    Raises: ConfigError when there is no such device here, or fewer accelerators than processes on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"run.device is {name!r}, which torch does not know as a device ({reason}). {_choice()}"
        ) from None
    if device.type == "cpu":
        return device
    here = accelerator()
    count = torch.accelerator.device_count() if here is not None else 0
    if here is None or here.type != device.type or (device.index or 0) >= count:
        found = "none" if here is None else f"{count} of type {here.type}"
        raise ConfigError(
            f"run.device is {name!r}, but of accelerators this torch finds {found}, so nothing could be computed "
            f"there. {_choice()}"
        )
    here_processes = local_world() if is_joined_from_outside() else processes
    if here_processes > count:
        raise ConfigError(
            f"{here_processes} processes are to share {count} of {device.type!r} on this machine; each needs its own. "
            f"Use at most {count} processes (--nproc), or run.device=cpu."
        )
    if here_processes > 1 and device.index is not None:
        raise ConfigError(
            f"run.device is {name!r} for {here_processes} processes, which cannot all have that one. "
            f"Set run.device={device.type}; each process takes the one of its own number."
        )
    return device


def _choice() -> str:
    here = accelerator()
    return "Set run.device=cpu" + (f" or run.device={here.type}." if here is not None else ".")
