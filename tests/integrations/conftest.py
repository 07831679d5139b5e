"""The code of docs/inside_other_loops.md, section by section."""

from pathlib import Path

import pytest
import torch
from test_readme import python_blocks

PAGE = Path(__file__).parents[2] / "docs" / "inside_other_loops.md"


@pytest.fixture
def section(tmp_path, monkeypatch):
    """Runs the code of a library's section; the names that it leaves behind."""
    monkeypatch.chdir(tmp_path)
    blocks = {block.heading: block for block in python_blocks(PAGE.read_text(encoding="utf-8"))}

    def run(library):
        torch.manual_seed(0)
        names = {"__name__": "page"}
        # Empty lines in front, so that a traceback names the page's own lines.
        source = "\n" * (blocks[library].line - 1) + blocks[library].source
        exec(compile(source, str(PAGE), "exec"), names)
        return names

    return run
