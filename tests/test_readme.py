"""The README's code runs as it stands."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


class Block(NamedTuple):
    heading: str
    line: int
    source: str


def python_blocks(text):
    """Every ```python block, under the last heading before it; `line` is where its code begins."""
    blocks, heading, language, source = [], "top", None, []
    for number, line in enumerate(text.splitlines(), start=1):
        if language is None:
            if line.startswith("```"):
                language, source = line[3:].strip(), []
            elif line.startswith("#"):
                heading = line.lstrip("#").strip()
        elif line.startswith("```"):
            if language == "python":
                blocks.append(Block(heading, number - len(source), "\n".join(source)))
            language = None
        else:
            source.append(line)
    assert language is None, f"a {language} block under {heading!r} has no end"
    return blocks


TEXT = README.read_text(encoding="utf-8")
BLOCKS = python_blocks(TEXT)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.heading)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Empty lines in front, so that a traceback names the README's own lines.
    code = compile("\n" * (block.line - 1) + block.source, str(README), "exec")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, {"__name__": "__main__"})


def test_blocks_are_found_under_their_heading():
    text = "# A\n```python\n# no heading\nx = 1\n```\n"
    text += "## B\n```bash\nls\n```\n```python\ny = 2\n```\n"
    assert python_blocks(text) == [Block("A", 3, "# no heading\nx = 1"), Block("B", 11, "y = 2")]


def test_a_block_without_end_is_refused():
    with pytest.raises(AssertionError, match="no end"):
        python_blocks("# A\n```python\nx = 1\n")
