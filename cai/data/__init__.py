"""Instructions to answers, critiques, revisions and pairs, and what of them is trained on. No module here knows
torch."""
