"""The speed comparison with bgflow compares like with like, and a tiny run of it."""

import sys

import torch
from needs_bgflow import bgflow, needs_bgflow

if bgflow is not None:
    import bgflow_speed

    from p4flows.bgflow import P4InvFlow

pytestmark = needs_bgflow


def test_flows_are_the_same():
    for title, case in bgflow_speed.CASES.items():
        ours, theirs = (
            sum(p.numel() for p in flow().parameters()) for flow in (case.ours, case.theirs)
        )
        assert ours == theirs, title


def test_tiny_run(monkeypatch, capsys):
    case = bgflow_speed.Case((5, 4), lambda: P4InvFlow(4), lambda: bgflow.InvertiblePPPP(4))
    monkeypatch.setattr(bgflow_speed, "CASES", {"tiny": case})
    monkeypatch.setattr(sys, "argv", ["bgflow_speed.py", "--rounds", "1"])
    threads = torch.get_num_threads()
    bgflow_speed.main()
    torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2
    assert all(float(row.split("|")[-2]) > 0 for row in rows)
