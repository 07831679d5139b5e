"""Time: when matrices merge, and what a merge leaves in the optimizer."""

from p4flows.merging.average import AveragedModel
from p4flows.merging.hook import MergeHook

__all__ = ["AveragedModel", "MergeHook"]
