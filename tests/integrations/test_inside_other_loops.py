"""docs/inside_other_loops.md, section by section, and what it says of resuming and replacing."""

from pathlib import Path

import pytest
import torch
from test_readme import python_blocks
from torch import nn

from p4flows import MergeHook, P4InvTransform, PerturbedMatrix
from p4flows.attaching import driver_of

PAGE = Path(__file__).parents[2] / "docs" / "inside_other_loops.md"
MODULES = {"Lightning": "lightning", "Accelerate": "accelerate"}
BLOCKS = {block.heading: block for block in python_blocks(PAGE.read_text(encoding="utf-8"))}

# The libraries warn of their own affairs; what p4flows warns of stays an error.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::p4flows.NotMergedWarning"),
]


def section(library, tmp_path, monkeypatch):
    """The names that the section's code leaves behind."""
    pytest.importorskip(MODULES.get(library, library), reason="needs the extra `integrations`")
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[library]
    torch.manual_seed(0)
    names = {"__name__": "page"}
    exec(compile("\n" * (block.line - 1) + block.source, str(PAGE), "exec"), names)
    return names


def matrices(module):
    return [each for each in module.modules() if isinstance(each, PerturbedMatrix)]


def hook_of(module):
    hooks = {driver_of(matrix) for matrix in matrices(module)}
    assert len(hooks) == 1
    return hooks.pop()


def assert_right(module):
    for matrix in matrices(module):
        assert bool(matrix.error().is_right(matrix.size, matrix.frozen.dtype).all())


def test_sbi(tmp_path, monkeypatch):
    names = section("sbi", tmp_path, monkeypatch)
    estimator, inference = names["estimator"], names["inference"]
    assert names["samples"].shape == (100, 3)
    trained = inference._neural_net
    hook = hook_of(trained)
    merged = hook.stats.merged
    inference.train(max_num_epochs=60, stop_after_epochs=60, force_first_round_loss=True)
    hook_after = hook_of(inference._neural_net)
    assert hook_after.stats.merged > merged
    assert_right(inference._neural_net)
    assert isinstance(estimator, nn.Module)


def test_nessai(tmp_path, monkeypatch):
    names = section("nessai", tmp_path, monkeypatch)
    options = {key: names[key] for key in ("flow_config", "training_config")}
    model = names["FlowModel"](**options, output=str(tmp_path))
    model.initialise()
    assert any(isinstance(layer, P4InvTransform) for layer in model.model.modules())
    data = torch.randn(600, 4).numpy()
    model.train(data, max_epochs=40, patience=40)
    hook = model.model.hook
    first = hook.stats.merged
    assert first > 0
    model.reset_model(weights=True)
    for matrix in matrices(model.model):
        assert torch.equal(matrix.frozen, torch.eye(4)[: matrix.size, : matrix.size])
    model.train(data, max_epochs=40, patience=40)
    assert hook is model.model.hook and hook.stats.merged > first
    assert_right(model.model)
    model.save_weights(str(tmp_path / "weights.pt"))
    x, log_prob = model.sample_and_log_prob(N=5)
    model.load_weights(str(tmp_path / "weights.pt"))
    assert x.shape == (5, 4)
    _, again = model.forward_and_log_prob(x)
    assert abs(again - log_prob).max() < 1e-3


def test_glasflow(tmp_path, monkeypatch):
    names = section("glasflow", tmp_path, monkeypatch)
    assert names["hook"].stats.merged == 6
    assert names["flow"].sample(7).shape == (7, 4)
    assert_right(names["flow"])


def lightning_trainer(lightning, tmp_path, epochs):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )


def loader():
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) + 1.0
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=8)


def test_lightning(tmp_path, monkeypatch):
    names = section("Lightning", tmp_path, monkeypatch)
    lightning, density = names["lightning"], names["Density"]

    def fresh():
        torch.manual_seed(5)
        return density()

    whole = fresh()
    lightning_trainer(lightning, tmp_path, 4).fit(whole, loader())
    assert hook_of(whole).stats.merged == 4 * 5 // 3

    half = fresh()
    trainer = lightning_trainer(lightning, tmp_path, 2)
    trainer.fit(half, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh()
    lightning_trainer(lightning, tmp_path, 4).fit(
        resumed, loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

    # The learning-rate finder trains with optimizers of its own, and puts everything back.
    merged = hook_of(resumed).stats.merged
    lightning_trainer(lightning, tmp_path, 2).fit(resumed, loader())
    assert hook_of(resumed).stats.merged > merged
    assert_right(resumed)


def test_lightning_learning_rate_finder(tmp_path, monkeypatch):
    names = section("Lightning", tmp_path, monkeypatch)
    lightning, density = names["lightning"], names["Density"]
    from lightning.pytorch.tuner import Tuner

    class Tuned(density):
        def __init__(self):
            super().__init__()
            self.lr = 1e-2

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    module = Tuned()
    trainer = lightning_trainer(lightning, tmp_path, 3)
    Tuner(trainer).lr_find(module, loader(), num_training=20)
    trainer.fit(module, loader())
    assert hook_of(module).stats.merged > 0
    assert_right(module)


def test_lightning_average(tmp_path, monkeypatch):
    names = section("Lightning", tmp_path, monkeypatch)
    lightning, density = names["lightning"], names["Density"]
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    from p4flows import AveragedModel

    class Averaged(density):
        def __init__(self):
            super().__init__()
            self.averaged = AveragedModel(
                self.flow, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
            )

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.averaged.update_parameters(self.flow)

        def configure_optimizers(self):
            return torch.optim.Adam(self.flow.parameters(), lr=1e-2)

    module = Averaged()
    lightning_trainer(lightning, tmp_path, 3).fit(module, loader())
    average = module.averaged.module
    assert_right(average)
    assert not torch.equal(matrices(average)[0].frozen, matrices(module.flow)[0].dense())


def test_accelerate(tmp_path, monkeypatch):
    names = section("Accelerate", tmp_path, monkeypatch)
    assert names["hook"].stats.merged == 2
    accelerator, flow, optimizer = (names[key] for key in ("accelerator", "flow", "optimizer"))
    hook = MergeHook(flow, optimizer, every=7)

    def train(steps):
        for _ in range(steps):
            loss = -flow.log_prob(torch.randn(16, 4)).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    train(10)
    accelerator.save_state(str(tmp_path / "state"))
    torch.manual_seed(3)
    train(10)
    expected = {name: value.clone() for name, value in flow.state_dict().items()}
    merged = hook.stats.merged
    train(5)
    accelerator.load_state(str(tmp_path / "state"))
    torch.manual_seed(3)
    train(10)
    assert hook.stats.merged == merged
    for name, value in expected.items():
        assert torch.equal(flow.state_dict()[name], value), name


def test_normflows(tmp_path, monkeypatch):
    names = section("normflows", tmp_path, monkeypatch)
    model, log_prob = names["model"], names["log_prob"]
    assert names["hook"].stats.merged == 8
    torch.testing.assert_close(model.log_prob(names["samples"]), log_prob, atol=1e-3, rtol=1e-3)
    assert names["loss"].item() == pytest.approx(4 * (1.42 + 0.69), abs=0.6)
    assert_right(model)


def test_zuko(tmp_path, monkeypatch):
    assert section("zuko", tmp_path, monkeypatch)["loss"].isfinite()


def test_freia(tmp_path, monkeypatch):
    names = section("FrEIA", tmp_path, monkeypatch)
    assert names["outputs"].shape == (2, 3, 8, 8) and names["logabsdet"].shape == (2,)
