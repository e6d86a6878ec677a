"""Experiments over whole runs: each is one command that makes, forks and resumes runs and ends with its own page."""
