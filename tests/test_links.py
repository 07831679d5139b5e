"""Links of README and documentation to files and headings of the repository lead there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def targets(text):
    """What the links and images of a page point to, those on the web left out."""
    found = LINK.findall(CODE.sub("", text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """Headings as they are addressed: lower case, hyphens for spaces, no punctuation."""
    fenced = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in HEADING.findall(fenced)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in targets(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: nothing at {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_links_are_found():
    text = "# A b, c!\n[x](one.md#two) ![y](p.png) [z](https://a.org/b) `[q](no.md)`\n"
    assert targets(text) == ["one.md#two", "p.png"]
    assert anchors(text) == {"a-b-c"}
    assert any(targets(page.read_text(encoding="utf-8")) for page in PAGES)
