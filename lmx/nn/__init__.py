"""Floor 1: layers. Each file holds one layer: its parameters' specs and the few pure functions that apply them."""
