"""In which precision matrices are read: that of A, whatever rows or parameters or autocast are."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from p4flows.arguments import check_like

Method = TypeVar("Method", bound=Callable[..., Any])


def is_autocast(device: str) -> bool:
    """Whether `torch.autocast` is on; the meta device has none to ask about."""
    # The compiler of torch 2.4 cannot see into the former; what it compiles has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a matrix keeps A, A⁻¹ and ln|det A|: float32 at least.

    Args:
        dtype: of the module.

    Returns:
        A dtype.

    Example:
        >>> storage_dtype(torch.bfloat16), storage_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return dtype if torch.finfo(dtype).bits >= 32 else torch.float32


def without_autocast(method: Method) -> Method:
    """Make a method of a `PerturbedMatrix` compute as if autocast were off."""

    @functools.wraps(method)
    def exact(self: Any, *arguments: Any) -> Any:
        device = self.frozen.device.type
        if not is_autocast(device):
            return method(self, *arguments)
        with torch.autocast(device, enabled=False):
            return method(self, *arguments)

    return exact  # type: ignore[return-value]


def on_rows(method: Method) -> Method:
    """Make a map of rows compute in the dtype of A, and return rows in the dtype they came in.

    Rows of another dtype or device than the module's are refused by name. Under autocast any dtype
    is taken, and rows come back in that of the module. Log-determinants have that of ln|det A|.
    """

    @functools.wraps(method)
    def exact(self: Any, rows: Tensor, *bias: Tensor | None) -> Any:
        frozen = self.frozen
        autocast = is_autocast(frozen.device.type)
        # A map that another one calls gets rows that are converted already.
        dtypes = None if autocast else (self.u.dtype, frozen.dtype)
        check_like("inputs", rows, dtypes, frozen.device)
        dtype = self.u.dtype if autocast else rows.dtype
        if rows.dtype != frozen.dtype:
            rows = rows.to(frozen.dtype)
        wide = (b if b is None or b.dtype == frozen.dtype else b.to(frozen.dtype) for b in bias)
        if autocast:
            with torch.autocast(frozen.device.type, enabled=False):
                outputs = method(self, rows, *wide)
        else:
            outputs = method(self, rows, *wide)
        if dtype == frozen.dtype:
            return outputs
        if isinstance(outputs, tuple):
            return outputs[0].to(dtype), outputs[1]
        return outputs.to(dtype)

    return exact  # type: ignore[return-value]
