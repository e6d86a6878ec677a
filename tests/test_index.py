"""docs/index.md leads to every page, and each page can be reached from the README."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def links(page: Path) -> set[Path]:
    found = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    return {(page.parent / link).resolve() for link in found if not link.startswith("https://")}


def test_the_index_names_every_page_and_the_notebook() -> None:
    pages = {path for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")} - {ROOT / "docs/index.md"}
    assert pages - links(ROOT / "docs/index.md") == set()


def test_the_readme_leads_to_index_tutorial_runpod_and_troubleshooting() -> None:
    wanted = {"index", "tutorial", "runpod", "troubleshooting", "cards", "faq", "glossary", "CHANGELOG"}
    assert wanted <= {path.stem for path in links(ROOT / "README.md")}


def test_every_word_of_the_glossary_stands_once_and_in_order() -> None:
    words = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)[2:]
    plain = [word.casefold() for word in words]
    assert plain == sorted(set(plain)) and len(plain) > 30
