"""bgflow, or None and the reason why the tests that need it are skipped.

Where it is not installed, a checkout beside this repository is taken, or the one that the
environment variable BGFLOW names.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy
import pytest

CHECKOUT = Path(os.environ.get("BGFLOW", Path(__file__).parents[2] / "bgflow"))
if importlib.util.find_spec("bgflow") is None and (CHECKOUT / "bgflow/__init__.py").exists():
    sys.path.append(str(CHECKOUT))
# The one thing that bgflow misses in NumPy 2.
numpy.infty = numpy.inf

bgflow: ModuleType | None
with warnings.catch_warnings():
    # Its docstrings have invalid escape sequences, of which Python warns when it compiles them.
    warnings.simplefilter("ignore")
    try:
        import bgflow
    except (ImportError, AttributeError) as error:  # AttributeError: numpy 2
        bgflow = None
        cause = f" ({error})"
        if str(CHECKOUT) in sys.path:
            sys.path.remove(str(CHECKOUT))  # or others would find it, and fail
    else:
        cause = ""

needs_bgflow = pytest.mark.skipif(
    bgflow is None,
    reason=f"needs bgflow{cause}: make bgflow BGFLOW=checkout",
)
if bgflow is not None:
    # Loud when this fails although bgflow is there.
    import p4flows.bgflow  # noqa: F401
