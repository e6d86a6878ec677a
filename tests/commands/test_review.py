"""Review by hand: blind, controls mixed in, on the loopback only, marks final and on disk, agreement in the report."""

from __future__ import annotations

import http.client
import re
import shlex
import signal
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlencode, urlparse

import pytest
from support.pages import make_run, recipe, records
from support.runs import read_jsonl

from cai.commands import review
from cai.commands.review_page import Server
from cai.data.marks import filter_pairs, refused
from cai.errors import CORRUPT, CaiError
from cai.metrics.stats import kappa
from cai.recipe.settings import HeldoutSection
from cai.report.agreement import agreement
from cai.report.examples import exhibits
from cai.report.notes import notes
from cai.report.pages import write_pages
from cai.report.snapshot import read_story


@pytest.fixture
def run_fake(run_paper):
    return run_paper


@pytest.fixture
def path(tmp_path):
    rows = records(10, heldout=0, rejects=False)
    return make_run(tmp_path, rows, recipe=recipe(items=10, heldout=HeldoutSection()))


def mark_all(path, rater, choose):
    with review.reviewing(read_story(path), rater) as session:
        for task in session.pending:
            assert session.mark(session.ticket(task), choose(task))


def by_control(task):
    good = not task.control
    return ("meaningful" if good else "not") if task.what == "critique" else ("fixed" if good else "not")


def test_tasks_hold_every_text_and_a_fifth_of_controls(path):
    found = review.tasks(read_story(path), "ann")
    real = [t for t in found if not t.control]
    assert len(real) == 20
    assert sorted(t.control for t in found if t.control) == ["generic", "shuffled", "unchanged", "unchanged"]
    assert [t.what for t in found] == sorted(t.what for t in found)


def test_raters_get_the_same_texts_in_their_own_order(path):
    snapshot = read_story(path)
    one, two = review.tasks(snapshot, "ann"), review.tasks(snapshot, "ben")
    assert sorted(t.key for t in one) == sorted(t.key for t in two)
    assert [t.key for t in one] != [t.key for t in two]
    assert [t.key for t in one] == [t.key for t in review.tasks(snapshot, "ann")]


def test_marks_are_kept_and_taken_up_again(path):
    with review.reviewing(read_story(path), "ann") as session:
        first = session.pending[0]
        assert session.mark(session.ticket(first), "meaningful")
        assert not session.mark(session.ticket(first), "not")  # final
        assert not session.mark(session.ticket(session.pending[0]), "brilliant")
        left = len(session.pending)
    with review.reviewing(read_story(path), "ann") as session:
        assert len(session.pending) == left
        assert first.key not in [t.key for t in session.pending]
    assert [r["mark"] for r in read_story(path).reviews] == ["meaningful"]


def test_one_review_at_a_time_and_clear_faults(path, tmp_path):
    with review.reviewing(read_story(path), "ann"), pytest.raises(CaiError, match="another review") as locked:  # noqa: SIM117
        with review.reviewing(read_story(path), "ben"):
            pass
    assert locked.value.code == 4
    with pytest.raises(CaiError, match="--rater"), review.reviewing(read_story(path), "../x"):
        pass
    empty = make_run(tmp_path / "empty", [])
    with pytest.raises(CaiError, match="no example"), review.reviewing(read_story(empty), "ann"):
        pass


def test_page_is_blind(path):
    with review.reviewing(read_story(path), "ann") as session:
        while session.pending:
            text = review.page(session)
            for word in ("shuffled", "generic", "unchanged", "control", "CSI", "redteam"):
                assert word not in text.replace("generic one", ""), word
            task = session.pending[0]
            assert task.key not in text
            session.mark(session.ticket(task), "skip")
        assert "Everything is marked" in review.page(session)


@pytest.fixture
def served(path):
    """(host, port, path with token) of a page that is being served, and its session."""
    with review.reviewing(read_story(path), "ann") as session:
        found, ready = {}, threading.Event()

        def note(server, url):
            found.update(server=server, url=url)
            ready.set()

        thread = threading.Thread(target=review.serve, args=(session, lambda line: None, note), daemon=True)
        thread.start()
        assert ready.wait(5)
        url = urlparse(found["url"])
        yield url, session
        found["server"].shutdown()
        thread.join(5)


def request(url, method="GET", path=None, body=None, headers=None):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=5)
    form = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
    connection.request(method, path or url.path, body, {**form, **(headers or {})})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def test_the_page_is_served_on_the_loopback_with_a_token(served):
    url, session = served
    assert url.hostname == "127.0.0.1"
    answer, text = request(url)
    assert answer.status == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    (nonce,) = re.findall(r'<script nonce="([\w-]{20,})">', text)
    assert f"script-src 'nonce-{nonce}'" in policy and text.count("<script") == 1  # ours, and no other may run
    assert request(url)[1].count(nonce) == 0  # another one each time
    for wrong in ("/", "/" + "x" * 32 + "/", url.path + "x"):
        assert request(url, path=wrong)[0].status == 404
    assert request(url, headers={"Host": "evil.example"})[0].status == 404
    assert request(url, headers={"Origin": "http://evil.example"})[0].status == 404
    assert len(session.pending) == len(session.tasks)


def test_a_form_marks_and_a_second_post_does_not(served):
    url, session = served
    ticket = re.search(r'name="ticket" value="(\w+)"', request(url)[1])[1]
    body = urlencode({"ticket": ticket, "mark": "not"})
    answer, _ = request(url, "POST", body=body)
    assert (answer.status, answer.headers["Location"]) == (303, url.path)
    assert request(url, "POST", body=body)[0].status == 409
    assert request(url, "POST", body="x" * 20_000)[0].status == 404
    assert len(session.tasks) - len(session.pending) == 1


def test_a_browser_that_breaks_off_leaves_no_traceback(served, capfd):
    """Closed with a reset while the page is written: a BrokenPipeError's traceback stood among the lines on screen."""
    url, _ = served
    asked = f"GET {url.path} HTTP/1.0\r\nHost: {url.netloc}\r\n\r\n".encode()
    for _ in range(20):
        with socket.create_connection((url.hostname, url.port), timeout=5) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(asked)
    assert request(url)[0].status == 200
    assert "Traceback" not in capfd.readouterr().err
    with Server(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        try:
            raise ZeroDivisionError("a bug of ours")
        except ZeroDivisionError:
            other.handle_error(None, ("127.0.0.1", 1))
    assert "a bug of ours" in capfd.readouterr().err


def test_the_last_mark_can_be_taken_back_until_the_next_one(path):
    with review.reviewing(read_story(path), "ann") as session:
        assert not session.undo() and not session.can_undo
        first, second = session.pending[:2]
        assert session.mark(session.ticket(first), "not", " too short\x00 ")
        assert session.can_undo and first not in session.pending
        assert session.undo() and not session.undo()
        assert session.pending[0] == first  # it is asked again, first of all
        assert session.mark(session.ticket(first), "meaningful", "on second thought")
        assert session.mark(session.ticket(second), "skip")  # from here on the first one stands
        assert session.undo() and session.pending[0] == second
    rows = read_jsonl(path / "reviews.jsonl")
    assert [(row["key"], row["mark"], row.get("note")) for row in rows] == [
        (first.key, "meaningful", "on second thought")
    ]
    with review.reviewing(read_story(path), "ann") as session:
        assert not session.undo() and first.key not in [task.key for task in session.pending]


def test_the_last_mark_stands_when_the_review_ends_even_by_ctrl_c(path):
    with pytest.raises(KeyboardInterrupt), review.reviewing(read_story(path), "ann") as session:
        assert session.mark(session.ticket(session.pending[0]), "not")
        assert not (path / "reviews.jsonl").exists() or not read_jsonl(path / "reviews.jsonl")
        raise KeyboardInterrupt
    assert [row["mark"] for row in read_story(path).reviews] == ["not"]


def test_the_page_takes_a_note_and_the_last_mark_back(served):
    url, session = served
    assert 'name="undo"' not in request(url)[1]
    ticket = re.search(r'name="ticket" value="(\w+)"', request(url)[1])[1]
    request(url, "POST", body=urlencode({"ticket": ticket, "mark": "not", "note": "it is right"}))
    before = session.pending
    assert 'name="undo"' in request(url)[1]
    answer, _ = request(url, "POST", body=urlencode({"undo": "1"}))
    assert answer.status == 303 and len(session.pending) == len(before) + 1
    assert re.search(r'name="ticket" value="(\w+)"', request(url)[1])[1] == ticket
    request(url, "POST", body=urlencode({"ticket": ticket, "mark": "not", "note": "it is right"}))
    session.close()
    assert session.log.rows[0]["note"] == "it is right"


def test_numbers_stand_beside_the_marks_and_a_pace_tells_what_is_left(path, monkeypatch):
    """Ten seconds a mark, one pause of an hour: the median says ten seconds."""
    now = {"at": 0.0}
    monkeypatch.setattr("cai.commands.review_session.time.monotonic", lambda: now["at"])
    with review.reviewing(read_story(path), "ann") as session:
        for pause in (10.0, 3600.0, 10.0, 10.0):
            assert len(session._seconds) >= 3 or session.seconds_to_go is None
            now["at"] += pause
            session.mark(session.ticket(session.pending[0]), "skip")
        assert session.seconds_to_go == 10.0 * len(session.pending)
        text = review.page(session)
        assert "to go" in text
        assert re.findall(r"<kbd>(\d)</kbd>", text) == ["1", "2", "3"]


def test_a_port_of_ones_own_and_the_line_that_brings_the_page_home(path):
    from cai.commands.review_page import ssh_line

    pod = {"RUNPOD_PUBLIC_IP": "1.2.3.4", "RUNPOD_TCP_PORT_22": "10022", "SSH_CONNECTION": "9.9.9.9 1 10.0.0.1 22"}
    assert re.fullmatch(r"ssh -N -L 8765:127\.0\.0\.1:8765 -p 10022 \S+@1\.2\.3\.4", ssh_line(8765, pod))
    assert ssh_line(8765, {"SSH_CONNECTION": "9.9.9.9 1 10.0.0.1 22"}).endswith("@10.0.0.1")
    said = []
    with review.reviewing(read_story(path), "ann") as session:
        done = []

        def ready(server, url):
            done.append(server)
            threading.Thread(target=server.shutdown).start()

        review.serve(session, said.append, ready)
        taken = done[0].server_address[1]
        assert f":{taken}/" in said[0] and f"-L {taken}:127.0.0.1:{taken}" in said[1]
        with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(CaiError, match="--port") as caught:
            review.serve(session, said.append, port=busy.getsockname()[1])
        assert "\n" not in str(caught.value)
        with pytest.raises(CaiError, match="--port 99999"):
            review.serve(session, said.append, port=99999)


@pytest.mark.runs
def test_a_name_as_one_writes_it_is_a_rater(path, monkeypatch, capsys):
    import runner

    monkeypatch.chdir(path.parent.parent)
    (path.parent.parent / "cai.toml").write_text(f'runs = "{path.parent.name}"\n[milestones.m0]\n')
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    answers = iter(["1", "2 no reason given", "u", "1", ""])
    assert runner.main(["cai.toml", "--review", path.name, "--terminal", "--rater", "Ann B"]) == 0
    rows = read_jsonl(path / "reviews.jsonl")
    assert [(row["rater"], row["mark"]) for row in rows] == [("ann-b", "meaningful"), ("ann-b", "meaningful")]


def test_a_revision_is_asked_of_the_last_round_that_revised(path):
    """A last round that found nothing has no revision: nothing empty is put before a person."""
    story = read_story(path)
    for example in story.pairs.examples:
        first = {**example["rounds"][-1], "round": 0, "found": True}
        again = {**first, "round": 1, "found": False, "critique": "No issue."}
        example["rounds"] = [first, again]
    found = review.tasks(story, "ann")
    assert len([task for task in found if not task.control]) == 20
    assert all(task.case.revision.strip() and task.case.critique != "No issue." for task in found)


@pytest.mark.parametrize("name", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_ends_a_review(name):
    """A run lasts through a hangup; a server that waits for a person who is gone would hold the lock for ever."""
    before = signal.getsignal(name)
    with pytest.raises(KeyboardInterrupt), review.ended_by_signals():
        signal.raise_signal(name)
    assert signal.getsignal(name) == before


def test_terminal_form(path):
    answers = iter(["?", "m", "n", ""])
    said = []
    with review.reviewing(read_story(path), "ann") as session:
        review.ask(session, lambda prompt: next(answers), said.append)
    assert [r["mark"] for r in read_story(path).reviews] == ["meaningful", "not"]
    assert any("Instruction: How long" in line for line in said)


def test_agreement_of_metric_and_people_and_controls(path):
    mark_all(path, "ann", by_control)
    mark_all(path, "ben", lambda t: "not" if t.case.item == 3 else by_control(t))
    rows = {(r["who"], r["what"]): r for r in agreement(read_story(path))}
    both = rows["ann and ben", "critique"]
    assert (both["n"], both["raw"]) == (10, 0.9)
    assert both["kappa"] == both["low"] == both["high"] == 0.0  # ann calls all good: no chance is corrected for
    assert rows["ann, controls called bad", "critique"]["raw"] == 1.0
    assert ("metric and ann", "critique") not in rows  # nothing was scored in this run
    write_pages(path)
    html = (path / "report.html").read_text()
    assert "ann and ben" in html
    assert "controls called bad" in html


def test_a_note_stands_beside_its_example_in_the_report_and_a_planted_texts_does_not(path):
    """Notes on controls speak of another text; one of nothing but spaces is none."""
    with review.reviewing(read_story(path), "ann") as session:
        for task in session.pending:
            said = f"decoy {task.case.item}" if task.control else f"<b>why</b> {task.what} {task.case.item}\u202e"
            mark = "skip" if task.case.item == 3 else by_control(task)
            assert session.mark(session.ticket(task), mark, said if task.case.item in (2, 3) or task.control else " ")
    found = notes(read_story(path).reviews)
    assert [(note.item, note.what, note.mark) for note in found] == [
        (2, "critique", "meaningful"),
        (2, "revision", "fixed"),
        (3, "critique", "can't tell"),
        (3, "revision", "can't tell"),
    ]
    write_pages(path)
    html, text = (path / "report.html").read_text(), (path / "report.md").read_text()
    for page in (html, text):
        assert "decoy" not in page and "\u202e" not in page and "<b>why" not in page
    example = html.split('id="item-2"')[1].split("</article>")[0]
    assert "ann on the critique (meaningful):" in example and "&lt;b&gt;why&lt;/b&gt; revision 2" in example
    assert 'note small"' not in html.split('id="item-4"')[1].split("</article>")[0]
    assert "4 notes that people wrote" in html and '<a href="#item-3">item 3</a>, critique, ann' in html
    assert "- item 3, revision, ann (can't tell): \\<b\\>why" in text


def test_a_run_without_notes_has_no_place_for_them(path):
    mark_all(path, "ann", by_control)
    write_pages(path)
    assert "people wrote" not in (path / "report.html").read_text()
    assert "Notes by people" not in (path / "report.md").read_text()


@pytest.mark.runs
def test_pairs_are_filtered_by_the_marks(path):
    mark_all(path, "ann", lambda t: "partly" if t.what == "revision" and t.case.item == 2 else by_control(t))
    snapshot = read_story(path)
    assert refused(snapshot.reviews) == {2: "revision partly (ann)"}
    assert [p["item"] for p in filter_pairs(snapshot.pairs.kept, snapshot.reviews)] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    said = []
    review.finish(path, said.append)
    assert (path / "dataset" / "reviewed.jsonl").read_bytes().count(b"\n") == 9
    assert any(line.startswith("9 of 10 training pairs") for line in said)


def test_kappa_by_hand():
    """20 texts: both yes 9, both no 7, one of them 4: p_o = 0.8, p_e = 0.55 * 0.55 + 0.45 * 0.45 = 0.505."""
    first = [True] * 9 + [False] * 7 + [True] * 2 + [False] * 2
    second = [True] * 9 + [False] * 7 + [False] * 2 + [True] * 2
    assert kappa(first, second) == pytest.approx((0.8 - 0.505) / 0.495)
    assert kappa([True], [True]) is None
    assert kappa([], []) is None


# --- training on what the marks leave


MARKS = ("--set", "hygiene.reviews=true")
REFUSED = {1, 4}


def mark_run(path, bad=REFUSED, rater="ann"):
    mark_all(path, rater, lambda t: "not" if not t.control and t.case.item in bad else by_control(t))


def trained_on(path):
    return {r["item"] for r in read_jsonl(path / "dataset" / "pairs" / "train.jsonl")}


@pytest.mark.runs
def test_marks_given_before_training_leave_pairs_out(run_fake, capsys):
    code, path = run_fake("--milestone", "m1", "--until", "pairs")
    assert code == 0
    mark_run(path)
    review.finish(path, print)
    assert f"--resume runs/{path.name} --set hygiene.reviews=true" in capsys.readouterr().out
    assert run_fake("--resume", str(path), *MARKS)[0] == 0
    assert trained_on(path) == set(range(10)) - REFUSED
    assert "2 training pairs left out by them" in capsys.readouterr().out
    html = (path / "report.html").read_text()
    assert "reviews marked 2, removed 2" in html
    assert {row["rule"] for row in read_story(path).cleaned.removed} == {"reviews"}


@pytest.mark.runs
@pytest.mark.parametrize(
    "odd",
    [
        '{"v":1,"rater":"ann","key":"x","item":"0","what":5}',
        '{"rater":"ann","key":"y"}',
        '{"rater":"ann","key":"z","what":"tone"}',
    ],
)
def test_a_line_that_is_no_whole_mark_is_one_line_and_never_passed_over(run_fake, capsys, odd):
    """Which pairs it refuses nobody knows, so nothing is trained on; it was a traceback. A fork leaves it behind."""
    _, path = run_fake("--milestone", "m1", "--until", "pairs")
    mark_run(path)
    (path / "reviews.sum").unlink()
    with (path / "reviews.jsonl").open("a") as file:
        file.write(odd + "\n")
    assert run_fake("--resume", str(path), *MARKS)[0] == CORRUPT
    said = capsys.readouterr().err
    assert "reviews.jsonl" in said and "Traceback" not in said and not (path / "adapter").exists()
    assert run_fake("--report", str(path))[0] == 0
    assert run_fake("--fork", str(path))[0] == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.runs
def test_marks_do_nothing_unless_asked(run_fake):
    one = run_fake("--milestone", "m1", "--until", "pairs")[1]
    mark_run(one)
    assert run_fake("--resume", str(one))[0] == 0
    assert trained_on(one) == set(range(10))
    assert not (one / "eval" / "marks.json").exists()
    assert "hygiene.reviews" not in read_story(one).manifest["training_identity"]


@pytest.mark.slow
@pytest.mark.parametrize("switch", [(), MARKS])
def test_marks_given_after_training_change_nothing_that_was_trained(run_fake, switch):
    _, path = run_fake("--milestone", "m1", "--until", "pairs")
    mark_run(path)
    assert run_fake("--resume", str(path), *switch)[0] == 0
    before = trained_on(path), read_story(path).cleaned.kept
    mark_run(path, bad={7}, rater="ben")
    review.finish(path, lambda line: None)
    assert run_fake("--resume", str(path))[0] == 0
    assert (trained_on(path), read_story(path).cleaned.kept) == before
    assert f"| {len(before[0])} | " in (path / "report.md").read_text().split("after hygiene")[1].split("\n")[0]


@pytest.mark.runs
def test_a_fork_of_a_trained_run_takes_the_marks_along(run_fake, capsys):
    _, path = run_fake("--milestone", "m1")
    mark_run(path)
    review.finish(path, print)
    line = next(line for line in capsys.readouterr().out.splitlines() if "--fork" in line)
    assert run_fake(*shlex.split(line.split("runner.py ")[1])[1:])[0] == 0
    copy = path.parent / "latest"
    assert copy.resolve() != path
    assert run_fake("--resume", "latest", *MARKS)[0] == 0
    assert trained_on(copy) == set(range(10)) - REFUSED


@pytest.mark.runs
def test_marks_that_refuse_everything_end_with_a_clear_line(run_fake, capsys):
    _, path = run_fake("--milestone", "m1", "--until", "pairs")
    mark_run(path, bad=set(range(10)))
    assert run_fake("--resume", str(path), *MARKS)[0] == 6
    assert "reviews.jsonl: a mark refuses each of the 10 training pairs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["critique", "revision"])
def test_agreement_of_metric_and_a_person_by_hand(run_fake, what):
    """A person who says what the metric says but for two texts: raw (n - 2) / n, and kappa from the four counts."""
    path = run_fake("--milestone", "m1")[1]
    verdicts = {e.item: getattr(e, what).status for e in exhibits(read_story(path))}
    metric = {item: status == "yes" for item, status in verdicts.items() if status in ("yes", "no")}
    n, flipped = len(metric), sorted(metric)[:2]
    good = {"critique": "meaningful", "revision": "fixed"}
    mark_all(path, "ann", lambda t: good[t.what] if metric.get(t.case.item) != (t.case.item in flipped) else "not")
    write_pages(path)
    found = {(r["who"], r["what"]): r for r in agreement(read_story(path))}["metric and ann", what]
    yes, person = sum(metric.values()) / n, sum(v != (i in flipped) for i, v in metric.items()) / n
    chance = yes * person + (1 - yes) * (1 - person)
    assert (found["n"], found["raw"]) == (n, pytest.approx((n - 2) / n))
    assert found["kappa"] == pytest.approx(((n - 2) / n - chance) / (1 - chance))
    assert (
        f'<th scope="row">metric and ann</th><td>{what}</td><td class="n">{n}</td>'
        in (path / "report.html").read_text()
    )
