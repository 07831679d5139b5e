"""What a library's loop leaves of a module with P4 layers."""

import pytest
from p4flows.merging.attaching import driver_of

from p4flows.matrices import PerturbedMatrix

# The libraries warn of their own affairs; what p4flows warns of stays an error.
LIBRARIES_WARN = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::p4flows.matrices.NotMergedWarning"),
]


def matrices(module):
    return [each for each in module.modules() if isinstance(each, PerturbedMatrix)]


def hook_of(module):
    """The one hook that merges all of them."""
    (hook,) = {driver_of(matrix) for matrix in matrices(module)}
    return hook


def assert_right(module):
    """Inverses and log-determinants are those of the matrices."""
    assert matrices(module)
    for matrix in matrices(module):
        assert bool(matrix.error().is_right(matrix.size, matrix.frozen.dtype).all())


def assert_equal(module, other):
    """Bit by bit."""
    expected, found = module.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (value == found[name]).all(), name
