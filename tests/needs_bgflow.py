"""bgflow, or None and the reason why the tests that need it are skipped."""

import warnings
from types import ModuleType

import pytest

bgflow: ModuleType | None
with warnings.catch_warnings():
    # Its docstrings have invalid escape sequences, of which Python warns when it compiles them.
    warnings.simplefilter("ignore")
    try:
        import bgflow
    except (ImportError, AttributeError) as error:  # AttributeError: numpy 2
        bgflow = None
        cause = f" ({error})"
    else:
        cause = ""

needs_bgflow = pytest.mark.skipif(
    bgflow is None,
    reason=f"needs bgflow and numpy < 2{cause}: docs/bgflow.md has the command to install them",
)
if bgflow is not None:
    # Loud when this fails although bgflow is there.
    import p4flows.bgflow  # noqa: F401
