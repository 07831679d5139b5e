"""In which precision matrices are read: that of A, whatever rows, parameters or autocast are."""

import contextlib

import torch
from torch import Tensor


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a matrix keeps A, A⁻¹ and ln|det A|: float32 at least."""
    return dtype if torch.finfo(dtype).bits >= 32 else torch.float32


def is_autocast(device: str) -> bool:
    """Whether `torch.autocast` is on for a type of device."""
    # The meta device has none to ask about, and the compiler of torch 2.4 cannot ask.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast is off."""
    if is_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def dtype_of_outputs(rows: Tensor, module: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a layer returns rows, all of it computed in `storage_dtype(module)`.

    Rows of fewer digits than the layer are promoted, as torch does. Under autocast rows of any
    dtype come back in that of the layer.
    """
    if rows.device != device:
        raise ValueError(
            f"inputs must be on {device} as the layer is, got {rows.device}: use .to()"
        )
    if is_autocast(device.type):
        return module
    dtype = torch.promote_types(rows.dtype, module)
    if torch.promote_types(dtype, storage_dtype(module)) != storage_dtype(module):
        raise TypeError(f"inputs must be {module} as the layer is, got {rows.dtype}: use .to()")
    return dtype
