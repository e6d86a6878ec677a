"""`--doctor`: machine, versions, model and recipe, each with its remedy."""

from __future__ import annotations

import argparse

from cai import errors
from cai.preflight import model_checks as doctor_model
from cai.preflight.machine import machine_checks


def command(args: argparse.Namespace) -> int:
    """`--doctor`: every check, a line each; exit 2 if one failed."""
    from cai.inputs import read_inputs, runs_root
    from cai.terminal import say

    inputs = read_inputs(args)
    found = []
    for check in machine_checks(inputs.recipe, inputs.backend, runs_root(inputs.source, inputs.recipe)):
        say(check.line())
        found.append(check)
    if any(check.status == "fail" for check in found):
        say("the model was not loaded: cure the lines marked fail first")
        return errors.USAGE
    from cai.models.policy import load

    model = load(inputs.recipe.model, inputs.backend, seed=inputs.recipe.seed, say=say)
    for check in doctor_model.model_checks(model, inputs.recipe, inputs.prompts):
        say(check.line())
        found.append(check)
    failed = sum(check.status == "fail" for check in found)
    warned = sum(check.status == "warn" for check in found)
    say(f"{len(found)} checks: {failed} failed, {warned} to look at")
    return errors.USAGE if failed else errors.DONE
