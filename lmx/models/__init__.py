"""Floor 2: configs and presets, the Transformer, the language-model protocol, stacks, analytic cost, folders."""
