"""A pretended accelerator ``gpu:0``: tensors that lie on the CPU and say that they do not.

Every mix of devices is an error, as on a real one; as on Apple's, so is float64. Importing it changes PyTorch for the
whole process: scripts that tests run in a process of their own import it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.accelerators import MPSAccelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")
DEVICE = torch.device("gpu:0")
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
_library = torch.library.Library("_", "IMPL")
_library.fallback(torch.library.fallthrough_kernel, dispatch_key="AutocastPrivateUse1")

_INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")
_COPIES = ("aten::_to_copy", "aten::copy_")


class OnDevice(torch.Tensor):
    """A tensor on the pretended device."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=DEVICE,
        )

    def __init__(self, elem: torch.Tensor) -> None:
        self.elem = elem

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.elem.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    base = func.name().split(".")[0]
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    ours = any(isinstance(tensor, OnDevice) for tensor in tensors)
    device = kwargs.get("device")
    if base in _COPIES:
        target = torch.device(device or args[0].device).type == "gpu"
    else:
        elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
        indexed = base in _INDEXING and not any(tensor is args[0] for tensor in elsewhere)
        if ours and elsewhere and not indexed:
            raise MixedDevicesError(f"{base}: tensors of two devices, {[tuple(t.shape) for t in elsewhere]} on the CPU")
        target = ours if device is None else torch.device(device).type == "gpu"
    generator = kwargs.get("generator")
    if generator is not None and target and generator.device.type == "cpu":
        raise MixedDevicesError(f"{base}: a generator of the CPU for a tensor of the device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def unwrapped(value: Any) -> Any:
        return value.elem if isinstance(value, OnDevice) else value

    plain_args, plain_kwargs = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
    out = func(*plain_args, **plain_kwargs)
    if base == "aten::_to_copy" and any(out is value for value in tree_flatten(plain_args)[0]):
        out = out.clone()
    if not target:
        return out

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.float64:
            raise TypeError(f"{base}: this device has no float64")
        given = [tensor for tensor in tensors if unwrapped(tensor) is value]  # of an operation in place
        return given[0] if given else OnDevice(value)

    return tree_map(wrapped, out)


class Pretend(TorchDispatchMode):
    """Also catches operations that make tensors, such as ``torch.zeros(..., device=DEVICE)``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_tensor: Callable[..., torch.Tensor] = torch.tensor


def _tensor_on(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    on_device = device is not None and torch.device(device).type == "gpu"
    return _tensor(data, **options).to(device) if on_device else _tensor(data, device=device, **options)


torch.tensor = _tensor_on  # type: ignore[assignment]
torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()  # type: ignore[misc, assignment]


class PretendedAccelerator(MPSAccelerator):  # Lightning places other ones on the CPU
    """What Lightning's Trainer takes."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretended"
