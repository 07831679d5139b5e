"""A seeded slice of `make stress`: each check, with fewer cases."""

import sys

import pytest
import torch

CHECKS = {
    "corrections": lambda stress: stress.corrections(quick=True),
    "drift-2": lambda stress: stress.drift(2, 6_000, 20),
    "drift-64": lambda stress: stress.drift(64, 600, 2),
    "adversarial": lambda stress: stress.adversarial(4_000),
    "interrupted": lambda stress: stress.interrupted_merges(5),
    "faults": lambda stress: stress.faults_of_fit(),
    "killed": lambda stress: stress.killed_fits(2),
    "stale": lambda stress: stress.stale_backward(),
}


@pytest.fixture
def stress(script):
    if not sys.platform.startswith("linux"):
        pytest.skip("forks and reads /proc")
    return script("stress")


@pytest.mark.parametrize("name", CHECKS)
def test_nothing_fails(stress, name):
    torch.manual_seed(0)
    rows = [stress.Row(*row) for row in CHECKS[name](stress) if row is not None]
    assert rows
    for row in rows:
        assert row.cases > 0
        assert row.passed, row


def test_the_table_and_the_exit_status(stress, monkeypatch, capsys, tmp_path):
    def checks(quick, merges):
        def check():
            yield None
            yield stress.Row("a fault", 3, 2.0, 1.0)
            yield stress.Row("no number", 3, torch.nan, 1.0)
            yield stress.Row("all well", 3, 0.0, 0)

        return [check()]

    monkeypatch.setattr(stress, "checks", checks)
    monkeypatch.setattr(sys, "argv", ["stress", "--quick", "--json", str(tmp_path / "rows.json")])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit):
        stress.main()
    torch.set_num_threads(threads)
    table = capsys.readouterr().out
    assert "| a fault | 3 | 2 | 1 | FAILED |" in table
    assert "| no number | 3 | nan | 1 | FAILED |" in table
    assert "| all well | 3 | 0 | 0 | passed |" in table
    assert "all well" in (tmp_path / "rows.json").read_text()
