"""Merges during training with every optimizer of torch.optim: whose state restarts, and how."""

import copy
import functools
import math

import pytest
import torch
from torch import nn, optim

from p4flows import MergeHook, P4InvTransform
from p4flows.matrices import InvertibleMatrix
from p4flows.merging.optimizer_state import carry_momentum, restart_parameter

EVERY = 4
PAPER = {"rank": 1, "perturbation": "additive"}
SGD = functools.partial(optim.SGD, lr=0.1)
RMSPROP = functools.partial(optim.RMSprop, lr=1e-2)
EACH = {
    "SGD": SGD,
    "SGD-momentum": functools.partial(SGD, momentum=0.9),
    "SGD-nesterov": functools.partial(SGD, momentum=0.9, nesterov=True),
    "Adam": functools.partial(optim.Adam, lr=1e-2),
    "Adam-amsgrad": functools.partial(optim.Adam, lr=1e-2, amsgrad=True),
    "AdamW": functools.partial(optim.AdamW, lr=1e-2),
    "Adamax": functools.partial(optim.Adamax, lr=1e-2),
    "NAdam": functools.partial(optim.NAdam, lr=1e-2),
    "RAdam": functools.partial(optim.RAdam, lr=1e-2),
    "RMSprop": RMSPROP,
    "RMSprop-centered": functools.partial(RMSPROP, centered=True, momentum=0.5),
    "Adagrad": functools.partial(optim.Adagrad, lr=1e-2),
    "Adagrad-start": functools.partial(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.3),
    "Adadelta": functools.partial(optim.Adadelta, lr=1.0),
    "ASGD": functools.partial(optim.ASGD, lr=1e-2, lambd=0.1, t0=1),
    "Rprop": functools.partial(optim.Rprop, lr=1e-3),
}
# What the oldest torch has not got yet.
EACH |= {
    name: functools.partial(getattr(optim, name), lr=1e-2)
    for name in ("Adafactor", "Muon")
    if hasattr(optim, name)
}
WITHOUT = {
    "foreach": ("Muon",),
    "fused": ("Adad", "Adaf", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop"),
    "capturable": ("SGD", "Adagrad", "Adafactor", "Muon"),
}


def variants(kind):
    return {
        f"{name}-{kind}": functools.partial(build, **{kind: True})
        for name, build in EACH.items()
        if not name.startswith(WITHOUT[kind])
    }


ON_CPU = {**EACH, **variants("foreach"), **variants("fused")}
ON_GPU = {**ON_CPU, **variants("capturable")}


def test_every_optimizer_is_here():
    offered = {
        name
        for name, kind in vars(optim).items()
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
    }
    # SparseAdam is for sparse gradients alone; LBFGS has tests of its own below.
    assert offered - {"Optimizer", "SparseAdam", "LBFGS"} == {n.partition("-")[0] for n in EACH}


class Training:
    """A P4 layer and, beside it and independent of it, an ordinary one."""

    def __init__(self, build, device="cpu", merge=True, **options):
        torch.manual_seed(0)
        self.p4 = P4InvTransform(4, bias=False, **{**PAPER, "rank": 2, **options})
        self.other = nn.Linear(4, 4, bias=False)
        self.module = nn.ModuleList([self.p4, self.other]).to(device)
        self.x = torch.randn(16, 4).to(device)
        self.targets = torch.randn(2, 16, 4).to(device)
        self.optimizer = build(self.module.parameters())
        self.before_merge = {}
        self.optimizer.register_step_post_hook(self.remember)
        if merge:
            paper = self.p4.matrix.perturbation == "additive"
            self.hook = MergeHook(self.p4, self.optimizer, every=EVERY, paper=paper)

    def remember(self, optimizer, args, kwargs):
        self.before_merge = {p: dict(state) for p, state in optimizer.state.items()}

    def backward(self):
        self.optimizer.zero_grad()
        fits = self.p4(self.x)[0], self.other(self.x)
        losses = [
            (fit - target).square().mean() for fit, target in zip(fits, self.targets, strict=True)
        ]
        sum(losses).backward()
        return losses[0].item()

    def step(self):
        loss = self.backward()
        self.optimizer.step()
        return loss

    @property
    def factors(self):
        return self.p4.matrix.u, self.p4.matrix.v


def assert_same_state(state, other):
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=f"{name} differs")


def check_merges(build, device="cpu"):
    training = Training(build, device)
    without = Training(build, device, merge=False)
    first = training.step()
    for _ in range(EVERY - 1):
        training.step()
    for _ in range(EVERY):
        without.step()
    assert training.hook.stats.merged == 1

    # Kept where they are: every state tensor, with its dtype, device and shape.
    for parameter, before in training.before_merge.items():
        state = training.optimizer.state[parameter]
        assert state.keys() == before.keys()
        for name, value in before.items():
            assert state[name] is value or not isinstance(value, torch.Tensor)
            assert type(state[name]) is type(value)
    # Untouched: the ordinary layer, and u, which keeps its momentum.
    untouched = [
        (training.other.weight, without.other.weight),
        (training.p4.matrix.u, without.p4.matrix.u),
    ]
    for parameter, twin in untouched:
        assert_same_state(training.optimizer.state[parameter], without.optimizer.state[twin])

    # Restarted: the next steps are the first ones of a new optimizer. (At the very first one u = 0,
    # so that v has no gradient yet.)
    restarted = [training.p4.matrix.v]
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in restarted]
    fresh = build(copies)
    for _ in range(EVERY - 1):
        training.backward()
        for parameter, twin in zip(restarted, copies, strict=True):
            twin.grad = parameter.grad.clone()
        training.optimizer.step()
        fresh.step()
        for parameter, twin in zip(restarted, copies, strict=True):
            torch.testing.assert_close(parameter, twin)
            torch.testing.assert_close(training.optimizer.state[parameter], fresh.state[twin])
    assert all(bool(parameter.grad.any()) for parameter in restarted)

    for _ in range(6 * EVERY + 1):
        last = training.step()
    for _ in range(7 * EVERY):
        without.step()
    assert last < first
    assert training.hook.stats.merged == 8
    assert torch.equal(training.other.weight, without.other.weight)


@pytest.mark.parametrize("name", ON_CPU)
def test_merges_during_training(name):
    check_merges(ON_CPU[name])


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("name", ON_CPU)
def test_the_default_trains_with_every_optimizer(name, rank):
    """The relative perturbation: u trained, momentum carried, at full rank nothing touched."""
    options = {"rank": rank, "perturbation": "relative"}
    training = Training(ON_CPU[name], **options)
    without = Training(ON_CPU[name], merge=False, **options)
    first = training.step()
    for _ in range(EVERY - 1):
        training.step()
    for _ in range(EVERY):
        without.step()
    assert training.hook.stats.merged == 1
    u, twin = training.p4.matrix.u, without.p4.matrix.u
    assert not u.any() and twin.any()
    state, other = training.optimizer.state[u], without.optimizer.state[twin]
    if rank == 4:
        assert_same_state(state, other)
    averages = ("exp_avg", "momentum_buffer")
    kept = {entry: value for entry, value in state.items() if entry not in averages}
    assert_same_state(kept, {entry: other[entry] for entry in kept})
    assert training.optimizer.state[training.p4.matrix.v].get("step", 0) == 0
    for _ in range(10 * EVERY):
        last = training.step()
        without.step()
    assert last < first
    assert torch.equal(training.other.weight, without.other.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturable optimizers need a GPU")
@pytest.mark.parametrize("name", ON_GPU)
def test_merges_during_training_on_a_gpu(name):
    check_merges(ON_GPU[name], "cuda")


def lbfgs(**kwargs):
    training = Training(lambda parameters: optim.LBFGS(parameters, lr=0.1, max_iter=2), **kwargs)

    def step():
        def closure():
            training.optimizer.zero_grad()
            loss = (training.p4(training.x)[0] - training.targets[0]).square().mean()
            loss = loss + (training.other(training.x) - training.targets[1]).square().mean()
            loss.backward()
            return loss

        return training.optimizer.step(closure).item()

    return training, step


@pytest.mark.parametrize("kind", ["relative", "additive"])
def test_lbfgs_starts_again_after_a_merge(kind):
    training, step = lbfgs(perturbation=kind)
    losses = [step() for _ in range(EVERY)]
    state = training.optimizer.state[training.optimizer.param_groups[0]["params"][0]]
    assert training.hook.stats.merged == 1
    assert state["n_iter"] == 0
    assert state["func_evals"] == 2 * EVERY
    assert state.keys() == {"n_iter", "func_evals"}
    weights = [parameter.detach().clone() for parameter in training.module.parameters()]

    losses += [step()]
    twin, step_twin = lbfgs(merge=False, perturbation=kind)
    twin.module.load_state_dict(training.module.state_dict())
    with torch.no_grad():
        for parameter, weight in zip(twin.module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    assert step_twin() == losses[-1]
    for parameter, other in zip(
        training.module.parameters(), twin.module.parameters(), strict=True
    ):
        assert torch.equal(parameter, other)
    losses += [step() for _ in range(4 * EVERY)]
    assert losses[-1] < losses[0]


def test_lbfgs_keeps_its_history_when_nothing_merges():
    training, step = lbfgs()
    for _ in range(EVERY - 1):
        step()
    with torch.no_grad():
        for factor in training.factors:
            factor.fill_(1e30)  # cannot be merged
    training.optimizer.zero_grad()
    training.optimizer.step(lambda: torch.tensor(0.0, requires_grad=True))
    state = training.optimizer.state[training.optimizer.param_groups[0]["params"][0]]
    assert (training.hook.stats.merged, training.hook.stats.skipped) == (0, 1)
    assert state["n_iter"] > 0


class Counting(optim.SGD):
    """An optimizer of someone else's, with state of every kind."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["scale"] = state.get("scale", 0.0) + 0.5
                state["trace"] = torch.ones_like(parameter)
                state["log"] = ["kept"]


def test_an_unknown_optimizer_starts_from_zero():
    layer = P4InvTransform(3, **PAPER)
    optimizer = Counting(layer.parameters(), lr=0.1)
    hook = MergeHook.paper(layer, optimizer, every=2)
    optimizer.step()
    optimizer.step()
    assert hook.stats.merged == 1
    restarted = optimizer.state[layer.matrix.v]
    assert (restarted["count"], restarted["scale"], restarted["log"]) == (0, 0.0, ["kept"])
    assert type(restarted["scale"]) is float
    assert torch.equal(restarted["trace"], torch.zeros(3, 1))
    for parameter in (layer.matrix.u, layer.bias):
        kept = optimizer.state[parameter]
        assert (kept["count"], kept["scale"], kept["log"]) == (2, 1.0, ["kept"])
        assert torch.equal(kept["trace"], torch.ones_like(parameter))


@pytest.mark.parametrize("build", [EACH[n] for n in EACH if n in ("Adam", "Rprop", "Adafactor")])
def test_in_a_batch_only_the_re_initialised_restart(build):
    matrix = InvertibleMatrix(3, batch_shape=(2, 2), rank=2, perturbation="additive")
    optimizer = build([matrix.v])
    for _ in range(3):
        (matrix.v * torch.randn(2, 2, 3, 2)).sum().backward()
        optimizer.step()
    state = optimizer.state[matrix.v]
    before = {name: value.clone() for name, value in state.items()}
    where = torch.tensor([[True, False], [False, True]])
    restart_parameter(optimizer, matrix.v, where)
    for name, value in state.items():
        if value.dim() == 0:
            assert value == 3
            continue
        initial = 1e-3 if name == "step_size" else 0.0
        assert torch.equal(value[where], torch.full_like(value[where], initial)), name
        assert torch.equal(value[~where], before[name][~where]), name
        assert not torch.equal(value[where], before[name][where]), name
    restart_parameter(optimizer, matrix.v, torch.ones_like(where))
    assert state["step"] == 0


def test_a_parameter_that_has_not_been_trained_yet():
    matrix = InvertibleMatrix(3)
    optimizer = optim.Adam([matrix.v])
    restart_parameter(optimizer, matrix.v, torch.tensor(True))
    assert not optimizer.state


@pytest.mark.parametrize("rank", [1, 3])
def test_carried_momentum_is_that_of_the_same_gradient_for_the_new_v(rank):
    # With v of full rank in its row space, (∂J/∂Ã) is known there: choose one that is.
    torch.manual_seed(0)
    layer = P4InvTransform(5, rank=rank).double()
    matrix = layer.matrix
    before, after = torch.randn(2, 5, rank, dtype=torch.float64)
    gradient = torch.randn(5, rank, dtype=torch.float64) @ before.mT
    optimizer = torch.optim.Adam(layer.parameters())
    matrix.u.grad = gradient @ before
    optimizer.step()
    momentum, squares = (
        optimizer.state[matrix.u]["exp_avg"],
        optimizer.state[matrix.u]["exp_avg_sq"],
    )
    kept = squares.clone()
    carry_momentum(optimizer, matrix.u, before, after, torch.tensor(False))
    torch.testing.assert_close(momentum, 0.1 * gradient @ before)
    carry_momentum(optimizer, matrix.u, before, after, torch.tensor(True))
    torch.testing.assert_close(momentum, 0.1 * gradient @ after)
    assert torch.equal(squares, kept)
    # A v of dependent columns says nothing.
    carry_momentum(optimizer, matrix.u, torch.zeros_like(after), after, torch.tensor(True))
    assert torch.equal(momentum, torch.zeros_like(momentum))


def test_a_relative_layer_keeps_second_moments_and_moves_first_ones():
    torch.manual_seed(0)
    layer = P4InvTransform(4, rank=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    MergeHook(layer, optimizer, every=3)
    x = torch.randn(8, 4)
    for _ in range(2):
        layer(x)[0].square().sum().backward()
        optimizer.step()
    layer(x)[0].square().sum().backward()
    # The third step without its merge, on copies.
    twin = copy.deepcopy(layer)
    for own, other in zip(layer.parameters(), twin.parameters(), strict=True):
        other.grad = None if own.grad is None else own.grad.clone()
    plain = torch.optim.Adam(twin.parameters(), lr=1e-2)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain.step()
    optimizer.step()
    old, new = twin.matrix.v, layer.matrix.v
    assert not torch.equal(old, new)
    transport = torch.linalg.lstsq(old, new).solution
    state, before = optimizer.state[layer.matrix.u], plain.state[twin.matrix.u]
    torch.testing.assert_close(state["exp_avg"], before["exp_avg"] @ transport)
    assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"])
    assert state["step"] == 3


@pytest.mark.filterwarnings("ignore:the perturbation of:UserWarning")
@pytest.mark.parametrize("kind", ["relative", "additive"])
def test_state_of_a_reset_perturbation_is_finite_again(kind):
    layer = P4InvTransform(3, rank=1, perturbation=kind)
    optimizer = torch.optim.Adam(layer.parameters())
    hook = MergeHook(layer, optimizer, every=2)
    for scale in (1.0, math.nan):
        optimizer.zero_grad()
        (scale * layer(torch.ones(2, 3))[0]).sum().backward()
        optimizer.step()
    assert hook.stats.reset == 1
    for factor in (layer.matrix.u, layer.matrix.v):
        assert factor.isfinite().all()
        state = optimizer.state.get(factor, {})
        assert all(entry.isfinite().all() for entry in state.values())


@pytest.mark.filterwarnings("ignore:the perturbation of:UserWarning")
def test_shared_step_restarts_when_each_matrix_was_merged_or_reset():
    matrix = InvertibleMatrix(3, batch_shape=(2,), **PAPER)
    optimizer = torch.optim.Adam(matrix.parameters())
    hook = MergeHook.paper(matrix, optimizer, every=1)
    matrix.u.grad, matrix.v.grad = torch.ones(2, 3, 1), torch.ones(2, 3, 1)
    matrix.u.grad[0] = math.nan
    optimizer.step()
    assert (hook.stats.merged, hook.stats.reset) == (1, 1)
    assert optimizer.state[matrix.v]["step"] == 0


class Interpolating(torch.optim.Optimizer):
    """As schedule-free SGD: gradients at y = (z + x)/2, steps of z, evaluation at their mean x."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                x = 2 * y - z
                if y.grad is not None:
                    z.sub_(y.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["step"])
                y.copy_((z + x) / 2)

    @torch.no_grad()
    def swap(self):
        """Put x in the place of y, and back."""
        for group in self.param_groups:
            for y in group["params"]:
                z = self.state[y]["z"]
                y.copy_((y + z) / 2 if group.get("is_x") else 2 * y - z)
            group["is_x"] = not group.get("is_x")


class SlowAndFast(torch.optim.Optimizer):
    """As Lookahead: every second step returns half of the way to where the last such step ended."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.steps = optimizer, 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow_params", p.clone())
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p, state in self.state.items():
                p.lerp_(state["slow_params"], 0.5)
                state["slow_params"].copy_(p)


def losses_of(layer, optimizer, steps):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2, 1, 0.5])

    def nll():
        z, logabsdet = layer(x)
        return (z.square().sum(-1) / 2 - logabsdet).mean()

    for _ in range(steps):
        optimizer.zero_grad()
        nll().backward()
        optimizer.step()
    return nll


def test_a_merge_changes_no_average_of_weights():
    torch.manual_seed(0)
    layer = P4InvTransform(3).double().float()
    optimizer = Interpolating(layer.parameters())
    hook = MergeHook(layer, optimizer, every=10**6)
    nll = losses_of(layer, optimizer, 24)
    optimizer.swap()
    before = nll().item()
    optimizer.swap()
    assert hook.merge()
    optimizer.swap()
    assert nll().item() == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("bound", [True, False])
def test_slow_weights_move_with_a_merge(bound):
    trained = []
    for every in (3, 10**6):
        torch.manual_seed(0)
        layer = P4InvTransform(3)
        optimizer = SlowAndFast(torch.optim.SGD(layer.parameters(), lr=0.01))
        hook = MergeHook(layer, optimizer if bound else None, every=every)
        losses_of(layer, optimizer, 4)
        hook.merge()
        # A step without gradients: halfway back to where the slow weights were.
        optimizer.zero_grad()
        losses_of(layer, optimizer, 0)
        trained.append(layer.weight().detach())
    torch.testing.assert_close(*trained, atol=2e-3, rtol=0)


def test_a_copy_of_weights_that_cannot_move_is_refused_by_name():
    for options in ({"rank": 1}, {"perturbation": "additive"}):
        layer = P4InvTransform(3, **options)
        optimizer = Interpolating(layer.parameters())
        MergeHook(layer, optimizer, every=3)
        with pytest.raises(TypeError, match=r"Interpolating keeps a copy of the weights \('z'\)"):
            losses_of(layer, optimizer, 3)
