"""Layers that move data: nflows Transforms, each `(inputs, context) → (outputs, logabsdet)`."""

from p4flows.transforms.bent import BentIdentity
from p4flows.transforms.bent_stack import BentStack
from p4flows.transforms.columns import ColumnsTransform
from p4flows.transforms.convolution import P4OneByOneConvolution
from p4flows.transforms.coupling import AffineCoupling
from p4flows.transforms.linear import P4InvTransform, P4OrthogonalTransform
from p4flows.transforms.spline_coupling import SplineCoupling

__all__ = [
    "AffineCoupling",
    "BentIdentity",
    "BentStack",
    "ColumnsTransform",
    "P4InvTransform",
    "P4OneByOneConvolution",
    "P4OrthogonalTransform",
    "SplineCoupling",
]
