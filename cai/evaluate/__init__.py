"""Evaluation: critiques, revisions, preference, training health and forgetting, each as figures with n and interval.

`pipeline.evaluate` lists what serves a run, `exam` a labelled file. Importing this imports neither torch nor scipy;
the parts are imported when they are asked for.
"""
