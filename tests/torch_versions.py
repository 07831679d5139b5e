"""What the older of the supported versions of torch cannot do."""

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def compiles_stacks():
    """Skip what compiles a BentStack, whose context manager dynamo does not look into before."""
    if TORCH < (2, 10):
        pytest.skip("a BentStack is compiled in one graph from torch 2.10 on")


def can_fail_on_recompile():
    if TORCH < (2, 6):
        pytest.skip("torch before 2.6 cannot be told to fail where it would recompile")
