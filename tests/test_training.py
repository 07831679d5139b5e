"""fit: exact resume, whole checkpoints, and errors that say what to do."""

import copy
import errno
import itertools
import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import p4flows.training
from p4flows import (
    InvertibleMatrix,
    MergeBounds,
    MergeHook,
    P4InvTransform,
    bent_stacked_flow,
    fit,
)
from p4flows.checkpoints import DamagedCheckpointError, read_checkpoint, write_checkpoint
from p4flows.merging.attaching import driver_of
from p4flows.training import negative_log_likelihood

STEPS = 23
DATA = torch.randn(20, 2, generator=torch.Generator().manual_seed(3)) * 0.5 + 1.0


def sample(generator):
    return torch.randn(8, 2, generator=generator) * 0.5 + 1.0


def noisy(flow, batch):
    """A loss that draws from the global random state."""
    inputs = batch if isinstance(batch, torch.Tensor) else batch[0]
    return negative_log_likelihood(flow, inputs + 0.1 * torch.randn_like(inputs))


class Run(NamedTuple):
    flow: nn.Module
    arguments: dict[str, Any]

    @property
    def hook(self):
        return self.arguments["hook"]

    @property
    def optimizer(self):
        return self.arguments["optimizer"]

    def fit(self, batches=sample, **arguments):
        defaults = {"steps": STEPS, "loss": noisy, "progress": False}
        return fit(self.flow, batches, **{**defaults, **self.arguments, **arguments})


def new_run(seed=0, **arguments):
    """Everything that a script builds before it calls `fit`, from a seed."""
    torch.manual_seed(seed)
    flow = bent_stacked_flow(2, 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15], gamma=0.5)
    hook = MergeHook(flow, optimizer, every=3, force_every=2, correct_every=2)
    defaults = {"optimizer": optimizer, "scheduler": scheduler, "hook": hook}
    return Run(flow, {**defaults, **arguments})


def loader(generator=None, seed=5):
    if generator is not None:
        generator.manual_seed(seed)
    data = TensorDataset(DATA)
    return DataLoader(data, batch_size=6, shuffle=True, generator=generator)  # 4 batches


BATCHES = {
    "function": lambda seed: sample,
    "loader": lambda seed: loader(),
    "loader-generator": lambda seed: loader(torch.Generator(), seed),
    "list": lambda seed: list(DATA.split(6)),
}


class Killed(BaseException):
    pass


def killed_at(step):
    calls = itertools.count(1)

    def loss(flow, batch):
        if next(calls) == step:
            raise Killed
        return noisy(flow, batch)

    return loss


def assert_same(one, other):
    """Bitwise, through dicts and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def state_of(run):
    parts = (run.flow, run.optimizer, run.hook, run.arguments["scheduler"])
    return [part.state_dict() for part in parts]


@pytest.mark.parametrize("saved", [1, 4, 5, 8])  # in the first epoch, at its end, in the next
@pytest.mark.parametrize("kind", BATCHES)
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind, saved, tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    whole = new_run(generator=torch.Generator().manual_seed(7))
    expected = whole.fit(BATCHES[kind](5))
    after = torch.get_rng_state()

    interrupted = new_run(generator=torch.Generator().manual_seed(7))
    with pytest.raises(Killed):
        interrupted.fit(
            BATCHES[kind](5),
            loss=killed_at(2 * saved),
            checkpoint=path,
            checkpoint_every=saved,
        )
    # Another process: nothing is as it was.
    resumed = new_run(seed=1, generator=torch.Generator().manual_seed(8))
    result = resumed.fit(BATCHES[kind](6), checkpoint=path, resume=True)
    assert torch.equal(result.losses, expected.losses)
    assert result.losses.shape == (STEPS,)
    assert_same(state_of(resumed), state_of(whole))
    assert torch.equal(torch.get_rng_state(), after)
    assert whole.hook.stats.merged > 0
    assert whole.optimizer.param_groups[0]["lr"] == 0.0025


def test_a_longer_run_continues_a_finished_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = new_run()
    expected = whole.fit()
    first = new_run()
    first.fit(steps=10, checkpoint=path)
    second = new_run(seed=1)
    result = second.fit(resume=path)  # from one file, to none
    assert torch.equal(result.losses, expected.losses)
    assert_same(state_of(second), state_of(whole))


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    path = tmp_path / "checkpoint.pt"
    expected = new_run().fit(checkpoint=path)
    written = path.stat().st_mtime_ns
    again = new_run(seed=1).fit(
        lambda generator: pytest.fail("a batch was drawn"), checkpoint=path, resume=True
    )
    assert torch.equal(again.losses, expected.losses)
    assert again.seconds == expected.seconds
    assert path.stat().st_mtime_ns == written


def test_resume_starts_anew_without_a_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    result = new_run().fit(checkpoint=path, resume=True)
    assert torch.equal(result.losses, new_run().fit().losses)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        new_run().fit(checkpoint=path, resume=tmp_path / "missing.pt")


def test_losses_are_those_of_every_step_and_fall():
    seen = []

    def loss(flow, batch):
        seen.append(negative_log_likelihood(flow, batch))
        return seen[-1]

    result = new_run().fit(loss=loss, steps=200)
    assert result.losses.dtype == torch.float64
    assert result.losses.tolist() == [value.item() for value in seen]
    assert result.losses[-20:].mean() < result.losses[:20].mean() - 0.2
    assert result.seconds > 0


def test_without_a_generator_batches_follow_the_global_seed():
    runs = [new_run(seed).fit(loss=negative_log_likelihood).losses for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_inputs_may_come_with_a_context():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))

        def log_prob(self, inputs, context=None):
            return -(inputs - context - self.shift).square().sum(-1)

    flow = Shifted()
    data = TensorDataset(DATA + 3.0, DATA)
    fit(
        flow,
        DataLoader(data, batch_size=20),
        steps=100,
        optimizer=torch.optim.SGD(flow.parameters(), lr=0.1),
        progress=False,
    )
    torch.testing.assert_close(flow.shift, torch.full((2,), 3.0), rtol=0, atol=1e-4)


def test_the_penalty_is_trained_but_not_reported():
    matrix = P4InvTransform(2, rank=1, perturbation="additive", bias=False)
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.1)
    hook = MergeHook(matrix, optimizer, every=1000)
    with torch.no_grad():
        matrix.matrix.u.copy_(matrix.matrix.v * -0.95 / matrix.matrix.v.square().sum())
    arguments = {"optimizer": optimizer, "hook": hook, "progress": False}

    def loss(flow, batch):
        return 0.0 * flow.weight().sum()

    strength = hook.penalty(1.0).item()
    assert strength > 0.5  # ln|G| = ln 0.05, below the −2 where it starts
    fit(matrix, [None], steps=5, loss=loss, **arguments)
    assert hook.penalty(1.0).item() == strength
    result = fit(matrix, [None], steps=100, loss=loss, penalty=0.01, **arguments)
    assert hook.penalty(1.0).item() < 0.01
    assert torch.equal(result.losses, torch.zeros(100, dtype=torch.float64))


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_flow_is_put_back(training):
    run = new_run()
    modes = []

    def loss(flow, batch):
        modes.append(flow.training)
        return noisy(flow, batch)

    run.flow.train(training)
    run.fit(loss=loss, steps=2)
    assert modes == [True, True]
    assert run.flow.training is training
    with pytest.raises(Killed):
        run.fit(loss=killed_at(1))
    assert run.flow.training is training


class Bar:
    """Stands in for tqdm and remembers what it is told."""

    def __init__(self, **arguments):
        self.arguments, self.updates, self.shown = arguments, 0, []
        Bar.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self):
        self.updates += 1

    def set_postfix(self, shown, refresh):
        self.shown.append((self.updates, shown))


def test_the_bar_shows_loss_and_merges(monkeypatch, tmp_path):
    monkeypatch.setattr(p4flows.training, "tqdm", Bar)
    run = new_run()
    result = run.fit(steps=60, progress=True, checkpoint=tmp_path / "checkpoint.pt")
    assert Bar.last.arguments == {"total": 60, "initial": 0, "disable": False, "unit": "step"}
    assert Bar.last.updates == 60
    (first, _), (last, shown) = Bar.last.shown
    assert (first, last) == (50, 60)
    assert shown == {
        "loss": f"{result.losses[-1]:.4f}",
        "merged": str(run.hook.stats.merged),
        "skipped": str(run.hook.stats.skipped),
    }
    assert shown["merged"] == str(60 // 3 * 4)
    new_run().fit(steps=70, checkpoint=tmp_path / "checkpoint.pt", resume=True)
    assert Bar.last.arguments["initial"] == 60
    assert Bar.last.arguments["disable"] is True


def test_the_bar_is_written_where_it_is_asked_for(capsys):
    new_run().fit(steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err
    new_run().fit(steps=5)
    assert capsys.readouterr() == ("", "")


def test_without_a_hook_the_bar_shows_the_loss_alone(monkeypatch):
    monkeypatch.setattr(p4flows.training, "tqdm", Bar)
    run = new_run()
    run.hook.remove()
    run.fit(steps=5, progress=True, hook=False)
    assert list(Bar.last.shown[0][1]) == ["loss"]


def test_without_a_hook_one_is_made_or_found():
    run = new_run()
    run.hook.remove()
    run.fit(steps=50, hook=None)
    (matrix,) = [each for each in run.flow.modules() if isinstance(each, InvertibleMatrix)]
    assert (matrix.draws == 2).all()  # N = 50
    hook = MergeHook(run.flow, every=5)
    run.fit(steps=10, hook=None)
    assert hook.is_active()
    assert (matrix.draws == 4).all()
    hook.remove()
    run.fit(steps=50, hook=False)
    assert (matrix.draws == 4).all()
    flow = nn.Sequential(P4InvTransform(2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(flow[1].parameters(), lr=0.1)
    fit(flow, [DATA], steps=2, optimizer=optimizer, progress=False, loss=square)
    assert driver_of(flow[0].matrix) is None


def square(flow, batch):
    return flow[1](batch).square().sum()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(value, tmp_path):
    run = new_run()
    calls = itertools.count(1)
    weights = []

    def loss(flow, batch):
        weights.append([p.detach().clone() for p in flow.parameters()])
        return noisy(flow, batch) * (value if next(calls) == 9 else 1.0)

    path = tmp_path / "checkpoint.pt"
    advice = r"step 9; the last good checkpoint is .*checkpoint\.pt \(step 8\)"
    with pytest.raises(FloatingPointError, match=f"loss is {value} at {advice}"):
        run.fit(loss=loss, checkpoint=path, checkpoint_every=4)
    assert_same(weights[-1], [p.detach() for p in run.flow.parameters()])
    assert all(parameter.isfinite().all() for parameter in run.flow.parameters())
    new_run(seed=1).fit(checkpoint=path, resume=True)


def broken(flow, batch):
    return noisy(flow, batch) * math.nan


def test_the_last_good_checkpoint_is_the_one_that_exists(tmp_path):
    path, other = tmp_path / "checkpoint.pt", tmp_path / "other.pt"
    with pytest.raises(FloatingPointError, match="at step 1; there is no checkpoint"):
        new_run().fit(loss=broken, checkpoint=path)
    with pytest.raises(FloatingPointError, match="at step 1; there is no checkpoint"):
        new_run().fit(loss=broken)
    new_run().fit(steps=6, checkpoint=path)
    for arguments in ({"checkpoint": path, "resume": True}, {"checkpoint": other, "resume": path}):
        message = r"at step 7; the last good checkpoint is .*checkpoint\.pt \(step 6\)"
        with pytest.raises(FloatingPointError, match=message):
            new_run().fit(loss=broken, **arguments)


def test_a_penalty_that_is_not_finite_stops_too():
    layer = P4InvTransform(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    hook = MergeHook(layer, optimizer)
    with torch.no_grad():
        layer.matrix.u.copy_(-layer.matrix.v / layer.matrix.v.square().sum()).mul_(1e38)

    def loss(flow, batch):
        return flow.bias.sum()

    arguments = {"optimizer": optimizer, "hook": hook, "loss": loss, "progress": False}
    with pytest.raises(FloatingPointError, match="loss is inf at step 1"):
        fit(layer, [None], steps=1, penalty=1e38, **arguments)
    fit(layer, [None], steps=1, **arguments)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "no space left")], ids=repr)
@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_a_fault_while_saving_leaves_a_whole_checkpoint(where, error, call, monkeypatch, tmp_path):
    """In the third checkpoint, halfway through the file, at the disk, or between two renames."""
    path = tmp_path / "run" / "checkpoint.pt"
    expected = new_run().fit()
    save, owner = torch.save, torch if where == "save" else os
    original, calls = getattr(owner, where), itertools.count(1)
    # A checkpoint is one save, one fsync of a file and one of its folder, one or two renames.
    failing = {"save": 3, "fsync": 1 + 2 * 2 + 1, "replace": 1 + 2 + call}[where]

    def faulty(*arguments):
        if next(calls) == failing:
            if where == "save":
                save(*arguments)
                arguments[1].truncate(1000 * call)
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, faulty)
        with pytest.raises(type(error)):
            new_run().fit(checkpoint=path, checkpoint_every=5)
    result = new_run(seed=1).fit(checkpoint=path, checkpoint_every=5, resume=True)
    assert torch.equal(result.losses, expected.losses)
    left = {file.name for file in path.parent.iterdir()}
    assert left <= {"checkpoint.pt", "checkpoint.pt.previous"} and "checkpoint.pt" in left


def flip_a_bit(path):
    # In the numbers themselves, where torch.load does not notice.
    flow = torch.load(path, weights_only=True)["parts"]["flow"]
    numbers = flow["_transform.bias"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(numbers) + 5] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_gives_way_to_the_previous_one(damage, tmp_path):
    path = tmp_path / "checkpoint.pt"
    expected = new_run().fit()
    new_run().fit(steps=15, checkpoint=path, checkpoint_every=5)
    damage(path)
    with pytest.warns(
        UserWarning, match=r"checkpoint\.pt is damaged .*: continuing from .*previous"
    ):
        result = new_run(seed=1).fit(resume=path)
    assert torch.equal(result.losses, expected.losses)
    damage(tmp_path / "checkpoint.pt.previous")
    run = new_run(seed=1)
    before = copy.deepcopy(run.flow.state_dict())
    with pytest.raises(ValueError, match=r"previous is damaged"):
        run.fit(resume=path)
    assert_same(run.flow.state_dict(), before)


def test_any_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"numbers": torch.arange(200.0), "count": 3, "name": "adam", "nested": [{"x": None}]}
    write_checkpoint(path, state)
    whole = path.read_bytes()
    assert_same(read_checkpoint(path)[0], state)
    generator = torch.Generator().manual_seed(0)
    unnoticed = 0
    for position in torch.randint(8 * len(whole), (200,), generator=generator).tolist():
        content = bytearray(whole)
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            read = read_checkpoint(path)[0]
        except DamagedCheckpointError:
            continue
        # Padding and time stamps of the archive hold nothing of the state.
        assert_same(read, state)
        unnoticed += 1
    assert unnoticed < 150


def test_the_folder_is_tried_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        new_run().fit(
            lambda generator: pytest.fail("a batch was drawn"),
            checkpoint=tmp_path / "file" / "checkpoint.pt",
        )
    new_run().fit(steps=1, checkpoint=tmp_path / "checkpoint.pt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "file"]


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    """sqrt(0) has a finite value and an infinite slope."""
    run = new_run()
    weights, calls = [], itertools.count(1)

    def loss(flow, batch):
        weights.append([p.detach().clone() for p in flow.parameters()])
        root = torch.sqrt((flow._transform.bias[0, 0] - flow._transform.bias[0, 0].detach()).abs())
        return noisy(flow, batch) + (root if next(calls) == 9 else 0.0)

    path = tmp_path / "checkpoint.pt"
    message = (
        r"the gradient of _transform\.bias is not finite at step 9; the last good .* \(step 8\)"
    )
    with pytest.raises(FloatingPointError, match=message):
        run.fit(loss=loss, checkpoint=path, checkpoint_every=4)
    assert_same(weights[-1], [p.detach() for p in run.flow.parameters()])
    resumed = new_run(seed=1).fit(checkpoint=path, resume=True)
    assert resumed.losses.isfinite().all()


def test_a_large_gradient_is_finite():
    layer = P4InvTransform(2).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-200)
    arguments = {"optimizer": optimizer, "steps": 1, "progress": False}
    fit(layer, [None], loss=lambda flow, batch: 1e200 * flow.bias.sum(), **arguments)
    torch.testing.assert_close(layer.bias.detach(), torch.full((2,), -1.0, dtype=torch.float64))


class HostReads(TorchDispatchMode):
    """Counts reads of single numbers, each of which would wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten._local_scalar_dense
        return function(*args, **(kwargs or {}))


def test_a_step_reads_its_numbers_together():
    run = new_run()
    run.hook.remove()
    adam = torch.optim.Adam(run.flow.parameters(), foreach=False)
    arguments = {"optimizer": adam, "scheduler": None, "hook": None}
    run.fit(steps=1, **arguments)
    with HostReads() as few:
        run.fit(steps=2, **arguments)
    with HostReads() as many:
        run.fit(steps=12, **arguments)
    # Adam on the CPU reads its own step count, once for each of three parameters.
    assert many.count - few.count <= 3 * 10


def with_optimizer(kind):
    def build():
        run = new_run(seed=1)
        run.hook.remove()
        optimizer = kind(run.flow.parameters(), lr=0.1)
        hook = MergeHook(run.flow, optimizer)
        return Run(run.flow, {"optimizer": optimizer, "hook": hook})

    return build


def two_groups():
    run = new_run(seed=1)
    run.hook.remove()
    first, *others = run.flow.parameters()
    optimizer = torch.optim.Adam([{"params": [first]}, {"params": others}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5])
    hook = MergeHook(run.flow, optimizer)
    return Run(run.flow, {"optimizer": optimizer, "hook": hook, "scheduler": scheduler})


def other_flow(*arguments, **options):
    def build():
        flow = bent_stacked_flow(*arguments, **options)
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5])
        hook = MergeHook(flow, optimizer)
        return Run(flow, {"optimizer": optimizer, "hook": hook, "scheduler": scheduler})

    return build


def double_flow():
    run = other_flow(2, 2)()
    run.flow.double()
    return run


def other_bounds():
    run = new_run(seed=1)
    run.flow._transform.matrix.bounds = MergeBounds(update=(-5.0, 5.0))
    return run


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (other_flow(3, 2), r"of another architecture: \d+ tensors differ, first .* in the file"),
        (other_flow(2, 3), "of another architecture"),
        (other_flow(2, 2, rank=2), r"differ, first .*\bu: .*1\) torch.float32 in the file"),
        (double_flow, r"torch\.float32 in the file, .*torch\.float64 in the flow"),
        (with_optimizer(torch.optim.SGD), "'optimizer': 'Adam'.* this run has .*'SGD'"),
        (with_optimizer(torch.optim.Adam), "'scheduler': 'MultiStepLR'.* this run has"),
        (two_groups, r"another optimizer: parameter groups of \[3\].* expected \[1, 2\]"),
        (
            other_flow(2, 2),
            r"other settings \(hook\.every was 3 and is 50, hook\.force_every was 2",
        ),
        (other_bounds, r"bounds was 'MergeBounds\(update=\(-6\.0, 6\.0\).* and is .*\(-5\.0, 5\.0"),
    ],
)
def test_a_checkpoint_of_another_run_overwrites_nothing(build, message, tmp_path):
    path = tmp_path / "checkpoint.pt"
    new_run().fit(steps=4, checkpoint=path)
    run = build()
    parts = [run.flow, *run.arguments.values()]
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        run.fit(checkpoint=path, resume=True)
    assert_same([part.state_dict() for part in parts], before)
    assert torch.equal(torch.get_rng_state(), random)


def test_another_penalty_is_another_setting(tmp_path):
    path = tmp_path / "checkpoint.pt"
    new_run().fit(steps=4, checkpoint=path, penalty=0.1)
    with pytest.raises(ValueError, match=r"penalty was 0\.1 and is 0\.2"):
        new_run(seed=1).fit(checkpoint=path, penalty=0.2, resume=True)


def test_all_parts_are_loaded_or_none(monkeypatch, tmp_path):
    path = tmp_path / "checkpoint.pt"
    new_run().fit(steps=4, checkpoint=path)
    run = new_run(seed=1)
    before = copy.deepcopy(state_of(run))
    random = torch.get_rng_state()

    def broken_part(state):
        raise KeyError("last_epoch")

    with monkeypatch.context() as patch:
        patch.setattr(run.hook, "load_state_dict", broken_part)
        with pytest.raises(KeyError, match="last_epoch"):
            run.fit(checkpoint=path, resume=True)
    assert_same(state_of(run), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_checkpoint_of_other_batches(tmp_path):
    path = tmp_path / "checkpoint.pt"
    new_run().fit(loader(), steps=3, checkpoint=path)
    run = new_run(seed=1)
    before = copy.deepcopy(run.flow.state_dict())
    with pytest.raises(ValueError, match="batches end before the 3 that the checkpoint had taken"):
        run.fit([DATA], checkpoint=path, resume=True)
    assert_same(run.flow.state_dict(), before)
    with pytest.raises(ValueError, match=r"holds .*, this run has"):
        run.fit(sample, checkpoint=path, resume=True)
    assert_same(run.flow.state_dict(), before)


def test_a_checkpoint_beyond_the_last_step(tmp_path):
    path = tmp_path / "checkpoint.pt"
    new_run().fit(steps=6, checkpoint=path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is at step 6, beyond steps=5"):
        new_run().fit(steps=5, checkpoint=path, resume=True)


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(new_run().flow.state_dict(), path)
    with pytest.raises(ValueError, match="is no checkpoint of fit: it has no checksum"):
        new_run().fit(resume=path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be a positive int, got 0"),
        ({"steps": 1e3}, TypeError, "steps must be a positive int, got float"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be a positive int, got 0"),
        ({"penalty": 0.1, "hook": False}, ValueError, "penalty needs a hook: pass hook=MergeHook"),
        ({"resume": True}, ValueError, "resume=True needs checkpoint=, the file to continue from"),
        (
            {"batches": 3},
            TypeError,
            "batches must be a function of a generator, an iterable or a tensor of rows, got",
        ),
        (
            {"batches": []},
            ValueError,
            "batches ran out: pass an iterable that can be started again",
        ),
        ({"batches": iter([DATA])}, ValueError, "batches ran out"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        new_run().fit(**arguments)


def test_a_tensor_of_rows_is_shuffled_in_epochs(tmp_path):
    data = torch.arange(20.0).reshape(10, 2)
    seen = []

    def loss(flow, batch):
        seen.append(batch[:, 0].clone())
        return flow.weight.square().sum()

    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    options = {"optimizer": optimizer, "loss": loss, "batch_size": 4, "progress": False}
    file = tmp_path / "run.pt"
    p4flows.fit(layer, data, steps=4, checkpoint=file, **options)
    for first, second in ((0, 1), (2, 3)):  # two batches an epoch, the odd rest is left out
        rows = torch.cat([seen[first], seen[second]])
        assert len(rows.unique()) == 8
    assert not torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))
    p4flows.fit(layer, data, steps=6, checkpoint=file, resume=True, **options)
    resumed = [rows.clone() for rows in seen]
    # As if it had not been interrupted: the order of the epochs is that of the generator.
    seen.clear()
    torch.manual_seed(0)
    p4flows.fit(layer, data, steps=6, **options)
    for interrupted, whole in zip(resumed, seen, strict=True):
        assert torch.equal(interrupted, whole)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.ones(5, 2, dtype=torch.int64), TypeError, "must be a floating-point tensor"),
        (torch.ones(0, 2), ValueError, r"must have rows, shape \(N, ...\), got \(0, 2\)"),
        (torch.ones(5), ValueError, "must have rows"),
    ],
)
def test_a_tensor_of_something_else_is_refused(data, error, message):
    flow = p4flows.bent_stacked_flow(2, 1)
    with pytest.raises(error, match=message):
        p4flows.fit(flow, data, steps=1, optimizer=torch.optim.Adam(flow.parameters()))


def test_lbfgs_fits_a_gaussian():
    data = torch.randn(400, 2) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]]) + 3.0
    flow = Flow(p4flows.P4InvTransform(2), StandardNormal([2]))
    optimizer = torch.optim.LBFGS(flow.parameters(), lr=0.5, max_iter=5)
    hook = p4flows.MergeHook(flow, optimizer, every=5)
    result = p4flows.fit(
        flow, data, steps=20, optimizer=optimizer, hook=hook, batch_size=400, progress=False
    )
    covariance = torch.cov(data.T, correction=0)
    entropy = 0.5 * torch.logdet(2 * torch.pi * torch.e * covariance)
    assert result.losses[-1].item() == pytest.approx(entropy.item(), abs=0.02)
    assert hook.stats.merged == 4
