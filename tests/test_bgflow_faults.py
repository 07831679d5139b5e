"""What fails with bgflow's own P4 layer works here, and the script that shows both is right."""

import pytest
from bgflow_faults import CASES, Bgflow, P4flows
from needs_bgflow import needs_bgflow


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
