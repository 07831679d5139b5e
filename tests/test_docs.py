"""The code of the documentation's pages runs as it stands, each page from top to bottom."""

from pathlib import Path

import pytest
import torch
from test_readme import python_blocks

DOCS = Path(__file__).parent.parent / "docs"
# At a toy's length: what a page says first, and what the test puts in its place.
SHORTER = {
    "density_2d": {"STEPS = 2_000": "STEPS = 20"},
    "recurrent": {"LENGTH, STEPS, SIZE = 40, 400, 32": "LENGTH, STEPS, SIZE = 4, 12, 8"},
}
# Parts of a script, or pages with a test of their own.
ELSEWHERE = {"image_patches", "bgflow", "your_own_molecule", "inside_other_loops"}
PAGES = [
    page
    for page in sorted(DOCS.glob("*.md"))
    if page.stem not in ELSEWHERE and python_blocks(page.read_text(encoding="utf-8"))
]


def test_pages_are_found():
    assert {"quick_start", "merging", *SHORTER} <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for long, short in SHORTER.get(page.stem, {}).items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    names = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in python_blocks(text):
            # Empty lines in front, so that a traceback names the page's own lines.
            source = "\n" * (block.line - 1) + block.source
            exec(compile(source, str(page), "exec"), names)
