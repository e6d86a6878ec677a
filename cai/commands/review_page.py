"""The page of a review: served on the loopback alone, under a random token, to requests for this very host.

Owns the server and the form; the queue is `review_session`'s. The page works without its script, which only turns keys
into clicks (1, 2, 3 mark and send, u takes the last mark back, n writes a note); no other script may run.
"""

from __future__ import annotations

import getpass
import hmac
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from cai.commands.review_session import LABELS, MARKS, QUESTIONS, Part, Session
from cai.errors import CaiError
from cai.report.diff import Segment, cut
from cai.report.templating import rendered
from cai.terminal import duration

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{}'; form-action 'self'; "
POLICY += "frame-ancestors 'none'; base-uri 'none'"
MOST_BYTES = 10_000  # of a form; longer notes are refused by the form itself


def serve(
    session: Session,
    say: Callable[[str], None],
    ready: Callable[[HTTPServer, str], None] | None = None,
    port: int = 0,
) -> None:
    """Serve on 127.0.0.1 (a free port, or `port`) under a random token, until Ctrl-C (or `server.shutdown()`).

    Errors: CaiError for a port that is taken or not to be had.
    """
    token = secrets.token_urlsafe(24)
    try:
        server = Server(("127.0.0.1", port), _handler(session, token))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise CaiError(f"--port {port}: {why}. Give another port above 1023, or leave it out.") from None
    at = server.server_address[1]
    url = f"http://127.0.0.1:{at}/{token}/"
    say(f"{len(session.pending)} texts to mark as {session.rater}. Open {url}")
    say(f"Only this machine can reach it. From another one, in a terminal there: {ssh_line(at, os.environ)}")
    say("then open the same address. Ctrl-C ends it; what is marked stays.")
    try:
        if ready:
            ready(server, url)
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
    finally:
        server.server_close()


class Server(ThreadingHTTPServer):
    """A thread a connection: browsers open spare ones. One that a browser breaks off is nobody's fault."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # as the library's own stub names it


def ssh_line(port: int, environment: Mapping[str, str]) -> str:
    """The line that brings the page home, with this machine's address as far as it is known (RunPod's, ssh's own)."""
    host, at = environment.get("RUNPOD_PUBLIC_IP", ""), environment.get("RUNPOD_TCP_PORT_22", "")
    if not host and len(parts := environment.get("SSH_CONNECTION", "").split()) == 4:
        host, at = parts[2], parts[3]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this user id, as in many containers
        user = "root"
    where = f"-p {at} " if at and at != "22" else ""
    return f"ssh -N -L {port}:127.0.0.1:{port} {where}{user}@{host or socket.gethostname()}"


def _headers(length: int, kind: str, location: str, policy: str) -> dict[str, str]:
    """Nothing is kept, framed, guessed or told to another site."""
    return {
        "Content-Type": f"{kind}; charset=utf-8",
        "Content-Length": str(length),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Content-Security-Policy": policy,
        **({"Location": location} if location else {}),
    }


def _handler(session: Session, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """GET shows the next task, POST marks it. Anything without token or host of ours is refused."""

        timeout = 20
        server_version, sys_version = "cai-review", ""

        def allowed(self) -> bool:
            port = self.connection.getsockname()[1]
            hosts = (f"127.0.0.1:{port}", f"localhost:{port}")  # another name is a rebound one
            origin = self.headers.get("Origin")
            mine = origin in (None, "null", *(f"http://{host}" for host in hosts))
            asked = self.path.encode("utf-8", "replace")
            right = hmac.compare_digest(asked, f"/{token}/".encode())
            return right and mine and self.headers.get("Host", "") in hosts

        def do_GET(self) -> None:
            if self.allowed():
                self.show(200)
            else:
                self.send(404, "not here\n", "text/plain")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            known = length.isascii() and length.isdigit() and len(length) < 9
            if not self.allowed() or not known or int(length) > MOST_BYTES:
                self.send(404, "not here\n", "text/plain")
                return
            form = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
            if "undo" in form:
                session.undo()
                self.send(303, "", location=f"/{token}/")
            elif session.mark(*(form.get(name, [""])[0] for name in ("ticket", "mark", "note"))):
                self.send(303, "", location=f"/{token}/")
            else:
                self.show(409, "That text is marked already, or no mark was chosen.")

        def show(self, code: int, alert: str = "") -> None:
            nonce = secrets.token_urlsafe(16)
            self.send(code, page(session, alert, nonce), policy=POLICY.format(nonce))

        def send(
            self, code: int, body: str, kind: str = "text/html", location: str = "", policy: str = POLICY.format("none")
        ) -> None:
            data = body.encode("utf-8", "replace")
            self.send_response(code)
            for name, value in _headers(len(data), kind, location, policy).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet: the token would be in every line."""

    return Handler


def page(session: Session, alert: str = "", nonce: str = "") -> str:
    pending, to_go = session.pending, session.seconds_to_go
    task = pending[0] if pending else None
    parts = task.parts() if task else []
    alone = len(parts) - (task.beside if task else 0)
    values = {
        "task": task,
        "parts": list(map(_shown, parts[:alone])),
        "beside": list(map(_shown, parts[alone:])),
        "labels": LABELS,
        "ticket": session.ticket(task) if task else "",
        "question": QUESTIONS[task.what] if task else "",
        "marks": MARKS[task.what] if task else (),
        "done": len(session.tasks) - len(pending),
        "total": len(session.tasks),
        "to_go": duration(to_go) if to_go is not None and pending else "",
        "can_undo": session.can_undo,
        "rater": session.rater,
        "alert": alert,
        "nonce": nonce,
    }
    return rendered("review.html.j2", values)


def _shown(part: Part) -> tuple[str, list[Segment]]:
    """A heading and its text, cut where a quotation begins and ends."""
    return part.name, cut(part.text, (), part.quoted)
