"""What several processes that train or score together need besides Lightning."""

from __future__ import annotations

import atexit

import torch.distributed


def leave_group_at_exit() -> None:
    """Has this process leave its group before the interpreter ends, if it belongs to one; call it as often as you like.

    Lightning does it for the backend nccl alone. The threads of gloo, the CPU's, hold tensors for a moment after a
    collective operation; one that lets go of them while the interpreter is ending aborts the process, so that now and
    then a run that succeeded has an exit status that says it did not.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
