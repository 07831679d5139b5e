"""The example of Section 4.2 from training to figure and table, at a toy's length."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import toy_density as example

from p4flows.toy import TARGETS


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(example.PRESETS, "short", example.Preset(2, 5, batch=20))
    monkeypatch.setattr(example, "EVALUATION_SAMPLES", 300)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(model, output):
    return example.run("moons", model, "short", 0, output, progress=False)


@pytest.mark.parametrize("model", example.MODELS)
def test_a_run_is_recorded_and_not_repeated(model, tmp_path):
    record = run(model, tmp_path)
    assert math.isfinite(record["kl_nats"]) and record["round_trip_error"] < 1e-3
    assert (record["merges"] is None) == (model == "realnvp")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert run(model, tmp_path) == record
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == written


def test_an_interrupted_run_continues_from_its_checkpoint(tmp_path):
    whole = run("p4inv", tmp_path / "whole")
    half = example.Preset(1, 5, batch=20)
    checkpoint = tmp_path / "moons-p4inv-short-0.pt"
    example.train(TARGETS["moons"], example.MODELS["p4inv"], half, 0, checkpoint, progress=False)
    record = run("p4inv", tmp_path)
    assert record["kl_nats"] == whole["kl_nats"]


def test_figures_and_table_have_all_models(tmp_path):
    models = list(example.MODELS)
    records = [run(model, tmp_path) for model in models]
    lines = example.table(records, "the command").splitlines()
    assert lines[0] == "`the command`" and len(lines) == 4 + len(models)
    columns = example.pictures("moons", models, "short", 0, tmp_path)
    assert len(example.figure_of_one(TARGETS["moons"], columns).axes) == 2 * (1 + len(models))
    figure = example.figure_of_all({"moons": columns, "circles": columns})
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [title for title, *_ in columns] + [""] * len(columns)
    example.plt.close("all")
