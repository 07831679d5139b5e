"""P4 for PyTorch: invertible and orthogonal layers trained by property-preserving perturbations."""

from p4flows.attaching import NotMergedWarning
from p4flows.averaging import AveragedModel, ElementwiseAverageWarning
from p4flows.builders import bent_stacked_flow, realnvp_flow, spline_flow
from p4flows.conversion import plain, swap_linear
from p4flows.diagnosis import diagnose
from p4flows.matrices import InvertibleMatrix, MergeBounds, OrthogonalMatrix, PerturbedMatrix
from p4flows.merging import MergeHook
from p4flows.parametrize import invertible, orthogonal
from p4flows.training import fit
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
    "ElementwiseAverageWarning",
    "InvertibleMatrix",
    "MergeBounds",
    "MergeHook",
    "NotMergedWarning",
    "OrthogonalMatrix",
    "P4InvTransform",
    "P4OneByOneConvolution",
    "P4OrthogonalTransform",
    "PerturbedMatrix",
    "bent_stacked_flow",
    "diagnose",
    "fit",
    "invertible",
    "orthogonal",
    "plain",
    "realnvp_flow",
    "spline_flow",
    "swap_linear",
]
