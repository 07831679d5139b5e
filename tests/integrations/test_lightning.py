"""P4 layers in Lightning's Trainer: fits, the learning-rate finder, checkpoints, averages."""

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from integrations.trained import (
    LIBRARIES_WARN,
    assert_equal,
    assert_right,
    assert_serves_its_own_map,
    matrices,
)
from p4flows import AveragedModel

pytest.importorskip("lightning", reason="needs the extra `integrations`")

import lightning
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner

pytestmark = LIBRARIES_WARN


@pytest.fixture
def density(section):
    return section("Lightning")["Density"]


@pytest.fixture
def trainer(tmp_path):
    def of(epochs):
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )

    return of


def loader():
    """Five batches."""
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) + 1.0
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=8)


def test_a_resumed_run_is_the_uninterrupted_one(density, trainer, tmp_path):
    def fresh():
        torch.manual_seed(5)
        return density()

    whole = fresh()
    trainer(4).fit(whole, loader())
    assert whole.hook.stats.merged == 4 * 5 // 3

    half = fresh()
    interrupted = trainer(2)
    interrupted.fit(half, loader())
    interrupted.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh()
    trainer(4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.hook.stats == whole.hook.stats
    assert_equal(resumed, whole)
    assert_right(resumed)


def test_a_second_fit_goes_on(density, trainer):
    module = density()
    trainer(2).fit(module, loader())
    trainer(1).fit(module, loader())
    # Steps are counted on: 10 and 5 of them.
    assert module.hook.stats.merged == 5
    assert module.flow.sample(7).shape == (7, 4)


def test_learning_rate_finder(density, trainer):
    class Tuned(density):
        def __init__(self):
            super().__init__()
            self.lr = 1e-2

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    module = Tuned()
    fitting = trainer(3)
    # It trains with an optimizer of its own, and puts the weights back.
    Tuner(fitting).lr_find(module, loader(), num_training=20)
    before = module.hook.stats.merged
    fitting.fit(module, loader())
    assert module.hook.stats.merged == before + 5
    assert_right(module)


def test_average(density, trainer):
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
    trainer(3).fit(module, loader())
    average = module.averaged.module
    assert_right(average)
    assert not torch.equal(matrices(average)[0].frozen, matrices(module.flow)[0].dense())


def test_lightnings_own_average(density, trainer):
    """It is put into the module at the end, and everything derived follows."""
    module = density()
    fitting = trainer(20)
    fitting.callbacks.append(EMAWeightAveraging(decay=0.9))
    fitting.fit(module, loader())
    assert module.hook.stats.merged == 20 * 5 // 3
    assert_serves_its_own_map(module)
    assert_right(module)
    with torch.no_grad():
        noise, _ = module.flow._transform(loader().dataset.tensors[0])
    assert noise.mean().abs() < 0.2
