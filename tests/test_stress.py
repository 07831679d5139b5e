"""A seeded slice of `make stress`: each check, with fewer cases."""

import sys

import pytest
import stress
import torch

CHECKS = {
    "corrections": lambda: stress.corrections(quick=True),
    "drift-2": lambda: stress.drift(2, 6_000, 20),
    "drift-64": lambda: stress.drift(64, 600, 2),
    "adversarial": lambda: stress.adversarial(4_000),
    "interrupted": lambda: stress.interrupted_merges(5),
    "faults": lambda: stress.faults_of_fit(),
    "killed": lambda: stress.killed_fits(2),
    "stale": lambda: stress.stale_backward(),
}


pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks and reads /proc"
)


@pytest.mark.parametrize("name", CHECKS)
def test_nothing_fails(name):
    torch.manual_seed(0)
    rows = [stress.Row(*row) for row in CHECKS[name]() if row is not None]
    assert rows
    for row in rows:
        assert row.cases > 0
        assert row.passed, row


def test_the_table_and_the_exit_status(monkeypatch, capsys, tmp_path):
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
