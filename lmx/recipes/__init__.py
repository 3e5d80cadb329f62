"""Floor 5: what each command does, as a Python function of plain options that returns plain results."""
