"""P4 for PyTorch: invertible and orthogonal layers trained by property-preserving perturbations."""

from p4flows.builders import bent_stacked_flow, realnvp_flow
from p4flows.matrices import InvertibleMatrix, MergeBounds, PerturbedMatrix
from p4flows.merging import MergeHook
from p4flows.training import fit
from p4flows.transforms import BentIdentity, BentStack, P4InvTransform

__version__ = "0.1.0"

__all__ = [
    "BentIdentity",
    "BentStack",
    "InvertibleMatrix",
    "MergeBounds",
    "MergeHook",
    "P4InvTransform",
    "PerturbedMatrix",
    "bent_stacked_flow",
    "fit",
    "realnvp_flow",
]
