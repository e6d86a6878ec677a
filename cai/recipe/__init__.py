"""What the user writes: sections and checks, the constitution, the grid, the prompt files. Strict at the door,
frozen behind it."""
