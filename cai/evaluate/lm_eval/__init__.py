"""lm_eval on the loaded model: tasks, and replaying answers from the rows of a run."""
