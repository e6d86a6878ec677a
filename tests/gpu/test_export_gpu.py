"""The exported adapter in plain transformers and peft, by the card's own lines, beside `--chat` on three requests.

CAI_RUN: a finished run on this machine (its model must lie here, too); without it an M1 of the embedded model is made.
CAI_RUNS: the folder of that run, where it is not `runs`. pytest -m gpu tests/gpu/test_export_gpu.py -s
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from support.runs import ROOT

sys.path.insert(0, str(Path(__file__).parent))
from test_runs_gpu import run, small_model

pytestmark = pytest.mark.gpu
QUESTIONS = (
    "How do I keep basil alive on a windowsill?",
    "Write a short note to a neighbour whose parcel I took in.",
    "What should I check before I sign the lease of a flat?",
)
FOUR_BITS = (
    ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    'bnb_4bit_compute_dtype="bfloat16", bnb_4bit_use_double_quant=True), device_map="auto")'
)
ASKED = re.compile(r"^asked = .*$", re.M)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a run, the folder that holds runs)."""
    if given := os.environ.get("CAI_RUN"):
        return Path(given).resolve(), Path(given).resolve().parent
    root = tmp_path_factory.mktemp("runs")
    return run(root, "m1", small_model(), "--override-gate", "a small model on a GPU")[0], root


def command(runs, *words, said=None):
    program = [sys.executable, "runner.py", "--set", f"runs={json.dumps(str(runs))}", *words]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, input=said, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def asked(path, runs, question):
    """(text, how it ended) of the tuned arm."""
    said = command(runs, "--chat", str(path), said=question)
    text, how = re.search(r"\[tuned\]\n(.*?)\n\(([^,]*), \d+ tokens\)", said, re.S).groups()
    return text.strip(), how


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """(folder of the export, [(text, how it ended)] of `--chat`), all asked side by side: each is mostly loading."""
    path, runs = finished
    out = tmp_path_factory.mktemp("export") / "out"
    with ThreadPoolExecutor(len(QUESTIONS) + 1) as pool:
        told = pool.submit(command, runs, "--export", str(path), "--to", str(out))
        found = list(pool.map(partial(asked, path, runs), QUESTIONS))
    print(told.result())
    return out, found


def program_of(card, base, folder, tokens, four_bits):
    """The card's lines, for three questions; what a reader has to put in is put in, and nothing else."""
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = code.replace("path/to/this/folder", str(folder)).replace("max_new_tokens=300", f"max_new_tokens={tokens}")
    code = re.sub(
        r'^(base = .*?from_pretrained\()"[^"]*"', lambda m: f"{m[1]}{json.dumps(str(base))}", code, flags=re.M
    )
    if four_bits:
        code = code.replace("import AutoModel", "import BitsAndBytesConfig, AutoModel")
        code = re.sub(r'^(base = .*), device_map="auto"\)$', lambda m: m[1] + FOUR_BITS, code, flags=re.M)
    head, tail = ASKED.split(code)
    loop = f"for question in {QUESTIONS!r}:\n    asked = [{{'role': 'user', 'content': question}}]\n"
    loop += "".join(f"    {line}\n" for line in tail.strip("\n").split("\n"))
    ended = "    print('TOKENS', tuned.shape[1] - ids['input_ids'].shape[1])\n    print('END OF ANSWERS')\n"
    return head + loop + ended


def plain(card, base, folder, tokens, four_bits, into):
    """[(text, tokens)] of the tuned model, for each question."""
    script = into / f"card{four_bits:d}.py"
    script.write_text(program_of(card, base, folder, tokens, four_bits))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=400, cwd=into)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for block in done.stdout.split("END OF ANSWERS\n")[:-1]:
        texts, count = block.rsplit("TOKENS", 1)
        found.append((texts, int(count)))
    return found


def in_common(one, other):
    """Words from the beginning that are equal."""
    one, other = one.split(), other.split()
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("four_bits", [True, False], ids=["nf4", "bf16"])
def test_the_card_s_lines_answer_like_chat_and_end(finished, exported, tmp_path, four_bits):
    """In 4 bits, as it was trained and as `--chat` loads it, they begin alike; 16 bits round otherwise."""
    path, (out, chat) = finished[0], exported
    card = (out / "adapter" / "README.md").read_text()
    recipe = (path / "recipe.resolved.toml").read_text()
    base = re.search(r'^\[model\]$.*?^name = "(.*?)"$', recipe, re.M | re.S)[1]
    tokens = int(re.search(r"^\[sampling.answers\]$.*?^max_new_tokens = (\d+)$", recipe, re.M | re.S)[1])
    agree = 0
    said_by_card = plain(card, base, out / "adapter", tokens, four_bits, tmp_path)
    for (text, how), (said, count) in zip(chat, said_by_card, strict=True):
        common = in_common(said, text)
        print(f"{'nf4' if four_bits else 'bf16'}: {common} of {len(text.split())} words as --chat; {count} tokens; "
              f"--chat {how}\n  plain: {said.strip()[:300]!r}\n  chat:  {text[:300]!r}")  # fmt: skip
        assert (count < tokens) or how == "cut at the limit", "--chat ends by itself, the exported one does not"
        agree += common >= min(8, len(text.split()))
    if four_bits:
        assert agree >= 2, "in 4 bits, as it was trained, two of three answers begin as --chat's do"
