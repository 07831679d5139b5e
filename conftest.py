"""What pytest does not collect by itself."""

# Cannot be imported without bgflow; tests/test_bgflow.py runs its doctests where bgflow is there.
collect_ignore = ["p4flows/bgflow.py"]
