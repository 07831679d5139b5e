"""What a library's loop leaves of a module with P4 layers."""

import pytest
import torch

from p4flows import P4InvTransform
from p4flows.matrices import PerturbedMatrix

# The libraries warn of their own affairs; what p4flows warns of stays an error.
LIBRARIES_WARN = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::p4flows.matrices.NotMergedWarning"),
]


def matrices(module):
    return [each for each in module.modules() if isinstance(each, PerturbedMatrix)]


def assert_right(module):
    """Inverses and log-determinants are those of the matrices."""
    assert matrices(module)
    for matrix in matrices(module):
        assert bool(matrix.error().is_right(matrix.size, matrix.frozen.dtype).all())


@torch.no_grad()
def assert_serves_its_own_map(module):
    """Log-determinants and inverses of P4Inv layers are those of the weights that they apply."""
    layers = [each for each in module.modules() if isinstance(each, P4InvTransform)]
    assert layers
    for layer in layers:
        weight = layer.weight().double()
        x = torch.randn(20, layer.features).to(layer.weight())
        outputs, logabsdet = layer(x)
        expected = x.double() @ weight.T + layer.bias.double()
        torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-5)
        exact = torch.linalg.slogdet(weight).logabsdet
        assert (logabsdet.double() - exact).abs().max() <= 1e-5
        back = torch.linalg.solve(weight, (outputs - layer.bias).double().T).T
        inverse, minus = layer.inverse(outputs)
        torch.testing.assert_close(inverse.double(), back, rtol=1e-5, atol=1e-5 * back.abs().max())
        assert (minus.double() + exact).abs().max() <= 1e-5


def assert_equal(module, other):
    """Bit by bit."""
    expected, found = module.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (value == found[name]).all(), name
