"""What every transform promises, as functions that raise when it does not hold.

Each check takes a `Case` and looks at one direction; the suite runs it on a transform and on
nflows' `InverseTransform` of it.
"""

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from nflows.transforms.base import InverseTransform, Transform
from torch import Tensor
from torch.func import functional_call

from p4flows.transforms import P4OrthogonalTransform
from transforms.registry import Constructor, move, perturb, perturbed_matrices, width

# float64 rounding, with room for the condition of the moved layers; far below float32's 1e-7.
ROUNDING = {"rtol": 1e-10, "atol": 1e-11}


class Case(NamedTuple):
    """What is checked: a transform in float64, off its start, with inputs for it."""

    make: Constructor
    transform: Transform
    inputs: Tensor

    @property
    def core(self) -> Transform:
        """The transform itself, without the `InverseTransform` around it."""
        return getattr(self.transform, "_transform", self.transform)


def build(constructor: Constructor, direction: str) -> Case:
    """The case of a transform in one direction, "forward" or "inverse"."""

    def make() -> Transform:
        transform = constructor().double()
        return InverseTransform(transform) if direction == "inverse" else transform

    torch.manual_seed(0)
    transform = make()
    move(transform)
    case = Case(make, transform, torch.empty(0))
    return case._replace(inputs=torch.randn(5, width(case.core), dtype=torch.float64))


def close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(actual, expected, **ROUNDING)


def gradients(transform: Transform, inputs: Tensor) -> list[Tensor]:
    """Gradients of a scalar that depends on all outputs, for the inputs and each parameter."""
    weights = torch.linspace(0.5, 1.5, inputs.numel(), dtype=inputs.dtype).reshape(inputs.shape)
    outputs, logabsdet = transform(inputs)
    loss = (weights * outputs * outputs).sum() + (weights[:, 0] * logabsdet).sum()
    wanted = [t for t in (inputs, *transform.parameters()) if t.requires_grad]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def as_function(case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The transform as a function of inputs and parameters, and its arguments, for gradcheck."""
    names = [name for name, p in case.transform.named_parameters() if p.requires_grad]

    def function(inputs: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        outputs, logabsdet = functional_call(case.transform, parameters, (inputs,))
        # One tensor, because gradcheck leaves out those without a graph.
        return torch.cat([outputs, logabsdet[:, None]], dim=-1)

    arguments = (case.inputs[:2], *(p for p in case.transform.parameters() if p.requires_grad))
    return function, tuple(t.detach().clone().requires_grad_() for t in arguments)


def check_moved(case: Case) -> None:
    """The rest means nothing for an identity or for a layer that is still at its start."""
    outputs, logabsdet = case.transform(case.inputs)
    assert not torch.allclose(outputs, case.inputs, rtol=0.1)
    volume_preserving = any(isinstance(each, P4OrthogonalTransform) for each in case.core.modules())
    assert (logabsdet.abs() > 1e-2).any() != volume_preserving
    if list(case.transform.parameters()):
        assert not torch.allclose(outputs, case.make()(case.inputs)[0], rtol=0.1)


def check_round_trip(case: Case) -> None:
    outputs, logabsdet = case.transform(case.inputs)
    close(case.transform.inverse(outputs), (case.inputs, -logabsdet))


def check_logabsdet(case: Case) -> None:
    def jacobian(row: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda x: case.transform(x[None])[0][0], row)

    expected = torch.linalg.slogdet(torch.stack([jacobian(row) for row in case.inputs])).logabsdet
    torch.testing.assert_close(case.transform(case.inputs)[1], expected, **ROUNDING)


def check_gradients(case: Case) -> None:
    torch.autograd.gradcheck(*as_function(case), fast_mode=True)


def check_double_backward(case: Case) -> None:
    torch.autograd.gradgradcheck(*as_function(case), fast_mode=True)


def check_every_parameter_is_trained(case: Case) -> None:
    found = gradients(case.transform, case.inputs.clone().requires_grad_())
    parameters = dict(case.transform.named_parameters())
    kept = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    # The relative perturbation redraws v and does not train it; nothing else is left out.
    assert all(name.endswith("matrix.v") for name in kept)
    assert len(found) == 1 + len(parameters) - len(kept)
    for gradient in found:
        assert gradient is not None
        assert gradient.isfinite().all() and gradient.any()


def check_gradients_are_independent(case: Case) -> None:
    """Whether inputs or parameters are trained does not change the other's gradients."""
    inputs = case.inputs.clone().requires_grad_()
    both = gradients(case.transform, inputs)
    if len(both) > 1:
        torch.testing.assert_close(gradients(case.transform, case.inputs), both[1:], **ROUNDING)
    case.transform.requires_grad_(False)
    torch.testing.assert_close(gradients(case.transform, inputs), both[:1], **ROUNDING)


def check_grad_modes(case: Case) -> None:
    expected = case.transform(case.inputs)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            close(case.transform(case.inputs), expected)
    # What was computed in inference mode must not come back outside of it.
    close(case.transform(case.inputs), expected)


def check_context(case: Case) -> None:
    context = torch.randn(len(case.inputs), 2, dtype=case.inputs.dtype)
    expected = case.transform(case.inputs)
    if hasattr(case.core, "context_features"):
        with pytest.raises(ValueError, match="build it with context_features=2"):
            case.transform(case.inputs, context)
        return
    close(case.transform(case.inputs, context), expected)
    close(case.transform(case.inputs, context=context), expected)


def check_batch_sizes(case: Case) -> None:
    outputs, logabsdet = case.transform(case.inputs)
    for size in (0, 1):
        inputs = case.inputs[:size].clone().requires_grad_()
        close(case.transform(inputs), (outputs[:size], logabsdet[:size]))
        with torch.no_grad():
            close(case.transform(inputs), (outputs[:size], logabsdet[:size]))
        assert torch.equal(inputs, case.inputs[:size])
        assert all(gradient.isfinite().all() for gradient in gradients(case.transform, inputs))


def check_shapes(case: Case) -> None:
    """Other shapes are refused, or mapped when the transform has no number of features."""
    inputs = case.inputs
    if hasattr(case.core, "features"):
        other = (inputs[0], inputs[None], torch.cat([inputs, inputs], -1), inputs[:, :0])
        for wrong in other:
            with pytest.raises(ValueError, match=r"inputs must have shape \(N, \d+\), got"):
                case.transform(wrong)
        return
    for shape in ((4,), (4, 0), (4, 2, 3)):
        outputs, logabsdet = case.transform(inputs.new_ones(shape))
        assert outputs.shape == shape and logabsdet.shape == (4,)
    with pytest.raises(ValueError, match="inputs must have a batch dimension"):
        case.transform(inputs.sum())


def check_refuses_other_types(case: Case) -> None:
    for wrong, name in ((case.inputs.long(), "int64"), (case.inputs.tolist(), "list")):
        with pytest.raises(
            TypeError, match=f"inputs must be a floating-point tensor, got .*{name}"
        ):
            case.transform(wrong)


def check_dtypes(case: Case) -> None:
    exact = case.transform(case.inputs)
    for dtype in (torch.float32, torch.float64):
        transform = copy.deepcopy(case.transform).to(dtype)
        inputs = case.inputs.to(dtype).requires_grad_()
        outputs, logabsdet = transform(inputs)
        assert outputs.dtype == logabsdet.dtype == dtype
        assert outputs.shape == inputs.shape and logabsdet.shape == (len(inputs),)
        found = (outputs.double(), logabsdet.double())
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        assert all(gradient.dtype == dtype for gradient in gradients(transform, inputs))


def check_memory_layout(case: Case) -> None:
    strided = case.inputs.mT.contiguous().mT
    close(case.transform(strided), case.transform(case.inputs))


def check_purity(case: Case) -> None:
    """Neither `train`, `eval` nor a pass draws, merges, or writes to the state or the inputs."""
    expected = case.transform(case.inputs)
    state = {name: value.clone() for name, value in case.transform.state_dict().items()}
    inputs, random = case.inputs.clone(), torch.get_rng_state()
    for mode in (False, True, False):
        assert case.transform.train(mode) is case.transform
        close(case.transform(case.inputs), expected)
        with torch.no_grad():
            close(case.transform(case.inputs), expected)
    torch.testing.assert_close(case.transform.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(case.inputs, inputs)
    assert torch.equal(torch.get_rng_state(), random)


def check_merge(case: Case) -> None:
    """A merge changes neither direction, and the inverse stays the inverse over many of them."""
    outputs, logabsdet = case.transform(case.inputs)
    for matrix in perturbed_matrices(case.transform):
        assert bool(matrix.merge(force=True).all())
        assert not matrix.u.any()
    close(case.transform(case.inputs), (outputs, logabsdet))
    close(case.transform.inverse(outputs), (case.inputs, -logabsdet))


def check_follows_parameters(case: Case) -> None:
    """Nothing computed before an update is used after it, in any mode."""
    for mode in (True, False):
        case.transform.train(mode)
        with torch.no_grad():
            outputs, _ = case.transform(case.inputs)
            case.transform.inverse(outputs)
            perturb(case.transform)
        check_round_trip(case)
        check_logabsdet(case)
        check_grad_modes(case)


def check_state_dict(case: Case) -> None:
    fresh = case.make()
    # In use before: whatever the fresh one has cached by now has to go.
    fresh.eval()
    with torch.no_grad():
        fresh(case.inputs)
        fresh.load_state_dict(case.transform.state_dict())
        close(fresh(case.inputs), case.transform(case.inputs))
    for matrices in zip(perturbed_matrices(fresh), perturbed_matrices(case.transform), strict=True):
        for matrix in matrices:
            matrix.merge(force=True)
    state = case.transform.state_dict()
    torch.testing.assert_close(fresh.state_dict(), state, rtol=0, atol=0)


def check_deepcopy(case: Case) -> None:
    """Also after a training pass whose graph is alive, as for an average of the weights."""
    outputs, logabsdet = case.transform(case.inputs)
    twin = copy.deepcopy(case.transform)
    close(twin(case.inputs), (outputs, logabsdet))
    move(twin)
    close(case.transform(case.inputs), (outputs, logabsdet))


def check_pickle(case: Case) -> None:
    outputs, logabsdet = case.transform(case.inputs)
    restored = pickle.loads(pickle.dumps(case.transform))
    close(restored(case.inputs), (outputs, logabsdet))


def check_repr(case: Case) -> None:
    """A line of `print(flow)` tells the layer and, where it has one, its size."""
    text = repr(case.core)
    assert text.startswith(type(case.core).__name__)
    features = getattr(case.core, "features", "")
    assert str(features) in text
    for matrix in perturbed_matrices(case.core):
        assert f"size={matrix.size}" in text and f"rank={matrix.rank}" in text


def check_compile(case: Case) -> None:
    """One graph without breaks, equal to eager in values and gradients."""
    torch.compiler.reset()  # the cases before count towards dynamo's limit of recompilations
    # "aot_eager" traces forward and backward as inductor does, but needs no C++ compiler.
    compiled = torch.compile(case.transform, fullgraph=True, backend="aot_eager")
    inputs = case.inputs.clone().requires_grad_()
    close(compiled(inputs), case.transform(inputs))
    expected = gradients(case.transform, inputs)
    torch.testing.assert_close(gradients(compiled, inputs), expected, **ROUNDING)


CHECKS: tuple[Callable[[Case], None], ...] = (
    check_moved,
    check_round_trip,
    check_logabsdet,
    check_gradients,
    check_double_backward,
    check_every_parameter_is_trained,
    check_gradients_are_independent,
    check_grad_modes,
    check_context,
    check_batch_sizes,
    check_shapes,
    check_refuses_other_types,
    check_dtypes,
    check_memory_layout,
    check_purity,
    check_merge,
    check_follows_parameters,
    check_state_dict,
    check_deepcopy,
    check_pickle,
    check_repr,
    check_compile,
)
