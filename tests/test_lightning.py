"""Training by Lightning: exact resume, whole checkpoints, errors that say what to do."""

import functools
import itertools
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs the extra `train`")

import lightning
from lightning.pytorch.callbacks import Callback

from p4flows import InvertibleMatrix, MergeHook, P4InvTransform, bent_stacked_flow, realnvp_flow
from p4flows.lightning import FlowModule, fit, load_flow, negative_log_likelihood

ROWS = torch.randn(50, 2, generator=torch.Generator().manual_seed(3)) * 0.5 + 1.0
STEPS = 11


def draw(generator):
    return torch.randn(8, 2, generator=generator) * 0.5 + 1.0


def loader(seed=None, **options):
    own = None if seed is None else torch.Generator().manual_seed(seed)
    rows = TensorDataset(ROWS[:32])
    return DataLoader(rows, batch_size=8, shuffle=True, generator=own, **options)


class Killed(BaseException):
    pass


def noisy(stop_at=0, error=Killed):
    """A loss that draws from the global random state, and fails at a training step."""
    calls = itertools.count(1)

    def loss(flow, batch):
        if torch.is_grad_enabled() and next(calls) == stop_at:
            raise error
        inputs = batch if isinstance(batch, torch.Tensor) else batch[0]
        return negative_log_likelihood(flow, inputs + 0.1 * torch.randn_like(inputs))

    return loss


def train(data=ROWS, *, start=0, stop_at=0, error=Killed, **options):
    """All that a script does, in a process that starts from a seed."""
    torch.manual_seed(start)
    flow = options.pop("flow", None) or bent_stacked_flow(2, 2)
    defaults = {
        "hook": MergeHook(flow, every=3, force_every=2),
        "loss": noisy(stop_at, error),
        "batch_size": 9,
        "steps_per_epoch": 4,
        "checkpoint_every": 1,
        "progress": False,
    }
    if "max_epochs" not in options:
        defaults["max_steps"] = STEPS
    return fit(flow, data, **(defaults | options))


def assert_same(one, other):
    """Two runs, to the last bit."""
    (flow, result), (other_flow, other_result) = one, other
    assert torch.equal(result.train, other_result.train)
    assert torch.equal(result.validation, other_result.validation)
    assert torch.equal(result.validation_steps, other_result.validation_steps)
    assert result.merges == other_result.merges
    for pair in zip(flow.state_dict().values(), other_flow.state_dict().values(), strict=True):
        assert torch.equal(*pair)


SOURCES = {
    "rows": lambda seed: ROWS,
    "function": lambda seed: draw,
    "loader": lambda seed: loader(),
    "loader-generator": loader,
}


@pytest.mark.parametrize(
    "options", [{}, {"max_epochs": 3, "average": 0.9}, {"validation": ROWS, "patience": 9}]
)
@pytest.mark.parametrize("stop_at", [5, 6, 8])
@pytest.mark.parametrize("kind", SOURCES)  # batches of 5, 4, 4 and 4 an epoch
def test_a_resumed_run_ends_as_an_uninterrupted_one(kind, stop_at, options, tmp_path):
    whole = train(SOURCES[kind](0), **options)
    with pytest.raises(Killed):
        train(SOURCES[kind](0), stop_at=stop_at, checkpoint=tmp_path, **options)
    resumed = train(SOURCES[kind](1), start=1, checkpoint=tmp_path, **options)
    assert_same(resumed, whole)
    assert whole[1].merges["merged"] > 0


def test_a_killed_process_goes_on_from_the_last_whole_checkpoint(tmp_path):
    """SIGKILL, by which nothing is tidied up, while a checkpoint is written."""
    script = f"""
import os, signal, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_lightning
save, calls = torch.save, iter(range(100))
def kill(checkpoint, file):
    if next(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    save(checkpoint, file)
torch.save = kill
test_lightning.train(checkpoint=sys.argv[1])
"""
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert (tmp_path / "step=7.ckpt").exists()
    assert_same(train(start=1, checkpoint=tmp_path), train())


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    first = train(checkpoint=tmp_path)
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    again = train(start=1, checkpoint=tmp_path, stop_at=1)
    assert_same(again, first)
    assert again[1].stopped == f"already at step {STEPS}"
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == written


def flip_a_bit(file):
    # In the numbers themselves, where torch.load does not notice.
    numbers = torch.load(file, weights_only=True)["state_dict"]["flow._transform.bias"]
    content = bytearray(file.read_bytes())
    content[content.index(numbers.numpy().tobytes()) + 5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda file: file.write_bytes(file.read_bytes()[:-100])]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    with pytest.raises(Killed):
        train(checkpoint=tmp_path, stop_at=8)
    damage(tmp_path / "step=7.ckpt")
    with pytest.warns(UserWarning, match=r"step=7\.ckpt is damaged"):
        resumed = train(start=1, checkpoint=tmp_path)
    assert_same(resumed, train())
    damage(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged"):
        assert_same(train(start=1, checkpoint=tmp_path), resumed)
    for file in tmp_path.glob("*.ckpt"):
        damage(file)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(FileNotFoundError, match="has no whole checkpoint"),
    ):
        train(checkpoint=tmp_path)


def test_a_full_disk_is_an_error_that_says_so(tmp_path):
    """A limit on the size of files, which the system answers as it does a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            if trainer.global_step == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))

    try:
        with pytest.raises(OSError, match="File too large"):
            train(checkpoint=tmp_path, callbacks=[Full()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_same(train(start=1, checkpoint=tmp_path), train())


def test_a_folder_that_cannot_be_made_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"tmp|file"):
        train(checkpoint=tmp_path / "file" / "run", stop_at=1)


def test_an_interrupt_stays_one(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=tmp_path, stop_at=7, error=KeyboardInterrupt)
    assert_same(train(start=1, checkpoint=tmp_path), train())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(value, tmp_path):
    calls = itertools.count(1)

    def loss(flow, batch):
        return negative_log_likelihood(flow, batch) * (value if next(calls) == 9 else 1.0)

    flow = bent_stacked_flow(2, 2)
    message = r"not finite at step 9: loss, .*; last good checkpoint: .*step=8\.ckpt"
    with pytest.raises(FloatingPointError, match=message):
        train(draw, flow=flow, loss=loss, checkpoint=tmp_path)
    assert all(bool(parameter.isfinite().all()) for parameter in flow.parameters())
    kept = load_flow(tmp_path, bent_stacked_flow(2, 2))
    assert all(bool(parameter.isfinite().all()) for parameter in kept.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    """sqrt(0) has a finite value and an infinite slope."""
    calls, weights = itertools.count(1), []

    def loss(flow, batch):
        bias = flow._transform.bias
        weights.append(bias.detach().clone())
        root = (bias[0, 0] - bias[0, 0].detach()).abs().sqrt()
        return negative_log_likelihood(flow, batch) + (root if next(calls) == 3 else 0.0)

    flow = bent_stacked_flow(2, 2)
    message = r"not finite at step 3: _transform\.bias; last good checkpoint: none"
    with pytest.raises(FloatingPointError, match=message):
        train(draw, flow=flow, loss=loss)
    assert torch.equal(flow._transform.bias.detach(), weights[-1])


def test_a_step_that_spoils_the_flow_is_not_saved(tmp_path):
    def huge(optimizer, steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: math.inf if n == 4 else 1.0)

    with pytest.raises(FloatingPointError, match=r"not finite .* 5: .*step=4\.ckpt"):
        train(draw, schedule=huge, checkpoint=tmp_path)
    kept = load_flow(tmp_path, bent_stacked_flow(2, 2))
    assert all(bool(parameter.isfinite().all()) for parameter in kept.parameters())


def test_a_large_gradient_is_finite():
    layer = P4InvTransform(2).double()
    options = {"optimizer": torch.optim.SGD, "learning_rate": 1e-200, "schedule": None}

    def loss(flow, batch):
        return 1e200 * flow.bias.sum()

    fit(layer, draw, max_steps=1, loss=loss, progress=False, **options)
    torch.testing.assert_close(layer.bias.detach(), torch.full((2,), -1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "batch_size was 9 and is 8"),
        ({"data": ROWS + 1e-3}, "data was .*checksum .* and is .*checksum"),
        ({"data": draw}, "data was .* and is <function draw"),
        ({"flow": bent_stacked_flow(2, 3)}, "_transform.*bias was .* and is"),
        ({"flow": bent_stacked_flow(2, 2).double()}, r"torch\.float32 and is .* torch\.float64"),
        ({"learning_rate": 0.1}, r"learning_rate was 0\.001 and is 0\.1"),
        ({"max_steps": 20}, f"max_steps was {STEPS} and is 20"),
        ({"hook": True}, "hook was MergeHook.* every=3.* and is MergeHook.* every=50"),
        ({"average": 0.9}, "average was None and is 0.9"),
        ({"validation": 0.2}, "validation was 0.1 and is 0.2"),
        ({"standardize": True}, "standardize was False and is True"),
    ],
)
def test_what_would_not_go_on_as_it_was_is_named(options, message, tmp_path):
    with pytest.raises(Killed):
        train(checkpoint=tmp_path, stop_at=6)
    written = {file: file.read_bytes() for file in tmp_path.iterdir()}
    flow = options.pop("flow", None) or bent_stacked_flow(2, 2)
    options = {"hook": MergeHook(flow, every=3, force_every=2), **options}
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    with pytest.raises(ValueError, match=f"cannot go on as it was: .*{message}"):
        train(checkpoint=tmp_path, flow=flow, **options)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == written
    if "standardize" not in options:
        assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_workers_that_live_on_are_refused(tmp_path):
    workers = loader(num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match=r"persistent_workers=True .* cannot be resumed exactly"):
        train(workers, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": 0}, ValueError, "max_steps must be a positive int, got 0"),
        ({"validation": 1.5}, ValueError, "not between 0 and 1"),
        ({"data": 3}, TypeError, "data must be rows, a DataLoader or a function, got int"),
        ({"data": (ROWS, ROWS[:4])}, ValueError, r"as many of context, got \(50, 2\), \(4, 2\)"),
        ({"data": draw, "patience": 3}, ValueError, "patience needs validation data"),
        ({"data": draw, "standardize": True}, ValueError, "standardize=True needs data as rows"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        train(**options)


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray], ids=["tensor", "numpy"])
def test_a_gaussian_is_learnt_from_rows(convert):
    rows = torch.randn(2_000, 2) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    flow = Flow(P4InvTransform(2), StandardNormal([2]))
    options = {"learning_rate": 2e-2, "progress": False}
    flow, result = fit(flow, convert(rows.double()), max_epochs=40, **options)
    entropy = 0.5 * torch.logdet(2 * torch.pi * torch.e * torch.cov(rows.T))
    assert -flow.log_prob(rows).mean().item() == pytest.approx(entropy.item(), abs=0.02)
    assert result.merges["merged"] == 40 * 7 // 50
    assert not flow.training


def test_lbfgs_takes_all_evaluations_of_a_step_from_one_batch():
    rows = torch.randn(400, 2) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]]) + 3.0
    flow = Flow(P4InvTransform(2), StandardNormal([2]))
    optimizer = functools.partial(torch.optim.LBFGS, max_iter=5)
    options = {"optimizer": optimizer, "learning_rate": 0.5, "schedule": None, "progress": False}
    hook = MergeHook(flow, every=5)
    flow, result = fit(
        flow, rows, validation=None, batch_size=400, max_steps=20, hook=hook, **options
    )
    entropy = 0.5 * torch.logdet(2 * torch.pi * torch.e * torch.cov(rows.T))
    assert -flow.log_prob(rows).mean().item() == pytest.approx(entropy.item(), abs=0.02)
    assert len(result.train) == 20 and result.merges["merged"] == 4


def test_rows_may_have_a_context():
    context = torch.randn(1_000, 2)
    flow = realnvp_flow(2, 2, hidden=(16,), context_features=2)
    options = {"learning_rate": 1e-2, "progress": False}
    rows = context + 0.3 * torch.randn(1_000, 2)
    flow, result = fit(flow, (rows, context), max_epochs=50, **options)
    # Without the context the entropy is that of N(0, 1.09): 2.9 nats; with it, 0.43.
    assert result.validation.min() < 1.5


def test_the_best_flow_comes_back_and_patience_ends_the_run(tmp_path):
    def worse(optimizer, steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1e3 if n > 10 else 1.0)

    held_out = ROWS[40:]
    options = {"validation": held_out, "patience": 2, "loss": negative_log_likelihood}
    flow, result = train(ROWS[:40], max_epochs=30, schedule=worse, checkpoint=tmp_path, **options)
    assert result.stopped == "no better validation in 2 epochs"
    best = result.validation.min().item()
    assert result.validation[-1] > best + 0.01 and result.steps < 30 * 4
    assert -flow.log_prob(held_out).mean().item() == pytest.approx(best, abs=1e-5)
    loaded = load_flow(tmp_path, bent_stacked_flow(2, 2))
    assert torch.equal(loaded.log_prob(held_out), flow.log_prob(held_out))
    again = train(ROWS[:40], max_epochs=30, schedule=worse, checkpoint=tmp_path, **options)
    assert again[1].stopped == f"already at step {result.steps}"


def test_the_average_is_what_comes_back(tmp_path):
    flow, result = train(draw, average=0.5, checkpoint=tmp_path)
    plain, other = train(draw)
    assert torch.equal(result.train, other.train)  # training does not see it
    assert not torch.equal(flow.log_prob(ROWS), plain.log_prob(ROWS))
    (matrix,) = (each for each in flow.modules() if isinstance(each, InvertibleMatrix))
    assert not matrix.u.any() and bool(matrix.error().is_right(2, torch.float32).all())
    loaded = load_flow(tmp_path, bent_stacked_flow(2, 2))
    assert torch.equal(loaded.log_prob(ROWS), flow.log_prob(ROWS))


FAR = ROWS * torch.tensor([1.0, 500.0]) + torch.tensor([0.0, 1_000.0])


def test_data_far_from_unit_scale_gets_one_warning():
    with pytest.warns(
        UserWarning, match=r"far from unit scale in columns \[1\]: .*standardize"
    ) as seen:
        train(FAR)
    assert len(seen) == 1


def test_standardize_puts_the_map_into_the_flow(tmp_path):
    options = {"standardize": True, "validation": None, "max_epochs": 40, "learning_rate": 1e-2}
    loss = negative_log_likelihood
    flow, _ = train(FAR, checkpoint=tmp_path, loss=loss, **options)
    same, _ = train((FAR - FAR.mean(0)) / FAR.std(0), loss=loss, **options | {"standardize": False})
    expected = same.log_prob((FAR - FAR.mean(0)) / FAR.std(0)) - FAR.std(0).log().sum()
    torch.testing.assert_close(flow.log_prob(FAR), expected, atol=1e-2, rtol=1e-3)
    torch.manual_seed(0)
    assert flow.sample(2_000)[:, 1].mean().item() == pytest.approx(FAR[:, 1].mean().item(), rel=0.1)
    loaded = load_flow(tmp_path, bent_stacked_flow(2, 2))
    assert torch.equal(loaded.log_prob(FAR), flow.log_prob(FAR))


def test_a_result_is_a_line_and_a_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, result = train()
    assert "\n" not in repr(result)
    assert f"steps={STEPS}" in repr(result) and "max_steps=11 reached" in repr(result)
    assert f"validation={result.validation.min():.4f}" in repr(result)
    axes = result.plot()
    train_curve, validation_curve = axes.get_lines()
    assert train_curve.get_ydata().tolist() == result.train.tolist()
    assert validation_curve.get_xdata().tolist() == [5, 10, 11]
    pyplot.close("all")


def test_there_is_a_bar_and_lightning_says_nothing_else(capfd):
    train(progress=True)
    text = "".join(capfd.readouterr())
    assert "Epoch 2" in text and "validation=" in text
    assert not {"GPU", "Trainer", "Tip"} & set(text.replace("`", " ").split())
    train()
    assert capfd.readouterr() == ("", "")


def test_callbacks_and_loggers_are_handed_on(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            trainer.should_stop = trainer.global_step == 60

    logger = CSVLogger(tmp_path)
    _, result = train(max_steps=100, callbacks=[Stop()], logger=logger)
    assert result.stopped == "stopped by a callback" and result.steps == 60
    (file,) = tmp_path.rglob("metrics.csv")
    header, *lines = file.read_text().splitlines()
    assert {"loss", "validation"} <= set(header.split(",")) and len(lines) > 10


def test_other_flows_train():
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    context = torch.randn(500, 1)
    rows = context + 0.3 * torch.randn(500, 2)
    options = {"max_epochs": 20, "learning_rate": 1e-2, "batch_size": 100, "progress": False}
    flow = zuko.flows.MAF(2, 1, transforms=1, hidden_features=(16,))
    flow, result = fit(flow, (rows, context), **options)
    assert result.validation[-1] < result.validation[0] - 0.5 and result.merges is None
    assert flow(context).log_prob(rows).shape == (500,)
    with pytest.raises(ValueError, match=r"standardize=True needs .* a Flow of nflows"):
        fit(flow, (rows, context), standardize=True, **options)


TWO_PROCESSES = """
import sys
import lightning, torch
from torch.utils.data import DataLoader, TensorDataset
from p4flows import realnvp_flow
from p4flows.lightning import FlowModule

torch.manual_seed(0)
module = FlowModule(realnvp_flow(2, 2, hidden=(8,)), average=0.9)
rows = DataLoader(TensorDataset(torch.randn(400, 2)), batch_size=4, shuffle=True)
held_out = DataLoader(TensorDataset(torch.randn(40, 2)), batch_size=10)
trainer = lightning.Trainer(
    strategy="ddp", accelerator="cpu", devices=2, max_steps=120, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, rows, held_out)
state = {"state": module.state_dict(), "best": module.best, "merged": module.hook.stats.merged}
torch.save(state, f"{sys.argv[1]}/{trainer.global_rank}.pt")
"""


def test_two_processes_end_with_the_same_numbers(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["merged"] == second["merged"] > 0
    for part in ("state", "best"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_checkpoint_of_a_trainer_gives_the_flow_back(tmp_path):
    torch.manual_seed(0)
    module = FlowModule(bent_stacked_flow(2, 2))
    trainer = lightning.Trainer(
        max_steps=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    flow = load_flow(tmp_path / "mine.ckpt", bent_stacked_flow(2, 2))
    assert torch.equal(flow.log_prob(ROWS), module.flow.eval().log_prob(ROWS))
    with pytest.raises(FileNotFoundError, match="has no whole checkpoint"):
        load_flow(tmp_path / "nothing", flow)
