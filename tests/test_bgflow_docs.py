"""The code of docs/bgflow.md runs as it stands, from top to bottom."""

from pathlib import Path

import torch
from needs_bgflow import needs_bgflow
from test_readme import python_blocks

DOCUMENT = Path(__file__).parent.parent / "docs" / "bgflow.md"


@needs_bgflow
def test_code_runs():
    blocks = python_blocks(DOCUMENT.read_text(encoding="utf-8"))
    assert len(blocks) == 3
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            # Empty lines in front, so that a traceback names the document's own lines.
            source = "\n" * (block.line - 1) + block.source
            exec(compile(source, str(DOCUMENT), "exec"), names)
    assert names["samples"].shape == (1000, 2)
    x = torch.randn(5, 2)
    torch.testing.assert_close(names["ours"](x), names["theirs"](x))
