"""P4 layers in the Trainer of transformers: it trains, saves by safetensors and resumes."""

import pytest
import torch

from integrations.trained import LIBRARIES_WARN, assert_equal, assert_right

pytest.importorskip("transformers", reason="needs the extra `integrations`")

from transformers import Trainer, TrainingArguments

pytestmark = LIBRARIES_WARN


def test_a_resumed_run_is_the_uninterrupted_one(section, tmp_path):
    names = section("Hugging Face")
    whole = names["model"]
    assert whole.hook.stats.merged == 6
    assert_right(whole)

    torch.manual_seed(9)
    resumed = names["Density"]()
    arguments = TrainingArguments("run", max_steps=60, save_steps=30, **names["options"])
    trainer = Trainer(resumed, arguments, train_dataset=names["rows"])
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-30"))
    assert resumed.hook.stats == whole.hook.stats
    assert_equal(resumed, whole)


def test_what_is_learnt(section):
    names = section("Hugging Face")
    arguments = TrainingArguments("run", max_steps=300, save_strategy="no", **names["options"])
    model = names["Density"]()
    Trainer(model, arguments, train_dataset=names["rows"]).train()
    with torch.no_grad():
        found = model(torch.stack([row["x"] for row in names["rows"]]))["loss"].item()
    # 4 × 1.42 nats is the entropy.
    assert found == pytest.approx(4 * 1.42, abs=0.2)
