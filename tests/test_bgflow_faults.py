"""What fails with bgflow's own P4 layer works here, and the script that shows both is right."""

import sys
from pathlib import Path

import pytest
from needs_bgflow import needs_bgflow

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bgflow_faults
from bgflow_faults import CASES, Bgflow, P4flows


@pytest.fixture(autouse=True)
def keep_module(monkeypatch):
    """Spawned processes look the module up by name; tests/test_benchmarks.py forgets it."""
    monkeypatch.setitem(sys.modules, "bgflow_faults", bgflow_faults)


@pytest.mark.parametrize("name", CASES)
def test_works_here(name):
    outcome = CASES[name](P4flows())
    assert outcome.good, outcome.seen


@needs_bgflow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_fails_there(name):
    outcome = CASES[name](Bgflow())
    assert not outcome.good, outcome.seen
