"""Check that the processes of a run have their devices, before any of them is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.launcher.base.errors import SpecError

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

_CPU = "set launch.device=cpu to train on the CPU"


def check_device(spec: Spec) -> None:
    """Raise SpecError if this host lacks the CUDA devices that its processes need.

    Each process of a host takes the device of its number. Nothing is checked if `launch.env` chooses the devices,
    because this process does not see them.
    """
    wanted, launch = spec.launch.device, spec.launch
    if wanted == "cpu" or "CUDA_VISIBLE_DEVICES" in launch.env:
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count >= launch.processes or (count == 0 and wanted == "auto"):
        return
    if count == 0:
        reason = "no device is visible" if torch.version.cuda else "torch is built without CUDA"
        raise SpecError(
            f"launch.device: cuda is not available on this host ({reason}); {_CPU}, or start the run on a host with "
            "GPUs (`headway doctor` shows what is found)"
        )
    raise SpecError(
        f"launch.processes: {launch.processes} processes need a CUDA device each, and this host has {count}; use at "
        f"most {count}, or {_CPU}"
    )
