"""One run: its folder, manifest and events, the resumable loop, progress, stop, budget and rates."""
