"""`--report RUN`: report.html, report.md and the tables again, from the run's files."""

from __future__ import annotations

import argparse

from cai import errors
from cai.report.pages import write_pages
from cai.run import digests
from cai.run.events import read_events
from cai.terminal import say, word


def command(args: argparse.Namespace) -> int:
    """`--report RUN`: write both pages again."""
    from cai.inputs import locate

    path = locate(args, args.report)
    write_pages(path)
    if edited := digests.told(digests.edited(path, read_events(path / "events.jsonl"))):
        say(edited)  # the pages say it too
    say(word(path / "report.html"))
    return errors.DONE
