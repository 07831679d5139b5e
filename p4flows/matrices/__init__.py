"""Perturbed matrices: frozen, with a small trainable perturbation on top (paper, Section 2)."""

from p4flows.matrices.bounds import MergeBounds
from p4flows.matrices.error import MatrixError
from p4flows.matrices.invertible import InvertibleMatrix
from p4flows.matrices.merge import MergeOutcome
from p4flows.matrices.orthogonal import OrthogonalMatrix
from p4flows.matrices.perturbed import NotMergedWarning, PerturbedMatrix

__all__ = [
    "InvertibleMatrix",
    "MatrixError",
    "MergeBounds",
    "MergeOutcome",
    "NotMergedWarning",
    "OrthogonalMatrix",
    "PerturbedMatrix",
]
