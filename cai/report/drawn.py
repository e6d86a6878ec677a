"""Pictures that stand are not drawn again: eval/pictures.json says what each was drawn from and what came out.

Owns that file: a key over the chart, its place and what draws it (our code, matplotlib's version) -> sha256 of the
picture. Invariant: a picture is left or taken from the old page only if its own bytes have the digest of its key, so
that one that is lost, damaged or of other numbers is drawn again, to the same bytes. Drawing takes 2 s of a resume that
has nothing left to do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from markupsafe import Markup

from cai.report import drawing
from cai.report.charts import Chart
from cai.run import digests
from cai.store.files import holds, json_bytes, write_json_atomic
from cai.store.jsonl import read_object

DRAWS = ("report/drawing.py", "report/scatter.py", "report/charts.py", "terminal.py")  # a change draws all again
PICTURE = re.compile(b'<svg class=".*?</svg>', re.DOTALL)  # as `drawing.page_svg` writes it: none is in another


class Standing:
    """The pictures that a run folder holds, before its pages are written again."""

    def __init__(self, run: Path) -> None:
        self.path = run / digests.PICTURES
        self.known = _known(self.path)
        self.of_page = _pictures(run / "report.html") if self.known else {}
        self.made: dict[str, str] = {}

    def inline(self, chart: Chart, id_: str) -> Markup:
        """As `drawing.inline`, its pictures taken from the page that stands where they are right."""
        found = []
        for form in drawing.forms(chart):
            key = _key(chart, id_, form)
            text = self.of_page.get(self.known.get(key, ""))
            if text is None:
                text = drawing.page_svg(chart, id_, form)
            self.made[key] = _digest(text.encode())
            found.append(Markup(text))
        return Markup("\n").join(found)

    def write_plots(self, folder: Path, charts: Iterable[Chart | None]) -> None:
        """As `drawing.write_plots`, but for charts of which both files are as they were drawn."""
        for chart in filter(None, charts):
            files = {_key(chart, chart.name, kind): folder / f"{chart.name}.{kind}" for kind in ("svg", "pdf")}
            odd = [path for key, path in files.items() if self.known.get(key, "") != _digest_of(path)]
            for path in odd:
                path.unlink(missing_ok=True)
            if odd:
                drawing.write_plots(folder, [chart])
            self.made |= {key: _digest_of(path) for key, path in files.items()}

    def write(self) -> None:
        """eval/pictures.json of what the pages show now; none where nothing is drawn."""
        if self.made and not holds(self.path, json_bytes(self.made)):
            self.path.parent.mkdir(exist_ok=True)
            write_json_atomic(self.path, self.made)


@lru_cache(maxsize=1)
def _drawn_by() -> str:
    here = Path(__file__).parents[1]
    return "\n".join([version("matplotlib"), *(digests.digest_of(here / name) for name in DRAWS)])


def _key(chart: Chart, place: str, form: str) -> str:
    return _digest("\n".join([_drawn_by(), place, form, repr(chart)]).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(path: Path) -> str:
    """Of a file; one that is none has a digest that no key has."""
    return digests.digest_of(path) if path.is_file() and not path.is_symlink() else "none"


def _known(path: Path) -> dict[str, str]:
    """Key -> digest; whatever else stands there counts as nothing known."""
    return {key: sha for key, sha in read_object(path).items() if isinstance(sha, str)}


def _pictures(page: Path) -> dict[str, str]:
    """Digest -> text of every picture of a page."""
    try:
        found: list[bytes] = PICTURE.findall(page.read_bytes())
    except OSError:
        return {}
    return {_digest(data): data.decode(errors="replace") for data in found}
