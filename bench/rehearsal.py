"""Dress rehearsal of M3, whole: 5,000 items, guard, DPO, benchmarks, with three kills; the small model as policy.

One run of `runner.py` in child processes. SIGKILL falls once in generation, once in training, once in a benchmark, when
status.json and the logs show that the phase is under way; each time the run goes on with the line that `--status`
prints. On a GPU the embedded model's weights run as the recipe's own model would; without one the embedded model runs
on the CPU. Guard and judges are stand-ins: they show the path, measure nothing, and every file says so.

    python bench/rehearsal.py --data FOLDER --run-dir rehearsal --compare-memory 500
    python bench/rehearsal.py --data FOLDER --run-dir rehearsal --only-until 500      # in pieces: again until exit 0

Printed and written as JSON with the machine's name: seconds of each phase over all attempts, rows and tokens a second,
peak memory of each attempt, what a kill left and what stood at the end, `--verify`, gates, the report's size. Exit 0:
whole and sound; 75: the time of this piece is over, call again; 1: something is wrong, and the last lines say what.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from rehearsal_facts import (  # noqa: E402
    FINISHED,
    Leg,
    Row,
    facts_of,
    faults_of,
    is_benchmark,
    logs_of,
    machine_name,
    read_json,
    show,
)

from cai import errors  # noqa: E402
from cai.evaluate.benchmarks.sources import (  # noqa: E402
    NAMES,
    OFFICIAL,
)
from cai.models import policy  # noqa: E402
from cai.store.files import write_json_atomic  # noqa: E402

POLL_SECONDS = 0.02
SAVE_SECONDS, SAY_SECONDS = 5.0, 30.0
GRACE_SECONDS = 20.0  # after the first SIGTERM the second one, which stops at once; then SIGKILL, and nothing is lost
LEAST_PIECE = 20.0  # no attempt is begun with less time left: it would only load the model
GENERATED = ("answers", "critiques", "revisions")
PHASES = ("generation", "training", "benchmark")
PUBLISHED = {name: file for name, file in OFFICIAL.items() if name != "xstest_prompt"}  # a stand-in is asked ours
# What a small model on a large card needs to get through in minutes. All of M3's stages stay on, no sample is taken.
SHORT = {
    "sampling.instructions.max_new_tokens": 60,
    "sampling.answers.max_new_tokens": 120,
    "sampling.critiques.max_new_tokens": 80,
    "sampling.revisions.max_new_tokens": 130,
    "pairs.replacements": 1,  # with the one retry, four tries a slot
    "dpo.gradient_accumulation": 32,
    "dpo.learning_rate": 1e-5,  # [embedded] has five times as much, so that ten steps show at all
    "benchmarks.max_new_tokens": 256,
    "benchmarks.mtbench_max_new_tokens": 256,
}


# --- settings


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(options: argparse.Namespace) -> dict[str, str]:
    """Every --set of the run: key -> TOML value. What the user gives wins."""
    given = dict(text.split("=", 1) for text in options.set)
    found: Row = {}
    if "model.name" not in given and "model.backend" not in given and policy.cuda_devices():
        overlay = tomllib.loads((ROOT / "cai.toml").read_text())["embedded"]
        overlay.pop("milestones")
        found |= dict(flat(overlay)) | {"model.name": embedded_folder(), "model.quantization": "bf16"}
        found |= {"model.backend": "cuda", "model.max_seq_length": 4096}
    found |= SHORT | {"rounds": options.rounds, "dpo.epochs": options.epochs, "guard.model": "stand-in"}
    found |= {"benchmarks.run": list(NAMES), "benchmarks.judge": "stand-in"}
    found |= {f"benchmarks.{name}": str((options.data / file.file).resolve()) for name, file in PUBLISHED.items()}
    return {key: json.dumps(value) for key, value in found.items()} | given


def embedded_folder() -> str:
    """Where the embedded model's weights lie (made on first use, in a process of its own: it imports torch)."""
    code = "from cai.models import embedded; print(embedded.folder())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2]


# --- one attempt


def command_for(leg: Leg, sets: Mapping[str, str]) -> list[str]:
    """A new run, or the line that `--status` prints for one that was begun."""
    runner = [sys.executable, str(ROOT / "runner.py")]
    if not (leg.folder / "latest").exists():
        keys = {**sets, "items": str(leg.items), "runs": json.dumps(str(leg.folder))}
        words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        return [*runner, str(ROOT / "cai.toml"), "--milestone", "m3", *words]
    asked = [*runner, str(leg.run / "recipe.toml"), "--status", str(leg.run)]
    screen = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = next(line for line in screen.splitlines() if line.startswith("go on"))
    words = shlex.split(line.removeprefix("go on"))
    assert words[:2] == ["python", "runner.py"], line
    return [*runner, *words[2:]]


class Watch:
    """What one attempt did, from outside: seconds by the phase that status.json names, peak memory, when to strike."""

    def __init__(self, leg: Leg, process: subprocess.Popen[str], attempt: Row) -> None:
        self.leg, self.process, self.attempt = leg, process, attempt
        self.before = int(leg.status.get("attempt", 0))
        self.began = self.last = time.monotonic()
        self.sizes: dict[str, int] = {}

    def look(self) -> Row:
        """Status of this attempt ({} until it has written one); the time since the last look goes to its phase."""
        status = self.leg.status
        status = status if int(status.get("attempt", 0)) > self.before else {}
        now = time.monotonic()
        phase = str(status.get("stage") or "start")
        wall = self.attempt["wall"]
        wall[phase] = wall.get(phase, 0.0) + now - self.last
        self.attempt["seconds"] = now - self.began
        self.last = now
        self.attempt["peak_host_mib"] = max(self.attempt["peak_host_mib"], peak_mib(self.process.pid))
        return status

    def under_way(self, phase: str, status: Row) -> bool:
        """Whether the phase has committed something and goes on."""
        stage, run = str(status.get("stage", "")), self.leg.run
        if phase == "generation":
            return stage in GENERATED and self.grew(stage, [run / "records.jsonl"])
        if phase == "training":
            sealed = [int(p.parent.name.split("-")[1]) for p in run.glob("train/checkpoint-*/COMPLETE.json")]
            counted = (run / "train" / "fake_state.json").exists()
            return stage == "train" and (counted or (bool(sealed) and status.get("done", 0) > max(sealed)))
        logs = list(run.glob("eval/benchmarks/*.jsonl"))
        return is_benchmark(stage) and self.grew("benchmark", logs)

    def grew(self, name: str, logs: list[Path]) -> bool:
        size = sum(log.stat().st_size for log in logs if log.exists())
        return size > self.sizes.setdefault(name, size)


def run_attempt(leg: Leg, sets: Mapping[str, str], deadline: float, save: Callable[[], None]) -> Row:
    """Start runner.py, watch it, strike where a kill is due, stop it at the deadline; the attempt as it ended."""
    command = command_for(leg, sets)
    attempt: Row = {"resumed": "--resume" in command, "wall": {}, "seconds": 0.0, "peak_host_mib": 0.0}
    leg.state["attempts"].append(attempt)
    saved = said = told = time.monotonic()
    with leg.log.open("a") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)
        watch = Watch(leg, process, attempt)
        while process.poll() is None:
            status, now = watch.look(), time.monotonic()
            due = next((name for name in leg.kills if name not in leg.state["kills"]), "")
            if "stopped" not in attempt and due and watch.under_way(due, status):
                strike(leg, process, attempt, due, status)
            elif now > deadline and now >= told:
                process.send_signal(signal.SIGTERM if now < deadline + 2 * GRACE_SECONDS else signal.SIGKILL)
                attempt["stopped"] = True
                told = now + GRACE_SECONDS
            if now - saved > SAVE_SECONDS:
                save()
                saved = now
            if now - said > SAY_SECONDS:
                say(f"{leg.name}: {status.get('stage', 'start')} {status.get('done', 0)}/{status.get('total', 0)}")
                said = now
            time.sleep(POLL_SECONDS)
        watch.look()
    attempt["code"] = process.returncode
    return attempt


def strike(leg: Leg, process: subprocess.Popen[str], attempt: Row, due: str, status: Row) -> None:
    """SIGKILL, and what it left."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    attempt["killed_in"] = due
    left = heads(leg.run)
    leg.state["kills"][due] = {"stage": status["stage"], "attempt": len(leg.state["attempts"]), "logs": left}
    rows = sum(log["rows"] for log in left.values())
    say(f"{leg.name}: SIGKILL in {due} ({status['stage']}), {rows} rows on disk")


def peak_mib(pid: int) -> float:
    """Highest resident memory of a living process so far (VmHWM)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def heads(run: Path) -> Row:
    """What a kill left: bytes of whole lines in each log, and their sha256."""
    found = {}
    for path in logs_of(run):
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        name = str(path.relative_to(run))
        found[name] = {"bytes": len(whole), "rows": whole.count(b"\n"), "sha256": hashlib.sha256(whole).hexdigest()}
    return found


def go_on(leg: Leg, sets: Mapping[str, str], deadline: float, save: Callable[[], None]) -> int:
    """Attempts until the run is finished (0), the time is over (75), or it ended as it should not (1)."""
    leg.folder.mkdir(parents=True, exist_ok=True)
    while not leg.finished:
        if deadline - time.monotonic() < LEAST_PIECE:
            return errors.RESUMABLE
        attempt = run_attempt(leg, sets, deadline, save)
        code = leg.state["code"] = attempt["code"]
        save()
        ended = f"{leg.name}: attempt {len(leg.state['attempts'])}, exit {code}, {attempt['seconds']:.0f} s"
        say(f"{ended}, peak {attempt['peak_host_mib']:.0f} MiB")
        at_once = (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM)
        if code == errors.RESUMABLE or (code in at_once and "stopped" in attempt):
            return errors.RESUMABLE
        if code not in FINISHED and "killed_in" not in attempt:
            say("\n".join(leg.log.read_text(errors="replace").splitlines()[-12:]))
            return errors.BUG
    return errors.DONE


def say(line: str) -> None:
    print(line, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(file.file for file in PUBLISHED.values())
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help=f"the published files: {names}")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the runs and the state between calls lie")
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--kill", nargs="*", choices=PHASES, default=list(PHASES), help="where SIGKILL falls, in order")
    parser.add_argument("--only-until", type=float, default=0.0, metavar="SECONDS", help="then stop, resumable (75)")
    parser.add_argument(
        "--compare-memory", type=int, default=0, metavar="ITEMS", help="peak memory against fewer items"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to runner.py")
    parser.add_argument("--out", type=Path, help="the JSON (default: rehearsal.json in --run-dir)")
    options = parser.parse_args(argv)
    missing = [file.file for file in PUBLISHED.values() if not (options.data / file.file).is_file()]
    if missing:
        parser.error(f"--data: {options.data}/{missing[0]} is missing; give the folder of the published files")
    options.run_dir, options.data = options.run_dir.resolve(), options.data.resolve()
    return options


def read_state(options: argparse.Namespace, path: Path) -> Row:
    """What calls hand on; a call with other arguments than the first is refused."""
    names = ("items", "rounds", "epochs", "set", "kill", "compare_memory")
    asked = {name: getattr(options, name) for name in names} | {"data": str(options.data)}
    state = read_json(path) or {"asked": asked, "sets": settings(options)}
    changed = [name for name, value in asked.items() if state["asked"][name] != value]
    if changed:
        sys.exit(f"{path}: begun with another --{changed[0].replace('_', '-')}: give the same, or another --run-dir")
    for leg in ("main", "compare"):
        state.setdefault(leg, {"attempts": [], "kills": {}})
    return state


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    began, path = time.monotonic(), options.run_dir / "state.json"
    options.run_dir.mkdir(parents=True, exist_ok=True)
    state = read_state(options, path)
    save: Callable[[], None] = lambda: write_json_atomic(path, state, durable=False)  # noqa: E731
    save()
    legs = [Leg("main", options.items, tuple(options.kill), options.run_dir / "runs", state["main"])]
    if options.compare_memory:
        legs.append(Leg("compare", options.compare_memory, (), options.run_dir / "compare", state["compare"]))
    deadline = began + (options.only_until or float("inf"))
    for leg in legs:
        code = go_on(leg, state["sets"], deadline, save)
        if code:
            say(f"{leg.name}: the time is over, call again" if code == errors.RESUMABLE else f"see {leg.log}")
            return code
    result: Row = {"machine": "", "sets": state["sets"], **{leg.name: facts_of(leg) for leg in legs}}
    result["machine"] = machine_name(result["main"])
    if "compare" in result:
        result["memory_ratio"] = result["main"]["peak_host_mib"] / result["compare"]["peak_host_mib"]
    result["faults"] = faults_of(result, tuple(options.kill))
    show(result)
    (options.out or options.run_dir / "rehearsal.json").write_text(json.dumps(result, indent=1))
    return errors.BUG if result["faults"] else errors.DONE


if __name__ == "__main__":
    sys.exit(main())
