"""P4 layers in sbi's loop: `train()` again, pickles, samples of the posterior."""

import pickle

import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_equal, assert_right, matrices

pytest.importorskip("sbi", reason="needs the extra `integrations`")

pytestmark = LIBRARIES_WARN


def test_trains_again_and_resumes(section):
    names = section("sbi")
    inference = names["inference"]
    assert names["samples"].shape == (100, 3)
    assert names["estimator"].hook.stats.merged == 0

    # Another optimizer, with the steps of the first one counted: 10 and 90 of them.
    estimator = inference.train(
        max_num_epochs=45, stop_after_epochs=45, force_first_round_loss=True
    )
    assert estimator.hook.stats.merged == 2 * len(matrices(estimator))

    def resume(inference):
        torch.manual_seed(3)
        return inference.train(max_num_epochs=70, stop_after_epochs=70, resume_training=True)

    unpickled = pickle.loads(pickle.dumps(inference))
    estimator, resumed = resume(inference), resume(unpickled)
    assert resumed.hook.stats == estimator.hook.stats
    assert resumed.hook.stats.merged == 3 * len(matrices(resumed))
    assert_equal(resumed, estimator)
    assert_right(resumed)
    posterior = pickle.loads(pickle.dumps(unpickled.build_posterior()))
    samples = posterior.sample((200,), x=torch.zeros(3), show_progress_bars=False)
    assert samples.std(0).max() < 1.0  # 1.2 without data, 0.3 at best
