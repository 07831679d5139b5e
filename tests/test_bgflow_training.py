"""MergeHook under bgflow's own training: KLTrainer, BoltzmannGenerator and their utilities."""

import math

import numpy as np
import pytest
import torch
from needs_bgflow import bgflow, needs_bgflow
from transforms.registry import move

from p4flows import MergeBounds, MergeHook

if bgflow is not None:
    from bgflow.nn.training.trainers import LossReporter
    from bgflow.utils.train import ClipGradient, IndexBatchIterator

    from p4flows.bgflow import BentIdentityFlow, BentStackFlow, P4InvFlow

pytestmark = needs_bgflow

MEAN = torch.tensor([1.0, -2.0])
COVARIANCE = torch.tensor([[1.0, 0.9], [0.9, 2.0]])
ENTROPY_OF_PRIOR = math.log(2 * math.pi * math.e)
ENTROPY_OF_TARGET = ENTROPY_OF_PRIOR + 0.5 * torch.logdet(COVARIANCE).item()


def seed():
    torch.manual_seed(0)
    np.random.seed(0)  # bgflow shuffles data by it


def generator(*layers, target=None):
    prior = bgflow.NormalDistribution(2)
    return bgflow.BoltzmannGenerator(prior, bgflow.SequentialFlow(layers), target)


def gaussian():
    return bgflow.NormalDistribution(2, mean=MEAN, cov=COVARIANCE)


@pytest.fixture(scope="module")
def trained():
    """A generator trained by energy and by data, its hook and its trainer."""
    seed()
    bg = generator(P4InvFlow(2), P4InvFlow(2), target=gaussian())
    optimizer = torch.optim.Adam(bg.parameters(), lr=5e-3)
    hook = MergeHook(bg, optimizer, every=10, correct_every=5)
    trainer = bgflow.KLTrainer(bg, optim=optimizer)
    trainer.train(800, data=gaussian().sample(5000), batchsize=128)
    return bg, hook, trainer


def test_trainer_merges(trained):
    _, hook, _ = trained
    assert hook.stats.merged + hook.stats.skipped == 2 * 80
    assert hook.stats.merged > 80
    assert hook.stats.corrected == 2 * 16


def test_trainer_reaches_the_target(trained):
    """The target is in reach, so that both losses end at an entropy."""
    bg, _, trainer = trained
    with torch.no_grad():
        assert abs(bg.kldiv(20_000).mean() - ENTROPY_OF_PRIOR) < 0.03
        assert abs(bg.energy(gaussian().sample(20_000)).mean() - ENTROPY_OF_TARGET) < 0.03
    names, _, (kll, nll) = trainer.losses(n_smooth=50)
    assert names == ("KLL", "NLL")
    assert kll[-1] < kll[0] - 1.0 and nll[-1] < nll[0] - 1.0


@torch.no_grad()
def test_samples_energies_and_weights_are_consistent(trained):
    bg, _, _ = trained
    x, z, dlogp, energy, log_weights, weights = bg.sample(
        1000,
        with_latent=True,
        with_dlogp=True,
        with_energy=True,
        with_log_weights=True,
        with_weights=True,
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(bg.flow(x, inverse=True), (z, -dlogp), **close)
    torch.testing.assert_close(bg.energy(x), energy, **close)
    torch.testing.assert_close(log_weights, energy - gaussian().energy(x), **close)
    torch.testing.assert_close(weights, bg.log_weights(x).exp(), **close)
    found = bg.log_weights_given_latent(x, z, dlogp)
    torch.testing.assert_close(found, bg.log_weights(x), **close)


@torch.no_grad()
def test_reweighting():
    """Samples of a flow that is not the target, reweighted, have the target's moments."""
    seed()
    layer = P4InvFlow(2, init=torch.tensor([[1.3, 0.3], [0.3, 2.2]]))
    layer.transform.matrix.u.normal_(std=0.1)
    layer.transform.bias.copy_(torch.tensor([0.0, -2.5]))
    bg = generator(layer, BentIdentityFlow(), target=gaussian())
    x, log_weights = bg.sample(200_000, with_log_weights=True)
    assert 0.05 < bgflow.sampling_efficiency(log_weights).item() < 0.6
    weights = torch.softmax(log_weights, dim=0)
    mean = (weights * x).sum(0)
    assert (x.mean(0) - MEAN).abs().max() > 0.5
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.05)
    covariance = (weights * (x - mean)).mT @ (x - mean)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.1)


@torch.no_grad()
def test_density_integrates_to_one():
    seed()
    bg = generator(BentStackFlow(2, blocks=1), bgflow.InverseFlow(BentIdentityFlow()))
    move(bg, merges=1)
    edge, points = 32.0, 1601
    axis = torch.linspace(-edge, edge, points)
    density = bg.energy(torch.cartesian_prod(axis, axis)).neg().exp()
    assert abs(density.sum() * (2 * edge / (points - 1)) ** 2 - 1.0) < 1e-3


def test_trainer_trains_a_nonlinear_flow_by_energy_with_penalty():
    seed()
    target = bgflow.DoubleWellEnergy(2, b=-1.0, c=0.25)
    # ln|det A| = −4.6: the penalty of the paper begins at −2.
    first = P4InvFlow(2, init=0.1 * torch.eye(2), bounds=MergeBounds.paper())
    bg = generator(first, BentStackFlow(2, blocks=5), target=target)
    optimizer = torch.optim.Adam(bg.parameters(), lr=1e-2)
    hook = MergeHook(bg, optimizer, every=10)
    with torch.no_grad():
        before, penalty = bg.kldiv(5000).mean(), hook.penalty(0.1)
    trainer = bgflow.KLTrainer(
        bg, optim=optimizer, train_likelihood=False, custom_loss=lambda: hook.penalty(0.1)
    )
    trainer.reporter = LossReporter("KLL", "penalty")
    trainer.train(300, w_custom=1.0)
    assert penalty > 0.1 * 2.5**2 and hook.penalty(0.1) < 0.1 * penalty
    assert bg.kldiv(5000).mean() < before - 1.0
    assert hook.stats.merged > 100


def test_steps_that_the_trainer_skips_are_not_counted(capsys):
    """KLTrainer leaves out the step when a gradient is NaN; the hook sees optimizer steps."""
    bg = generator(P4InvFlow(2), target=gaussian())
    optimizer = torch.optim.Adam(bg.parameters())
    hook = MergeHook(bg, optimizer, every=1)
    data = torch.full((10, 2), torch.nan)
    bgflow.KLTrainer(bg, optim=optimizer, train_energy=False).train(3, data=data, batchsize=5)
    assert capsys.readouterr().out.count("found nan in grad") == 3
    assert hook.state_dict()["steps"] == 0 and hook.stats.merged == 0


def test_utilities_of_training():
    """Batches from their iterator, forces clipped by their module, losses in their reporter."""
    seed()
    layer, target = P4InvFlow(2), bgflow.GradientClippedEnergy(gaussian(), ClipGradient(10.0, 2))
    bg = generator(layer, BentStackFlow(2, blocks=2), target=target)
    optimizer = torch.optim.SGD(bg.parameters(), lr=3e-3, momentum=0.9)
    hook = MergeHook(bg, optimizer, every=20)
    data, reporter = gaussian().sample(1000), LossReporter("KLL", "NLL")
    for _ in range(40):
        for batch in IndexBatchIterator(len(data), 100):
            losses = bg.kldiv(100).mean(), bg.energy(data[batch]).mean()
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            reporter.report(*losses)
    assert hook.stats.merged + hook.stats.skipped == 5 * 20
    assert hook.stats.merged > 50
    kll, nll = reporter.recent(20).mean(-1)
    assert kll < ENTROPY_OF_PRIOR + 0.3 and nll < ENTROPY_OF_TARGET + 0.3
