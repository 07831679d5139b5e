"""The claims of Section 4.1, on matrices that are small enough for a test."""

import dataclasses
import sys

import linear_problems as example
import pytest
import torch
from linear_setups import PRESETS, PROBLEMS, Method

# The positive definite problem in its full size, to a loss that direct training reaches in 1,600
# steps; the others are small.
DEFINITE = dataclasses.replace(PRESETS["paper"], tolerance=1e-2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(problem, preset, **method):
    return example.train(PROBLEMS[problem], Method(**method), preset, seed=0)


def record(problem, preset, **method):
    return train(problem, preset, **method)["record"]


@pytest.fixture(scope="module")
def direct():
    """Steps of direct training."""
    return record("positive_definite", DEFINITE, kind="direct")["steps"]


@pytest.mark.parametrize(
    ("every", "rank", "draw", "low", "high"),
    [
        (1, 1, "normal", 0.95, 1.05),
        (10, 1, "normal", 1.1, 1.35),
        (50, 1, "normal", 2.0, 2.6),
        (50, 8, "normal", 1.02, 1.2),
        (10, 1, "basis", 0.95, 1.05),
        (50, 8, "basis", 0.95, 1.05),
    ],
)
def test_positive_definite_takes_so_many_times_the_steps(direct, every, rank, draw, low, high):
    found = record("positive_definite", DEFINITE, kind="p4inv", every=every, rank=rank, draw=draw)
    assert low < found["steps"] / direct < high
    assert found["worst_inverse_error"] < 1e-5
    assert found["logabsdet_error"] < 1e-5


def test_positive_definite_is_recovered_through_the_inverse():
    assert record("positive_definite", DEFINITE, kind="inverse")["steps"] is not None


def test_rotation_is_reached_and_the_inverse_stays_accurate_to_five_decimals():
    direct = record("rotation", PRESETS["quick"], kind="direct")
    found = record("rotation", PRESETS["quick"], kind="p4inv")
    assert found["steps"] < 1.1 * direct["steps"]
    assert found["worst_inverse_error"] < 1e-5
    assert found["sign"] == found["exact_sign"] == 1


def test_rotation_is_not_reached_through_the_inverse():
    found = record("rotation", PRESETS["quick"], kind="inverse", stuck_after=20_000)
    assert found["steps"] is None
    assert found["loss"] > 0.1
    assert found["inverse_error"] < 1e-5


@pytest.mark.parametrize(("every", "rank"), [(1, 1), (50, 8)])
def test_rotation_is_reached_within_the_orthogonal_matrices(every, rank):
    result = train(
        "rotation",
        PRESETS["quick"],
        kind="orthogonal",
        every=every,
        rank=rank,
        learning_rate=0.1,
    )
    assert result["record"]["steps"] is not None
    assert result["record"]["worst_inverse_error"] < 1e-5
    for eigenvalues in result["curves"]["eigenvalues"]:
        assert (eigenvalues.abs() - 1).abs().max() < 1e-5


@pytest.mark.parametrize("paper_bounds", [False, True])
def test_minus_identity_is_reached_across_the_singular_matrices(paper_bounds):
    direct = record("minus_identity", PRESETS["quick"], kind="direct")
    found = record("minus_identity", PRESETS["quick"], kind="p4inv", paper_bounds=paper_bounds)
    assert found["steps"] < 1.25 * direct["steps"]
    assert found["sign"] == found["exact_sign"] == -1
    assert found["inverse_error"] < 1e-5
    assert found["logabsdet_error"] < 1e-4
    assert bool(found["merges"]["forced"]) == paper_bounds


def test_minus_identity_is_not_reached_with_a_penalty():
    found = record(
        "minus_identity",
        PRESETS["quick"],
        kind="p4inv",
        paper_bounds=True,
        penalty=0.1,
        stuck_after=30_000,
    )
    assert found["steps"] is None
    assert found["sign"] == found["exact_sign"] == 1
    assert found["inverse_error"] < 1e-5


def test_the_script_writes_figures_and_table_and_continues(tmp_path, monkeypatch, capsys):
    methods = (Method("direct"), *(Method("p4inv", every=every) for every in (1, 2, 3)))
    problem = dataclasses.replace(
        PROBLEMS["minus_identity"], quick_size=3, steps=800, methods=methods
    )
    monkeypatch.setitem(PROBLEMS, "minus_identity", problem)
    arguments = ["linear_problems", "--problem", "minus_identity", "--workers", "1"]
    arguments += ["--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert len(kept) == 2 * len(methods)
    example.main()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == kept
    table = (tmp_path / "linear_problems-quick.md").read_text()
    assert "| −I, 3 | direct |" in table and "| −I, 3 | P4Inv, N=3 |" in table
    assert (tmp_path / "minus_identity-quick.png").stat().st_size > 0
    capsys.readouterr()

    # Of what is left, without training.
    baseline = example.record_file("minus_identity", 0, "quick", 0, tmp_path)
    baseline.unlink()
    (tmp_path / "minus_identity-quick.png").unlink()
    monkeypatch.setattr(example, "train", None)
    monkeypatch.setattr(sys, "argv", [*arguments, "--figures"])
    example.main()
    printed = capsys.readouterr()
    assert f"missing: {baseline}" in printed.err and "figure: " in printed.out
    rows = (tmp_path / "linear_problems-quick.md").read_text().splitlines()[4:]
    # No ratio without the baseline.
    assert len(rows) == 3 and all(row.split(" | ")[3] == "–" for row in rows)
    assert (tmp_path / "minus_identity-quick.png").stat().st_size > 0
    example.plt.close("all")
