"""Layers that move data: nflows Transforms, each `(inputs, context) → (outputs, logabsdet)`."""

from p4flows.transforms.bent import BentIdentity
from p4flows.transforms.bent_stack import BentStack
from p4flows.transforms.coupling import AffineCoupling
from p4flows.transforms.linear import P4InvTransform, P4OrthogonalTransform

__all__ = ["AffineCoupling", "BentIdentity", "BentStack", "P4InvTransform", "P4OrthogonalTransform"]
