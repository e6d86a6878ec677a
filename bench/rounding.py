"""What rounding the linears does to a model's distribution over its next token, in nats, on this project's prompts.

Compared: the weights as loaded (fp32) with NF4; NF4 with its bf16 rounding; NF4 with 8-bit copies of the weights; and
with 8-bit weights and inputs, which is what `engine.linears = "fp8"` and "int8" draw with; and NF4 with keys and values
in 8 bits (`engine.kv = "int8"`). Everything is computed in fp32 on rounded values, by the embedded model or one from a
folder, so any machine will do (minutes on one core). What all of it is together for a model,
`python runner.py cai.toml --doctor` says on a GPU ("8-bit drawing").

    python bench/rounding.py --tokens 3072 --out rounding.json
    python bench/rounding.py --model FOLDER --tokens 925 --only kv
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cai.engine.native.nf4 import NF4  # noqa: E402
from cai.models import policy  # noqa: E402
from cai.recipe.settings import ModelSection  # noqa: E402

CONTEXT = 512


def to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of NF4's 16 values in blocks of 64, each scaled by its largest."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / scale)[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    return (torch.tensor(NF4)[codes] * scale).view_as(weight)


def to_e4m3(rows: torch.Tensor) -> torch.Tensor:
    """Each row scaled to e4m3's range and rounded, as `cai.engine.native.fp8.round_rows` does."""
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def to_int8(rows: torch.Tensor) -> torch.Tensor:
    """Each row rounded to 255 steps, as `cai.engine.native.int8.round_rows` does."""
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.floor(rows / scale + 0.5) * scale


def with_rounded_keys(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
    """Attention over keys and values (B, M, T, D) in 8 bits, a scale for each token's head, as `KVCache` has them."""
    return sdpa_attention_forward(module, query, to_int8(key), to_int8(value), *rest, **more)


AttentionInterface.register("rounded", with_rounded_keys)
AttentionMaskInterface.register("rounded", sdpa_mask)


@torch.no_grad()
def logps(hf: Any, ids: torch.Tensor) -> torch.Tensor:
    """(T, V), of contexts of 512 tokens."""
    return torch.cat([hf(part[None]).logits.float().log_softmax(-1)[0] for part in ids.split(CONTEXT)])


def compared(p_TV: torch.Tensor, q_TV: torch.Tensor) -> dict[str, float]:
    kl_T = (p_TV.exp() * (p_TV - q_TV)).sum(-1)
    same = (p_TV.argmax(-1) == q_TV.argmax(-1)).float().mean()
    return {
        "kl_mean": round(kl_T.mean().item(), 5),
        "kl_max": round(kl_T.max().item(), 3),
        "same": round(same.item(), 4),
    }


def measure(hf: Any, ids: torch.Tensor, only: str = "") -> dict[str, dict[str, float]]:
    linears = {name: m for name, m in hf.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}

    def each(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        for linear in linears.values():
            linear.weight.data = change(linear.weight.data)
        return logps(hf, ids)

    loaded, rows = logps(hf, ids), {}
    nf4 = each(to_nf4)
    rows["NF4 against the loaded weights"] = compared(loaded, nf4)
    hf.set_attn_implementation("rounded")
    rows["keys and values in 8 bits against NF4"] = compared(nf4, logps(hf, ids))
    hf.set_attn_implementation("sdpa")
    if only == "kv":
        return rows
    kept = {name: linear.weight.data for name, linear in linears.items()}

    def drawn(change: Callable[[torch.Tensor], torch.Tensor], but: str = "-", inputs: bool = True) -> torch.Tensor:
        """With weights, and inputs, rounded of all linears `but` those; the weights are NF4's again afterwards."""
        changed = [linear for name, linear in linears.items() if not name.endswith(but)]
        hooks = [m.register_forward_pre_hook(lambda _, given: (change(given[0]),)) for m in changed if inputs]
        for linear in changed:
            linear.weight.data = change(linear.weight.data)
        found = logps(hf, ids)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            linear.weight.data = kept[name]
        return found

    rows["bf16 copies against NF4"] = compared(nf4, drawn(lambda w: w.bfloat16().float(), inputs=False))
    rows["8-bit weights against NF4"] = compared(nf4, drawn(to_e4m3, inputs=False))
    rows["8-bit weights and inputs against NF4"] = compared(nf4, fp8 := drawn(to_e4m3))
    rows["8-bit weights and inputs against the loaded weights"] = compared(loaded, fp8)
    rows["int8 weights and inputs against NF4"] = compared(nf4, drawn(to_int8))
    rows["the same, down_proj in 16 bits"] = compared(nf4, drawn(to_int8, but="down_proj"))
    return rows


def of_folder(folder: str) -> Any:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    name = Path(folder).resolve().name
    return SimpleNamespace(hf=hf, hf_tokenizer=AutoTokenizer.from_pretrained(folder), facts={"model": name})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--out", default="rounding.json")
    parser.add_argument("--model", default="", help="a folder of 16- or 32-bit weights; else the embedded model")
    parser.add_argument("--only", choices=("", "kv"), default="")
    options = parser.parse_args()
    loaded = of_folder(options.model) if options.model else policy.load(ModelSection(), "embedded")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "prompts").glob("*.yaml")))
    ids = torch.tensor(loaded.hf_tokenizer(text)["input_ids"][: options.tokens])
    result = {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": loaded.facts["model"],
        "tokens": len(ids),
        "rows": measure(loaded.hf, ids, options.only),
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['model']}, {len(ids)} tokens of this project's prompts, {result['machine']}, torch {result['torch']}"
    )
    print("| compared | mean KL, nats a token | largest | same first choice |\n| --- | --- | --- | --- |")
    for name, row in result["rows"].items():
        print(f"| {name} | {row['kl_mean']} | {row['kl_max']} | {row['same']:.1%} |")


if __name__ == "__main__":
    main()
