"""The contract suite itself: each check rejects a layer that is wrong in just that way."""

from pickle import PicklingError

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import once_differentiable
from torch.autograd.gradcheck import GradcheckError

from p4flows.matrices import InvertibleMatrix
from p4flows.transforms import P4InvTransform
from transforms import contract
from transforms.contract import CHECKS, build
from transforms.registry import perturbed_matrices


class Linear(P4InvTransform):
    """The right layer, of which the wrong ones below differ in one thing."""

    def __init__(self):
        super().__init__(3)


class LogabsdetZero(Linear):
    def forward(self, inputs, context=None):
        return super().forward(inputs)[0], inputs.new_zeros(len(inputs))

    def inverse(self, inputs, context=None):
        return super().inverse(inputs)[0], inputs.new_zeros(len(inputs))


class LogabsdetOfWrongSign(Linear):
    def inverse(self, inputs, context=None):
        outputs, logabsdet = super().inverse(inputs)
        return outputs, -logabsdet


class LogabsdetAccumulatedInFloat32(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return outputs, logabsdet.float().double()


class LogabsdetInFloat32(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return outputs, logabsdet.float()


class LogabsdetIsScalar(Linear):
    def forward(self, inputs, context=None):
        return super().forward(inputs)[0], self.logabsdet()


class LogabsdetWithoutGradient(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return outputs, logabsdet.detach()


class OutputsInFloat32(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return outputs.float().double(), logabsdet


class InverseIsTranspose(Linear):
    def inverse(self, inputs, context=None):
        return (inputs - self.bias) @ self.weight(), -self.logabsdet().repeat(len(inputs))


class InverseStaleAfterMerge(Linear):
    class Matrix(InvertibleMatrix):
        def _merged(self, state, candidates, force):
            merged = super()._merged(state, candidates, force)
            del merged.state["inverse_frozen"]
            return merged

    def __init__(self):
        super().__init__()
        # Nobody derives the inverse of an additive perturbation again because of its v.
        self.matrix = self.Matrix(3, perturbation="additive")


class LogabsdetStaleAfterMerge(Linear):
    class Matrix(InvertibleMatrix):
        def _merged(self, state, candidates, force):
            merged = super()._merged(state, candidates, force)
            del merged.state["logabsdet_frozen"]
            return merged

    def __init__(self):
        super().__init__()
        self.matrix = self.Matrix(3)


class CacheIsNeverDropped(Linear):
    cached = None

    def forward(self, inputs, context=None):
        if self.training or torch.is_grad_enabled():
            return super().forward(inputs)
        if self.cached is None:
            self.cached = self.weight()
        return inputs @ self.cached.mT + self.bias, self.logabsdet().repeat(len(inputs))


class StaysAtStart(Linear):
    def forward(self, inputs, context=None):
        return inputs.clone(), inputs.new_zeros(len(inputs))


class ParameterIsNotUsed(Linear):
    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))


class BiasNeedsTrainedInputs(Linear):
    """As a hand-written backward pass that returns early when the inputs ask for no gradient."""

    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        if not inputs.requires_grad:
            outputs = outputs - self.bias + self.bias.detach()
        return outputs, logabsdet


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x**2 / 8

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * (1 + ctx.saved_tensors[0] / 4)


class BackwardOnlyOnce(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return Square.apply(outputs), logabsdet


class OtherWithoutGradients(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return outputs, logabsdet if torch.is_grad_enabled() else logabsdet + 1


class WithoutContext(Linear):
    def forward(self, inputs):
        return super().forward(inputs)


class SqueezesBatchOfOne(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return outputs.squeeze(0), logabsdet


class Broadcasts(Linear):
    def forward(self, inputs, context=None):
        return super().forward(inputs[..., : self.features].reshape(-1, self.features))


class TakesIntegers(Linear):
    def forward(self, inputs, context=None):
        return super().forward(inputs.to(self.bias.dtype))


class NeedsContiguousRows(Linear):
    def forward(self, inputs, context=None):
        flat = inputs.as_strided(inputs.shape, (inputs.shape[1], 1))
        return super().forward(flat)


class DrawsNoise(Linear):
    def forward(self, inputs, context=None):
        torch.rand(())
        return super().forward(inputs)


class MergesInEval(Linear):
    def train(self, mode=True):
        super().train(mode)
        for matrix in [] if mode else perturbed_matrices(self):
            matrix.merge(force=True)
        return self


class WritesToInputs(Linear):
    def inverse(self, inputs, context=None):
        outputs, logabsdet = super().inverse(inputs)
        with torch.no_grad():
            inputs.mul_(2)
        return outputs, logabsdet


class MatrixIsNotSaved(Linear):
    def __init__(self):
        super().__init__()
        self.matrix._non_persistent_buffers_set.add("frozen")


class SeedIsNotSaved(Linear):
    def __init__(self):
        super().__init__()
        self.matrix = InvertibleMatrix(3, rank=1)
        self.matrix._non_persistent_buffers_set.add("seed")


class KeepsItsGraph(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        self.last = outputs
        return outputs, logabsdet


class HoldsAFunction(Linear):
    def __init__(self):
        super().__init__()
        self.activation = lambda x: x


class SaysNothing(Linear):
    def __repr__(self):
        return "Linear()"


class BreaksTheGraph(Linear):
    def forward(self, inputs, context=None):
        if inputs.abs().max().item() > 1e9:
            raise ValueError("inputs are too large")
        return super().forward(inputs)


class OtherWhenCompiled(Linear):
    def forward(self, inputs, context=None):
        outputs, logabsdet = super().forward(inputs)
        return outputs, logabsdet + 1 if torch.compiler.is_compiling() else logabsdet


WRONG = [
    (LogabsdetZero, "forward", contract.check_logabsdet, AssertionError),
    (LogabsdetZero, "inverse", contract.check_logabsdet, AssertionError),
    (LogabsdetOfWrongSign, "forward", contract.check_round_trip, AssertionError),
    (LogabsdetOfWrongSign, "inverse", contract.check_logabsdet, AssertionError),
    (LogabsdetAccumulatedInFloat32, "forward", contract.check_logabsdet, AssertionError),
    (LogabsdetAccumulatedInFloat32, "forward", contract.check_round_trip, AssertionError),
    (LogabsdetInFloat32, "forward", contract.check_dtypes, AssertionError),
    (LogabsdetIsScalar, "forward", contract.check_dtypes, AssertionError),
    (LogabsdetWithoutGradient, "forward", contract.check_gradients, GradcheckError),
    (OutputsInFloat32, "forward", contract.check_round_trip, AssertionError),
    (InverseIsTranspose, "forward", contract.check_round_trip, AssertionError),
    (InverseIsTranspose, "inverse", contract.check_logabsdet, AssertionError),
    (InverseStaleAfterMerge, "forward", contract.check_round_trip, AssertionError),
    (InverseStaleAfterMerge, "inverse", contract.check_merge, AssertionError),
    (LogabsdetStaleAfterMerge, "forward", contract.check_merge, AssertionError),
    (CacheIsNeverDropped, "forward", contract.check_follows_parameters, AssertionError),
    (CacheIsNeverDropped, "forward", contract.check_state_dict, AssertionError),
    (StaysAtStart, "forward", contract.check_moved, AssertionError),
    (ParameterIsNotUsed, "forward", contract.check_every_parameter_is_trained, AssertionError),
    (BiasNeedsTrainedInputs, "forward", contract.check_gradients_are_independent, AssertionError),
    (BackwardOnlyOnce, "forward", contract.check_double_backward, GradcheckError),
    (OtherWithoutGradients, "forward", contract.check_grad_modes, AssertionError),
    (WithoutContext, "forward", contract.check_context, TypeError),
    (SqueezesBatchOfOne, "forward", contract.check_batch_sizes, AssertionError),
    (Broadcasts, "forward", contract.check_shapes, pytest.fail.Exception),
    (TakesIntegers, "forward", contract.check_refuses_other_types, pytest.fail.Exception),
    (NeedsContiguousRows, "forward", contract.check_memory_layout, AssertionError),
    (DrawsNoise, "forward", contract.check_purity, AssertionError),
    (MergesInEval, "forward", contract.check_purity, AssertionError),
    (WritesToInputs, "inverse", contract.check_purity, AssertionError),
    # What was not saved does not belong to the matrix that was: loading says so.
    (MatrixIsNotSaved, "inverse", contract.check_state_dict, AssertionError),
    (SeedIsNotSaved, "forward", contract.check_state_dict, AssertionError),
    (KeepsItsGraph, "forward", contract.check_deepcopy, RuntimeError),
    (HoldsAFunction, "forward", contract.check_pickle, (AttributeError, PicklingError)),
    (SaysNothing, "forward", contract.check_repr, AssertionError),
    (BreaksTheGraph, "forward", contract.check_compile, TorchDynamoException),
    (OtherWhenCompiled, "forward", contract.check_compile, AssertionError),
]


def test_every_check_rejects_something():
    assert {check for _, _, check, _ in WRONG} == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_right_layer_passes(check):
    check(build(Linear, "forward"))


@pytest.mark.parametrize(
    ("layer", "direction", "check", "error"),
    WRONG,
    ids=[f"{layer.__name__}-{direction}-{check.__name__}" for layer, direction, check, _ in WRONG],
)
def test_wrong_layer_is_rejected(layer, direction, check, error):
    case = build(layer, direction)
    with pytest.raises(error):
        check(case)
