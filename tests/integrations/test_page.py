"""Each section of docs/inside_other_loops.md has a test file here, and each file a section."""

from pathlib import Path

from test_readme import python_blocks

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "inside_other_loops.md"


def test_sections_and_files():
    sections = [block.heading for block in python_blocks(PAGE.read_text(encoding="utf-8"))]
    files = {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
    assert {f"test_{section.lower()}.py" for section in sections} == files
    assert len(sections) == len(files)
