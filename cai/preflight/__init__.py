"""What would waste a rented hour, found before it is spent: the machine and the loaded model."""
