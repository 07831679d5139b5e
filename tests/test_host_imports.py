"""Without the library that a room is for, importing it says how to get it."""

import importlib
import sys

import pytest

MISSING = "raise ImportError('not here')"
ROOMS = {
    "bgflow-missing": ("bgflow", MISSING, r"needs bgflow and numpy < 2: docs/bgflow\.md"),
    # NumPy 2 lacks a constant that it uses.
    "bgflow-broken": ("bgflow", "import numpy; numpy.removed", r"needs bgflow and numpy < 2"),
    "zuko-missing": ("zuko", MISSING, "needs zuko: pip install zuko"),
    "lightning-missing": ("lightning", MISSING, r"needs lightning: pip install 'p4flows\[train\]'"),
    "nessai-missing": ("nessai", MISSING, "needs nessai: pip install nessai"),
    "freia-missing": ("FrEIA", MISSING, "needs FrEIA: pip install FrEIA"),
}


@pytest.mark.parametrize(("host", "source", "message"), ROOMS.values(), ids=ROOMS)
def test_import_without_the_host_says_how_to_install_it(
    host, source, message, tmp_path, monkeypatch
):
    (tmp_path / f"{host}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    room = f"p4flows.{host.lower()}"
    for name in [n for n in sys.modules if n.partition(".")[0] == host] + [room]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=message):
        importlib.import_module(room)
