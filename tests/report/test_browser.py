"""The pages in headless Chromium: axe finds no fault, nothing runs off the side, at 1280 and 400 px, light and dark.

`make test-page` installs axe and runs this; Chromium must be on the path. The copy under test differs from the page in
three ways: the policy that forbids scripts is taken out, axe is put in, and dark colours are taken without being asked.
"""

from __future__ import annotations

import html
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from support.experiment_pages import experiment_pages
from support.pages import item_rows, make_run, probe_rows, recipe, records

from cai.commands import review, review_blind
from cai.recipe.settings import HeldoutSection
from cai.report.pages import write_pages
from cai.report.snapshot import read_story

pytestmark = pytest.mark.browser
POLICY = '<meta http-equiv="Content-Security-Policy"'
LOOK = """
document.querySelectorAll("details").forEach(d => d.open = OPEN);
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const hint = e => getComputedStyle(e, "::before").display !== "none";
const regions = [...document.querySelectorAll(".scroll")].map(e => [e.scrollWidth > e.clientWidth + 1, hint(e)]);
const count = () => [...document.querySelectorAll(".listed > .example")].filter(e => e.offsetHeight > 0).length;
const pick = (id, value) => { const e = document.getElementById(id); if (e) { e.value = value; } return count(); };
const filters = [...document.querySelectorAll(".filters select")].map(e => [...e.options].map(
  o => [o.value, pick(e.id, o.value), o.value ? document.querySelectorAll(".listed > ." + o.value).length : count()])
  .concat([["", pick(e.id, ""), count()]]));
axe.run().then(found => parent.tell({wide, regions, filters, checked: found.passes.length, faults: found.violations.map(
  v => v.id + ": " + v.nodes.map(n => n.html.slice(0, 120)).join(" | "))}));
"""


def chromium() -> str:
    found = next(
        (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), ""
    )
    assert found, "make test-page needs Chromium on the path"
    return found


def axe() -> str:
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec and spec.origin, "make test-page installs axe-playwright-python"
    return (Path(spec.origin).parent / "axe.min.js").read_text()


def look(page: str, folder: Path, width: int, dark: bool, opened: bool) -> dict:
    """What axe says of a page in a frame of that width, and by how many pixels the page is too wide."""
    page = "\n".join(line for line in page.splitlines() if POLICY not in line)
    page = page.replace("@media (prefers-color-scheme: dark)", "@media all" if dark else "@media not all")
    script = LOOK.replace("OPEN", str(opened).lower())
    page = page.replace("</body>", f"<script>{axe()}</script><script>{script}</script></body>")
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
    tell = "function tell(x) { document.body.innerHTML = '<pre>' + encodeURIComponent(JSON.stringify(x)) + '</pre>' }"
    outer = folder / "outer.html"
    outer.write_text(f'<!doctype html><meta charset="utf-8"><script>{tell}</script><body>{frame}')
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=60000", "--dump-dom", f"--user-data-dir={folder / 'profile'}", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<body><pre>" in done.stdout, done.stderr[-2000:]
    return json.loads(unquote(done.stdout.split("<body><pre>")[1].split("</pre>")[0]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """A report with every part, one of an empty run, and the form of a review."""
    folder = tmp_path_factory.mktemp("runs")
    hostile = "</p><script>alert(1)</script> \u202egnirts " + "unbroken" * 60
    rows = [*records(), *item_rows(7, instruction=hostile, critique=hostile)]
    full = make_run(folder / "full", [*rows, *probe_rows()], recipe=recipe(items=8, heldout=HeldoutSection(items=1)))
    empty = make_run(folder / "empty", [])
    forms = review_pages(full, note="it quotes nothing " + "unbroken" * 60)
    forms |= blind_pages(full, hostile)
    for path in (full, empty):
        write_pages(path)
    return {"full": (full / "report.html").read_text(), "empty": (empty / "report.html").read_text(), **forms}


@pytest.fixture(scope="module")
def experiments(tmp_path_factory) -> dict[str, str]:
    """The pages of the experiments, with much on them and with next to nothing."""
    return experiment_pages(tmp_path_factory.mktemp("experiments"))


def review_pages(path: Path, note: str) -> dict[str, str]:
    """The form as it is first seen, at the longest text, after a mark that was refused, of a revision, and the end.

    As served: with the nonce of its script, which is what the headers let run.
    """
    found = {}
    with review.reviewing(read_story(path), "ann") as session:
        found["form"] = review.page(session, nonce="x")
        while session.pending:
            task = session.pending[0]
            if "unbroken" in task.case.instruction and "form-long" not in found:
                found["form-long"] = review.page(session, nonce="x")
            if session.can_undo and "form-again" not in found:
                found["form-again"] = review.page(session, "That text is marked already, or no mark was chosen.", "x")
            if task.what == "revision":
                found["form-revision"] = review.page(session, nonce="x")
            assert session.mark(session.ticket(task), "skip", note)
        found["form-done"] = review.page(session, nonce="x")
    return found


def blind_pages(path: Path, hostile: str) -> dict[str, str]:
    """The form with two answers beside each other: hostile and empty ones, and short ones after a mark."""
    rows = [
        {"metric": "preference.fresh", "item": item, "round": 0, "prompt": prompt, "base": base, "tuned": tuned}
        for item, prompt, base, tuned in ((0, hostile, hostile * 3, ""), (1, "Why?", "Because.", "It depends. " * 30))
    ]
    rows += [
        {"metric": "preference.p3", "item": item, "round": 0, "j4": float(item), "log_odds": 0.1} for item in (0, 1)
    ]
    (path / "eval" / "scores.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    found = {}
    for rater in ("ann", "ben"):
        with review_blind.reading(read_story(path), rater) as session:
            while session.pending:
                long = "unbroken" in session.pending[0].prompt
                found["blind-long" if long else "blind"] = review.page(session, nonce="x")
                side = "left" if long else "right"
                assert session.mark(session.ticket(session.pending[0]), side, "a note " + "unbroken" * 60)
    return found


REVIEW = ["blind", "blind-long", "form", "form-long", "form-again", "form-revision", "form-done"]


@pytest.mark.parametrize("name", ["full", "empty", *REVIEW])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_fault_and_nothing_runs_off_the_side(pages, tmp_path, name, width, dark):
    for opened in (False, True):
        found = look(pages[name], tmp_path, width, dark, opened)
        assert found["checked"] > (8 if name == "form-done" else 10)
        assert found["faults"] == []
        assert found["wide"] == 0
        for scrolls, told in found["regions"]:
            assert scrolls == told, "what scrolls says so, and nothing else does"
        assert name != "full" or width != 400 or any(scrolls for scrolls, _ in found["regions"])


EXPERIMENTS = ["against", "attribution", "inverse", "sweep", "rounds"]
EXPERIMENTS += ["against-few", "attribution-few", "inverse-none", "sweep-one"]


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_fault_on_the_page_of_an_experiment(experiments, tmp_path, name, width, dark):
    """Folded texts are opened. What scrolls sideways says so; on a phone only heat maps and the report's tables do."""
    assert POLICY in experiments[name]
    found = look(experiments[name], tmp_path, width, dark, True)
    assert found["checked"] > 10 and found["faults"] == [] and found["wide"] == 0
    assert all(scrolls == told for scrolls, told in found["regions"])
    if width == 400 and not name.startswith(("attribution", "rounds")):
        assert not any(scrolls for scrolls, _ in found["regions"])


def test_examples_are_found_by_principle_pool_and_verdict(pages, tmp_path):
    filters = look(pages["full"], tmp_path, 1280, False, False)["filters"]
    assert len(filters) >= 2
    for choices in filters:
        everything = choices[0][1]
        assert everything == choices[-1][1] > 2
        for value, seen, there in choices[1:-1]:
            assert seen == there > 0 and value
    assert any(seen < choices[0][1] for choices in filters for _, seen, _ in choices)


def test_the_check_sees_a_fault(pages, tmp_path):
    page = (
        pages["full"].replace("--dim: #57606a", "--dim: #c8c8c8").replace("<h2", "<h5", 1).replace("</h2>", "</h5>", 1)
    )
    page = page.replace("overflow-x: auto", "overflow-x: visible")
    found = look(page, tmp_path, 400, False, True)
    assert any(fault.startswith("color-contrast") for fault in found["faults"])
    assert any(fault.startswith("heading-order") for fault in found["faults"])
    assert found["wide"] > 0


PRESS = """
const sent = [];
HTMLFormElement.prototype.requestSubmit = function () {
  const chosen = this.querySelector("input[name=mark]:checked");
  sent.push(this.id + (chosen && this.id === "mark" ? " " + chosen.value : ""));
};
const press = (key, more) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
press("2"); press("3"); press("9"); press("1", {ctrlKey: true}); press("u"); press("n");
const focused = document.activeElement.id;
document.getElementById("note").dispatchEvent(new KeyboardEvent("keydown", {key: "1", bubbles: true}));
document.body.innerHTML = "<pre>" + encodeURIComponent(JSON.stringify({sent, focused})) + "</pre>";
"""


def form_of(path: Path, blind: bool) -> str:
    """The form with a mark before it, so that there is one to take back."""
    reading = review_blind.reading if blind else review.reviewing
    with reading(read_story(path), "ann") as session:
        session.mark(session.ticket(session.pending[0]), "skip")
        return review.page(session, nonce="x")


@pytest.mark.parametrize(("blind", "second", "third"), [(False, "not", "skip"), (True, "right", "equal")])
def test_keys_mark_undo_and_note_and_do_nothing_within_a_note(tmp_path, blind, second, third):
    path = make_run(tmp_path, records(10, heldout=0, rejects=False), recipe=recipe(items=10))
    rows = [
        {"metric": "preference.fresh", "item": n, "round": 0, "prompt": "Why?", "base": f"{n}.", "tuned": f"It is {n}."}
        for n in range(3)
    ]
    (path / "eval" / "scores.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    form = form_of(path, blind)
    outer = tmp_path / "form.html"
    outer.write_text(form.replace("</body>", f"<script>{PRESS}</script></body>"))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = json.loads(unquote(done.stdout.split("<pre>")[1].split("</pre>")[0]))
    assert found == {"sent": [f"mark {second}", f"mark {third}", "undo"], "focused": "note"}
