"""How much memory a run takes, from its sizes alone: pure functions of numbers."""
