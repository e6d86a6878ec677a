"""The recipe's sections for guard filtering and public benchmarks: frozen pydantic models, names, ranges, defaults.

Owns what a user can set about M3; `recipe.py` embeds these sections. Imports nothing above `settings`, no torch.
`"stand-in"` as a guard or judge is the policy's own base model: it proves the path and measures nothing; every file
and every table says so.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cai.recipe.settings import Count, Fraction, Positive, Prompted, Section

STAND_IN = "stand-in"
FILES = ("harmbench", "xstest", "mtbench", "mtbench_prompts", "xstest_prompt")
Benchmark = Literal["harmbench", "xstest", "mtbench"]
LLAMA_CATEGORIES = tuple(f"S{number}" for number in range(1, 15))


class GuardSection(Section):
    """Filtering of finished pairs by a safety model. `model`: hub id, local folder or "stand-in"."""

    enabled: bool = False
    model: str = Field("Qwen/Qwen3Guard-Gen-4B", min_length=1)
    revision: str = Field("main", min_length=1)
    style: Literal["auto", "qwen3guard", "llama-guard"] = "auto"
    excluded: tuple[str, ...] = ()  # Llama Guard categories that do not count, S1 to S14
    controversial: Literal["safe", "unsafe"] = "unsafe"  # what Qwen3Guard's third label counts as
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # unsafe from this probability on
    alarm: Fraction = 0.40  # a larger share of dropped pairs is said aloud and stands in the report
    placement: Literal["auto", "beside", "after"] = "auto"  # auto: beside the policy where it fits

    @model_validator(mode="after")
    def _categories(self) -> GuardSection:
        unknown = [key for key in self.excluded if key not in LLAMA_CATEGORIES]
        if unknown:
            raise ValueError(f"guard.excluded: {unknown[0]!r} is no category of Llama Guard 3. Write S1 to S14.")
        return self


class ChecksSection(Section):
    """Whether a guard or judge is proven: each is tried once a run on rows whose answer is known."""

    enabled: bool = True
    limit: Count = 0  # rows of a check set; 0 = all (40, MT-Bench 24); above: the first ones
    kappa: Fraction = 0.70  # proven from this agreement beyond chance on ...
    sensitivity: Fraction = 0.85  # ... and this share of the harmful (refused) rows found
    minimum_n: Positive = 20  # no judge is proven on fewer rows
    require_proven: bool = False  # an unproven guard or judge ends the run (exit 7)

    @model_validator(mode="after")
    def _checked(self) -> ChecksSection:
        if self.require_proven and not self.enabled:
            raise ValueError("checks.require_proven: nothing is proven with checks.enabled = false. Switch it on.")
        return self


class BenchmarksSection(Section):
    """Public benchmarks. A path is resolved against the recipe's folder; empty: downloaded once into the cache."""

    run: tuple[Benchmark, ...] = ()  # measured within the milestone; others by --benchmark
    prompted: tuple[Prompted, ...] = ()  # the base prompted well answers them too
    harmbench: str = ""  # HarmBench text behaviours, CSV
    xstest: str = ""  # XSTest prompts, CSV
    mtbench: str = ""  # MT-Bench questions, JSON lines
    mtbench_prompts: str = ""  # MT-Bench judge prompts, JSON lines
    xstest_prompt: str = ""  # XSTest's own prompt for a judge: "official" or a file; empty: ours
    checksum: bool = True  # false: your own files are taken as they are, and the result says so
    sha256: dict[str, str] = Field({})  # further accepted files: benchmark name -> sha256 in hex
    judge: str = ""  # one model for all three, or "stand-in"; empty: the keys below
    harmbench_judge: str = Field("cais/HarmBench-Llama-2-13b-cls", min_length=1)
    xstest_judge: str = Field("regex", min_length=1)
    mtbench_judge: str = Field("Qwen/Qwen2.5-32B-Instruct", min_length=1)
    max_new_tokens: Positive = 512
    mtbench_max_new_tokens: Positive = 1024
    limit: Count = 0  # rows a benchmark; 0 = all; above: a seeded sample
    contamination: bool = False  # remove training pairs that overlap a benchmark before training

    @model_validator(mode="after")
    def _checksums(self) -> BenchmarksSection:
        for name, sha256 in self.sha256.items():
            if name not in FILES:
                raise ValueError(f"benchmarks.sha256: {name!r} is no benchmark file. Write one of {', '.join(FILES)}.")
            if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
                raise ValueError(f"benchmarks.sha256: {name} is not 64 hex digits. Write what `sha256sum` prints.")
        return self

    def judge_of(self, name: str) -> str:
        """The judge's recipe entry: `judge` if given, else the benchmark's own."""
        return self.judge or str(getattr(self, f"{name}_judge"))
