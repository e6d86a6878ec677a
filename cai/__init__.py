"""Constitutional AI on one GPU: generate, critique, revise, train with DPO, measure, report."""

__version__ = "0.1.0"
