"""The command line: its flags and their help. Owns no behaviour."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from cai import __version__
from cai.data import chain
from cai.errors import CaiError
from cai.recipe.load import parse_set
from cai.recipe.paths import expanded

ABOUT = "Constitutional AI in one process: write, critique and revise answers, train on the pairs with DPO, measure, "
ABOUT += "report. Without a command below it starts a run of the recipe's milestone, or with --resume goes on with one."
FIRST = """Constitutional AI in one process: write, critique and revise
answers, train on the pairs with DPO, measure, report.

  {it} cai.toml --dry-run
      checks everything, shows prompts and an estimate
  {it} cai.toml --milestone m0
      one item end to end, as `make m0`; m1, m2, m3: more

After that: --status, --runs, --resume RUN, --report RUN,
--chat RUN. All flags: --help. Begin with README.md."""
EPILOG = "Exit codes: 0 done, 1 a bug, 2 usage, 3 drift, 4 locked, 5 corrupt, 6 quality or NaN, 7 a gate failed, "
EPILOG += "74 input/output, 75 stopped but resumable, 130/143 signals."


def first_screen(program: str) -> str:
    """For a line without a word: what this is, and the two commands to begin with."""
    return FIRST.format(it=program)


GOES_WITH = {  # flag -> the command it belongs to; alone it would be passed over, and a run would start
    "watch": "status",
    "write": "repair",
    "rater": "review",
    "terminal": "review",
    "blind": "review",
    "arms": "blind",
    "port": "review",
    "to": "export",
    "merged": "export",
    "push": "export",
    "arm": "export",
    "form": "export",
    "without": "attribute",
}


COMMANDS = (
    "runs",
    "status",
    "doctor",
    "compare",
    "verify",
    "repair",
    "fork",
    "report",
    "review",
    "exam",
    "benchmark",
    "export",
    "chat",
    "against",
    "attribute",
    "inverse",
    "next_round",
    "sweep",
)
# flag of a run -> the commands that it may stand beside
MODES: dict[str, tuple[str, ...]] = {
    "resume": ("benchmark", "against", "sweep"),
    "dry_run": ("fork", "export", "against", "attribute", "inverse", "next_round", "sweep"),
    "until": (),
}


class Parser(argparse.ArgumentParser):
    """One line for a bad flag, like every other fault."""

    def error(self, message: str) -> None:  # type: ignore[override]
        near = self._nearest(message)
        raise CaiError(f"runner.py: {message}{near}{'' if near else '.'} See `python runner.py --help`.")

    def _nearest(self, message: str) -> str:
        """The flag that was meant, for one that is unknown; a word in front of which the dashes are missing counts."""
        words = [word.partition("=")[0] for word in message.split(": ")[-1].split()]
        if not message.startswith("unrecognized"):
            return ""
        flags = list(self._option_string_actions)
        found = {word: difflib.get_close_matches(word, flags, 1, 0.6) for word in words if word.startswith("-")}
        near = [f"{match[0]} for {word}" for word, match in found.items() if match]
        return f": did you mean {', '.join(near)}?" if near else ""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line. Error: CaiError (exit 2) with one line."""
    parser = Parser(prog="runner.py", description=ABOUT, epilog=EPILOG, allow_abbrev=False)
    add = parser.add_argument
    add("recipe", nargs="?", type=Path, default=Path("cai.toml"), help="the recipe, cai.toml by default")
    run = parser.add_argument_group("run")
    run.add_argument("--milestone", default="", help="which [milestones.X] of the recipe applies")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe")
    run.add_argument("--resume", type=_named, metavar="RUN", help="continue runs/ID (or runs/latest)")
    stages = [*(stage.name for stage in chain.CHAIN), "pairs"]
    run.add_argument("--until", choices=stages, default="", help="stop after this stage; pairs: before training")
    run.add_argument("--limit", type=int, default=0, metavar="N", help="at most N items (or benchmark rows): a trial")
    run.add_argument(
        "--override-gate", type=_named, metavar="WHY", help="go on after a failed gate; the reason is kept"
    )
    run.add_argument("--over-budget", action="store_true", help="start although the estimate does not fit the budget")
    look = parser.add_argument_group("look, without starting anything")
    look.add_argument("--dry-run", action="store_true", help="check everything, show prompts and an estimate")
    look.add_argument("--status", nargs="?", const="", metavar="RUN", help="one screen about a run (default: latest)")
    look.add_argument("--runs", action="store_true", help="a table of all runs, and runs/index.html beside them")
    look.add_argument("--watch", action="store_true", help="with --status: again every two seconds")
    look.add_argument("--doctor", action="store_true", help="check machine, versions, model and recipe")
    look.add_argument(
        "--compare", nargs="+", type=_named, metavar="RUN", help="what differs between runs; paired statistics"
    )
    look.add_argument("--verify", type=_named, metavar="RUN", help="check every promise on a run and print a table")
    more = parser.add_argument_group("more")
    more.add_argument("--repair", type=_named, metavar="RUN", help="show what a repair of a damaged log would drop")
    more.add_argument("--write", action="store_true", help="with --repair: drop it")
    more.add_argument("--fork", type=_named, metavar="RUN", help="a new run that reuses what is unchanged of RUN")
    more.add_argument("--report", type=_named, metavar="RUN", help="write report.html and report.md of a run again")
    _review(more)
    more.add_argument("--exam", type=Path, metavar="FILE", help="the metrics' own exam on a labelled JSON-lines file")
    more.add_argument("--benchmark", type=_named, metavar="LIST", help="harmbench,xstest,mtbench on a run's adapter")
    more.add_argument("--chat", type=_named, metavar="RUN", help="ask base and tuned side by side (or a line on stdin)")
    _export(more)
    _experiments(parser.add_argument_group("experiments"))
    add("--version", action="version", version=f"constitutional-ai {__version__}")
    return _checked(parser.parse_args(argv))


def _review(group: argparse._ArgumentGroup) -> None:
    """Marks by hand."""
    add = group.add_argument
    add("--review", type=_named, metavar="RUN", help="mark critiques and revisions by hand")
    add("--rater", default="", help="with --review: who marks")
    add("--blind", action="store_true", help="with --review: compare fresh answers, not told which model gave which")
    add("--arms", default="", metavar="LIST", help="with --blind: base,tuned,sft (default: tuned against each other)")
    add("--terminal", action="store_true", help="with --review: a form in the terminal, not a page")
    add("--port", type=int, default=0, metavar="N", help="with --review: the page's port (default: a free one)")


def _export(group: argparse._ArgumentGroup) -> None:
    """What others load."""
    add = group.add_argument
    add("--export", type=_named, metavar="RUN", help="adapter and data set with their cards")
    add("--to", type=Path, metavar="FOLDER", help="with --export: where to")
    add(
        "--arm", default="", metavar="NAME", help="with --export: sft, from-base or seed-N instead of the run's adapter"
    )
    add("--merged", action="store_true", help="with --export: also the merged bf16 weights, checked")
    add("--push", metavar="REPO", default="", help="with --export: also to this hub repository (--dry-run: only list)")
    add(
        "--form",
        choices=("argilla",),
        default="",
        help="with --export: texts for people to mark, as Argilla loads them",
    )


def _experiments(group: argparse._ArgumentGroup) -> None:
    """The commands that take whole runs to their end, to compare them."""
    add = group.add_argument
    add("--against", type=_named, metavar="OTHER", help="against another constitution (a file) or run, judged blind")
    add("--attribute", type=_named, metavar="RUN", help="what each principle bought and cost, judged blind")
    add("--without", type=_named, metavar="ID", help="with --attribute: also trained without its pairs")
    add("--inverse", type=_named, metavar="RUN", help="does the constitution come back out of the run's pairs?")
    add("--next-round", type=_named, metavar="RUN", help="a new run in which RUN's adapter answers, trained on from it")
    add("--sweep", action="store_true", help="every combination of the values in [sweep], and a frontier")


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The same, paths made whole. Error: flags that contradict each other, or say nothing."""
    _refuse_odd_names(args)
    _refuse_words(args)
    _paths_at_home(args)
    _milestone_of_sets(args)
    _one_command(args)
    for name, command in GOES_WITH.items():
        if getattr(args, name) and getattr(args, command) in (None, "", False):
            if name == "watch" and args.status == "":
                continue  # --status alone means the latest run
            raise CaiError(f"runner.py: --{name}: goes with --{command}, which is missing. Add it, or leave this out.")
    if args.override_gate is not None and not args.override_gate.strip():
        raise CaiError('runner.py: --override-gate: needs a reason, --override-gate "why". It stays in the report.')
    if args.limit < 0:
        raise CaiError("runner.py: --limit: must be 0 or more. Leave it out for no limit.")
    return args


def _refuse_odd_names(args: argparse.Namespace) -> None:
    """Paths and runs that no file system can hold: asked for, they would be a fault of the system's."""
    for name in ("recipe", "to", "exam", *COMMANDS, *MODES):
        value = getattr(args, name)
        for text in map(str, value if isinstance(value, list) else [value]):
            parts = [len(part.encode("utf-8", "surrogateescape")) for part in text.split("/")]
            if "\0" in text or max(parts) > 255 or sum(parts) + len(parts) > 4096:
                what = "holds a NUL" if "\0" in text else "is longer than any path"
                raise CaiError(f"runner.py: --{name.replace('_', '-')}: {text[:40]!r}... {what}. Name what is there.")


def _refuse_words(args: argparse.Namespace) -> None:
    """Words where a recipe or a second run belongs: answered to the point, not as a file that is missing."""
    if args.compare is not None and len(args.compare) < 2:
        raise CaiError("runner.py: --compare: takes two runs or more, 1 was given. Name another.")
    word, where = str(args.recipe), args.recipe
    if not where.is_file() and where.suffix != ".toml":
        flags = [name.replace("_", "-") for name in vars(args) if name != "recipe"]
        plain = word.lower().replace("_", "-")
        if plain in flags:
            raise CaiError(f"runner.py: {word}: a command begins with two dashes: --{plain}. Or give a recipe file.")
        near = difflib.get_close_matches(plain, flags, 1, 0.7)
        if near and not where.exists():
            raise CaiError(f"runner.py: {word}: no such recipe file. Did you mean --{near[0]}?")
    if where.is_dir():
        hint = "For a run name it behind its command: --resume RUN, --status RUN, --report RUN."
        raise CaiError(f"runner.py: {word}: is a folder, and a recipe is a file like cai.toml. {hint}")


def _paths_at_home(args: argparse.Namespace) -> None:
    """`--to=~/x`: a shell expands `~` only at the beginning of a word."""
    for name in ("recipe", "to", "exam"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, Path(expanded(str(path))))


def _milestone_of_sets(args: argparse.Namespace) -> None:
    """`--set milestone=m1` is --milestone m1."""
    keyed = [(text, parse_set(text).get("milestone")) for text in args.set if _is_milestone(text)]
    for text, name in keyed:
        if not isinstance(name, str) or args.milestone not in ("", name):
            raise CaiError(f"runner.py: --set {text}: says another milestone than --milestone. Leave one out.")
        args.milestone = name
    args.set = [text for text in args.set if not _is_milestone(text)]


def _is_milestone(text: str) -> bool:
    return text.partition("=")[0].strip() == "milestone" and "=" in text


def commands(args: argparse.Namespace) -> list[str]:
    """The commands beside a run that were asked for; none means a run."""
    return [name for name in COMMANDS if getattr(args, name) not in (None, False)]


def _one_command(args: argparse.Namespace) -> None:
    """Refuse a second command, and a flag of a run beside a command: it would be passed over without a word."""
    asked = commands(args)
    others = [name for name, beside in MODES.items() if asked and getattr(args, name) and asked[0] not in beside]
    if len(asked) + len(others) > 1:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in (*asked, *others))
        raise CaiError(f"runner.py: {named}: one at a time. Leave all but one out.")


def _named(text: str) -> str:
    """An argument that says something: an unset shell variable must not mean a new run."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty, it must name something (an unset variable?)")
    return text
