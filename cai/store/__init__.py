"""Bytes that survive: files written whole, the append-only log and its sums, the rows of a run. Knows nothing of
what a row means."""
