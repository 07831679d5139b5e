import importlib
import sys

import pytest


@pytest.mark.parametrize(
    "source", ["raise ImportError('no bgflow')", "import numpy; numpy.removed"]
)
def test_import_without_bgflow_says_how_to_install_it(source, tmp_path, monkeypatch):
    """Missing, or broken by numpy 2, of which it uses a constant that is gone."""
    (tmp_path / "bgflow.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "bgflow"] + ["p4flows.bgflow"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"needs bgflow and numpy < 2: docs/bgflow.md"):
        importlib.import_module("p4flows.bgflow")
