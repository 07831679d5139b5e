"""What pytest does not collect by itself, and a seed for each test, whatever ran before it."""

import importlib.util

import pytest
import torch

# Cannot be imported without bgflow; tests/test_bgflow.py runs its doctests where bgflow is there.
collect_ignore = ["p4flows/bgflow.py"]
# Nor these without their hosts.
collect_ignore += [
    f"p4flows/{host.lower()}.py"
    for host in ("zuko", "FrEIA", "lightning", "nessai")
    if importlib.util.find_spec(host) is None
]
# Nor this without the extra `molecules`, whose absence the tests report as skipped.
if any(importlib.util.find_spec(name) is None for name in ("openmm", "openmmtools", "mdtraj")):
    collect_ignore.append("p4flows/molecules")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Matrices draw their seeds from torch's global state, which no other test shall decide."""
    torch.manual_seed(0)
