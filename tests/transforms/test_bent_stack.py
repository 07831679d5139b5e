"""BentStack is the composite of its single layers, faster."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from p4flows import BentStack
from p4flows.transforms import bent_cascade
from transforms.registry import move, perturbed_matrices

# Each size on both paths: Ã formed, and two thin products a layer.
DENSE_UP_TO = {"dense": 10**6, "thin": 0}
SIZES = [(1, 2, 1), (2, 5, 1), (2, 3, 2), (5, 2, 3)]


def moved(features=2, blocks=3, **options):
    torch.manual_seed(0)
    stack = BentStack(features, blocks, **options).double()
    move(stack)
    return stack


def layers(composite):
    return list(composite._transforms)[::2]


def all_gradients(transform, inputs, parameters):
    outputs, logabsdet = transform(inputs)
    loss = (outputs.sin().sum(-1) + logabsdet * outputs[:, 0]).sum()
    return torch.autograd.grad(loss, [inputs, *parameters])


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("path", DENSE_UP_TO)
@pytest.mark.parametrize(("features", "blocks", "rank"), SIZES)
@pytest.mark.parametrize("kind", ["relative", "additive"])
def test_equal_to_the_single_layers(kind, features, blocks, rank, path, direction, monkeypatch):
    monkeypatch.setattr(bent_cascade, "DENSE_UP_TO", DENSE_UP_TO[path])
    stack = moved(features, blocks, rank=rank, perturbation=kind)
    composite = stack.to_composite()
    inputs = torch.randn(6, features, dtype=torch.float64, requires_grad=True)
    fused, single = getattr(stack, direction), getattr(composite, direction)
    torch.testing.assert_close(fused(inputs), single(inputs), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(fused(inputs), single(inputs), rtol=1e-10, atol=1e-10)
    each = layers(composite)
    trained = [[layer.bias for layer in each], [layer.matrix.u for layer in each]]
    own = [stack.bias, stack.matrix.u]
    if kind == "additive":
        trained.append([layer.matrix.v for layer in each])
        own.append(stack.matrix.v)
    first, *expected = all_gradients(single, inputs, [p for group in trained for p in group])
    count = len(each)
    grouped = [torch.stack(expected[i * count : (i + 1) * count]) for i in range(len(own))]
    found = all_gradients(fused, inputs, own)
    torch.testing.assert_close(found, (first, *grouped), rtol=1e-9, atol=1e-9)


def test_the_default_takes_both_paths():
    assert bent_cascade.is_dense(2)
    assert not bent_cascade.is_dense(bent_cascade.DENSE_UP_TO + 1)


def test_long_stacks_neither_overflow_nor_lose_the_log_derivatives():
    torch.manual_seed(0)
    stack = BentStack(2, 100)
    inputs = 1e4 * torch.randn(8, 2)
    with torch.no_grad():
        stack.bias.normal_()
        exact = stack.to_composite().double()(inputs.double())
        found = stack(inputs)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=1e-4)


def test_layers_and_stack_merge_alike():
    stack = moved()
    for _ in range(3):
        move(stack, merges=1)
        composite = stack.to_composite()
        merged = stack.matrix.merge()
        assert merged.tolist() == [bool(m.merge()) for m in perturbed_matrices(composite)]
        assert merged.any()
        for name in ("u", "v", "seed", "draws"):
            single = torch.stack([getattr(m, name) for m in perturbed_matrices(composite)])
            torch.testing.assert_close(getattr(stack.matrix, name), single, rtol=0, atol=0)
        for name in ("frozen", "inverse_frozen", "sign", "logabsdet_frozen"):
            single = torch.stack([getattr(m, name) for m in perturbed_matrices(composite)])
            torch.testing.assert_close(getattr(stack.matrix, name), single)


def test_single_layers_are_copies():
    stack = moved()
    composite = stack.to_composite()
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    move(composite)
    torch.testing.assert_close(stack.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": 0}, ValueError, "features must be a positive int, got 0"),
        ({"features": "2"}, TypeError, "features must be a positive int, got str"),
        ({"blocks": 0}, ValueError, "blocks must be a positive int, got 0"),
        ({"blocks": 1.5}, TypeError, "blocks must be a positive int, got float"),
        ({"rank": 3}, ValueError, "rank must be between 1 and 2"),
        ({"bounds": None}, TypeError, "bounds must be MergeBounds, got NoneType"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        BentStack(**{"features": 2, "blocks": 1, **arguments})


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_large_batches_are_equal_to_their_rows(direction, monkeypatch):
    stack = moved(3, 11)
    inputs = torch.randn(101, 3, dtype=torch.float64)
    expected = getattr(stack, direction)(inputs.requires_grad_())
    # Chunks of ten rows and one row left over, of 16 layers and some left over.
    monkeypatch.setattr(bent_cascade, "_CHUNK_ELEMENTS", 30)
    with torch.no_grad():
        found = getattr(stack, direction)(inputs)
    torch.testing.assert_close(found, expected)


class Made(torch.utils._python_dispatch.TorchDispatchMode):
    """Records tensors that are made of Python's numbers: copies from the host, on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("lift_fresh", "scalar_tensor", "_to_copy"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("path", DENSE_UP_TO)
def test_a_step_copies_nothing_from_the_host(path, direction, monkeypatch):
    monkeypatch.setattr(bent_cascade, "DENSE_UP_TO", DENSE_UP_TO[path])
    stack, inputs = moved(3, 4), torch.randn(6, 3, dtype=torch.float64)
    bent_cascade._constants.cache_clear()
    with torch.inference_mode():  # makes the constants, of which a gradient is taken later
        stack(inputs), stack.inverse(inputs)
    with Made() as made:
        outputs, logabsdet = getattr(stack, direction)(inputs)
        (outputs.sum() + logabsdet.sum()).backward()
        with torch.no_grad():
            getattr(stack, direction)(inputs)
    assert made.found == []


def test_constants_of_fake_tensors_are_not_kept():
    stack, inputs = moved(3, 4), torch.randn(6, 3, dtype=torch.float64)
    expected = stack(inputs)
    bent_cascade._constants.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(inputs)
        stack(fake)
        torch.func.vmap(stack)(fake.unsqueeze(0))
    torch.func.vmap(stack)(inputs.unsqueeze(0))
    torch.testing.assert_close(stack(inputs), expected, rtol=0, atol=0)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of bytes of the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and name.startswith(("empty", "clone", "new_")):
            self.total = max(self.total, result.untyped_storage().nbytes())
        return result


def test_memory_without_gradients_does_not_grow_with_the_blocks():
    inputs = torch.randn(400_000, 2)
    with LargestTensor() as no_grad, torch.no_grad():
        BentStack(2, blocks=4)(inputs)
    with LargestTensor() as trained:
        BentStack(2, blocks=4)(inputs)
    assert no_grad.total == inputs.nbytes
    assert trained.total >= 8 * inputs.nbytes


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_autocast_changes_nothing(direction):
    stack = moved(3, 4).float()
    x = torch.randn(6, 3)
    expected = getattr(stack, direction)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(stack, direction)(x)
        rounded = getattr(stack, direction)(x.bfloat16())
    found[0].sum().backward()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert rounded[0].dtype == torch.float32


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_jacobian_by_torch_func(direction):
    stack = moved(3, 2)
    x = torch.randn(3, dtype=torch.float64)
    function = getattr(stack, direction)

    def of_one_row(row):
        return function(row.unsqueeze(0))[0].squeeze(0)

    jacobian = torch.func.jacrev(of_one_row)(x)
    torch.testing.assert_close(
        torch.linalg.slogdet(jacobian).logabsdet, function(x.unsqueeze(0))[1].squeeze(0)
    )
