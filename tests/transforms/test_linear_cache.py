"""nflows' cache of a linear layer as a state machine: whatever happens, it is never stale."""

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode

from p4flows import MergeHook, P4InvTransform
from transforms.registry import move, perturb


class CachedLayer(RuleBasedStateMachine):
    """All that users do to a layer, in any order; after each, the layer equals its own matrix."""

    @initialize()
    def build(self):
        torch.manual_seed(0)
        self.layer = P4InvTransform(4, rank=2, using_cache=True).eval()
        move(self.layer)

    @invariant()
    def agrees_with_its_matrix(self):
        layer = self.layer
        with torch.no_grad():
            weight, bias = layer.matrix.dense(), layer.bias
            x = torch.randn(3, 4, dtype=bias.dtype)
            outputs, logabsdet = layer(x)
            expected = torch.linalg.slogdet(weight).logabsdet.expand(3)
            torch.testing.assert_close(outputs, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logabsdet, expected, rtol=1e-3, atol=1e-3)
            restored, logabsdet = layer.inverse(outputs)
            torch.testing.assert_close(restored, x, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(logabsdet, -expected, rtol=1e-3, atol=1e-3)

    @rule()
    def merge(self):
        self.layer.matrix.merge()

    @rule()
    def correct(self):
        self.layer.matrix.correct()

    @rule()
    def reset(self):
        self.layer.matrix.reset()

    @rule()
    def write(self):
        # By a fixed factor, because repeated random steps would wander into singular matrices.
        with torch.no_grad():
            self.layer.matrix.u.mul_(-0.9)

    @rule()
    def step(self):
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.01)
        outputs, logabsdet = self.layer(torch.ones(1, 4, dtype=self.layer.bias.dtype))
        (outputs.square().mean() - logabsdet.mean()).backward()
        optimizer.step()

    @rule()
    def replace(self):
        vector = parameters_to_vector(self.layer.parameters())
        vector_to_parameters(vector * -0.9, self.layer.parameters())
        self.layer.cache.invalidate()  # it writes through `.data`

    @rule()
    def load(self):
        self.layer.load_state_dict(MOVED.state_dict())

    @rule()
    def load_by_assignment(self):
        state = {name: value.clone() for name, value in MOVED.state_dict().items()}
        dtype = self.layer.bias.dtype
        self.layer.load_state_dict(state, assign=True)
        self.layer.to(dtype)

    @rule()
    def to_float32(self):
        self.layer.float()

    @rule()
    def to_float64(self):
        self.layer.double()

    @rule()
    def train(self):
        self.layer.train()

    @rule()
    def eval(self):
        self.layer.eval()

    @rule()
    def switch_cache(self):
        self.layer.use_cache(not self.layer.using_cache)

    @rule()
    def copy(self):
        self.layer = copy.deepcopy(self.layer)

    @rule()
    def pickle(self):
        self.layer = pickle.loads(pickle.dumps(self.layer))

    @rule()
    def read_in_inference_mode(self):
        with torch.inference_mode():
            self.layer(torch.ones(1, 4, dtype=self.layer.bias.dtype))


torch.manual_seed(1)
MOVED = P4InvTransform(4, rank=2)
move(MOVED)

TestCachedLayer = CachedLayer.TestCase
TestCachedLayer.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True
)


class Products(TorchDispatchMode):
    """Counts matrix products, whatever their size."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_cached_pass_is_one_product(direction):
    layer = P4InvTransform(4, using_cache=True).eval()
    move(layer)
    x = torch.randn(3, 4)
    with torch.no_grad():
        getattr(layer, direction)(x)
        with Products() as products:
            getattr(layer, direction)(x)
    assert products.count == 1


def test_cache_is_off_where_gradients_are_wanted():
    layer = P4InvTransform(4, using_cache=True).eval()
    move(layer)
    x = torch.randn(3, 4)
    with torch.no_grad():
        layer(x)
    layer(x)[0].sum().backward()
    assert layer.matrix.u.grad.any() and layer.bias.grad.any()


def test_a_hook_that_merges_is_noticed():
    layer = P4InvTransform(4, using_cache=True).double().eval()
    move(layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    MergeHook(layer, optimizer, every=1)
    x = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(5):
        with torch.no_grad():
            torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)
        layer(x)[0].square().sum().backward()
        optimizer.step()


@torch.no_grad()
def test_a_replacement_at_the_address_of_the_cached_tensor_is_noticed():
    layer = P4InvTransform(40, using_cache=True).eval()
    move(layer)
    matrix, x = layer.matrix, torch.randn(3, 40)
    # The allocator likes to hand out again what the first replacement has freed.
    for _ in range(50):
        layer(x)
        matrix.u.data = matrix.u * 2.0
        matrix.u.data = matrix.u * -0.4
        torch.testing.assert_close(layer(x)[0], F.linear(x, layer.weight(), layer.bias))


@torch.no_grad()
def test_a_correction_is_noticed():
    layer = P4InvTransform(4, using_cache=True).double().eval()
    move(layer)
    x = torch.randn(3, 4, dtype=torch.float64)
    layer.inverse(layer(x)[0])
    layer.matrix.inverse_frozen.mul_(1.01)
    assert not torch.allclose(layer.inverse(layer(x)[0])[0], x)
    layer.matrix.correct()
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


def test_what_was_cached_in_inference_mode_is_not_used_outside_of_it():
    layer = P4InvTransform(4, using_cache=True).eval().requires_grad_(False)
    move(layer)
    x = torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x)[0].sum().backward()
    torch.testing.assert_close(x.grad, layer.weight().sum(0).expand(3, 4))


def test_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        layer = P4InvTransform(3, using_cache=True).eval()
        before = layer(torch.ones(1, 3))[0]
        perturb(layer)
        outputs = layer(torch.ones(1, 3))[0]
        assert not torch.allclose(outputs, before)
        torch.testing.assert_close(layer.inverse(outputs)[0], torch.ones(1, 3))


def test_copies_and_pickles_leave_the_cache_behind():
    layer = P4InvTransform(50, using_cache=True).eval()
    empty = len(pickle.dumps(layer))
    with torch.no_grad():
        layer.inverse(layer(torch.randn(2, 50))[0])
    assert layer.cache.weight is not None
    assert copy.deepcopy(layer).cache.weight is None
    assert len(pickle.dumps(layer)) == empty


def test_use_cache_refuses_what_is_not_a_bool():
    with pytest.raises(TypeError, match="Mode must be boolean"):
        P4InvTransform(3).use_cache("yes")
