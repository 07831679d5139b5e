"""The example of Section 4.2 from training to figure and table, at a toy's length."""

import itertools
import math
import sys

import pytest
import torch
import toy_density as example
from toy_targets import TARGETS


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


def test_an_interrupted_run_continues_from_its_checkpoint(tmp_path, monkeypatch):
    whole = run("p4inv", tmp_path / "whole")
    sample, calls = example.TARGETS["moons"].sample, itertools.count(1)

    class Stops:
        name, limits, has_log_density = "moons", 4.0, True

        def sample(self, *arguments):
            if next(calls) == 8:
                raise KeyboardInterrupt
            return sample(*arguments)

    checkpoint = tmp_path / "moons-p4inv-short-0"
    fit = example.fit
    monkeypatch.setattr(example, "fit", lambda *a, **k: fit(*a, **(k | {"checkpoint_every": 1})))
    with pytest.raises(KeyboardInterrupt):
        example.train(
            Stops(), example.MODELS["p4inv"], example.PRESETS["short"], 0, checkpoint, False
        )
    assert any(checkpoint.glob("*.ckpt"))
    record = run("p4inv", tmp_path)
    assert record["kl_nats"] == whole["kl_nats"]


def refuse(*arguments, **keywords):
    raise AssertionError("trains")


def test_figures_and_table_are_made_of_records_alone(tmp_path, monkeypatch, capsys):
    for name in ("moons", "circles"):
        for model in example.MODELS:
            if (name, model) != ("circles", "tuned"):
                example.run(name, model, "short", 0, tmp_path, progress=False)
    monkeypatch.setattr(example, "fit", refuse)
    arguments = ["--all", "--preset", "short", "--compare", "--tuned", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["toy_density", *arguments, "--figures"])
    example.main()
    printed = capsys.readouterr()
    assert f"missing: {tmp_path / 'circles-tuned-short-0.json'}" in printed.err
    text = (tmp_path / "all-short.md").read_text()
    assert text in printed.out and len(text.splitlines()) == 4 + 5
    assert "| moons | P4Inv, tuned |" in text and ", seed 0; commit " in text
    for name in ("all", "moons", "circles"):
        assert (tmp_path / f"{name}-short.png").stat().st_size > 0
    example.plt.close("all")


def test_figures_have_a_column_for_each_model(tmp_path):
    files = [tmp_path / f"moons-{model}-short-0.json" for model in example.MODELS]
    records = {
        file: run(model, tmp_path) for file, model in zip(files, example.MODELS, strict=True)
    }
    columns = example.pictures(records)["moons"]
    assert len(example.figure_of_one(TARGETS["moons"], columns).axes) == 2 * (1 + len(files))
    figure = example.figure_of_all({"moons": columns, "circles": columns[:-1]})
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [title for title, *_ in columns] + [""] * len(columns)
    # What is drawn is what the trained flow gives.
    target, short = TARGETS["moons"], example.PRESETS["short"]
    flow, _ = example.train(
        target, example.MODELS["p4inv"], short, 0, tmp_path / "moons-p4inv-short-0", False
    )
    (_, samples, log_density) = columns[2]
    torch.manual_seed(0)
    torch.testing.assert_close(samples, flow.sample(300))
    with torch.no_grad():
        torch.testing.assert_close(log_density, flow.log_prob(example.grid(target.limits)))
    example.plt.close("all")
