"""P4 for PyTorch: invertible and orthogonal layers trained by property-preserving perturbations."""

import importlib
from typing import TYPE_CHECKING, Any

from p4flows.diagnosis import diagnose
from p4flows.matrices import InvertibleMatrix, MergeBounds, OrthogonalMatrix
from p4flows.merging.average import AveragedModel
from p4flows.merging.hook import MergeHook
from p4flows.parametrize import invertible, orthogonal

if TYPE_CHECKING:
    from p4flows.flows.conversion import plain, swap_linear
    from p4flows.flows.paper import bent_stacked_flow, realnvp_flow
    from p4flows.flows.spline import spline_flow
    from p4flows.transforms import (
        BentIdentity,
        BentStack,
        P4InvTransform,
        P4OneByOneConvolution,
        P4OrthogonalTransform,
    )

__version__ = "0.1.0"

__all__ = [
    "AveragedModel",
    "BentIdentity",
    "BentStack",
    "InvertibleMatrix",
    "MergeBounds",
    "MergeHook",
    "OrthogonalMatrix",
    "P4InvTransform",
    "P4OneByOneConvolution",
    "P4OrthogonalTransform",
    "bent_stacked_flow",
    "diagnose",
    "invertible",
    "orthogonal",
    "plain",
    "realnvp_flow",
    "spline_flow",
    "swap_linear",
]

# Imported when they are first asked for: they need nflows, which brings tensorboard and matplotlib
# along, and a weight of an nn.Linear does not.
_NEED_NFLOWS = {
    "flows.conversion": ("plain", "swap_linear"),
    "flows.paper": ("bent_stacked_flow", "realnvp_flow"),
    "flows.spline": ("spline_flow",),
    "transforms": (
        "BentIdentity",
        "BentStack",
        "P4InvTransform",
        "P4OneByOneConvolution",
        "P4OrthogonalTransform",
    ),
}
_HOMES = {name: home for home, names in _NEED_NFLOWS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
