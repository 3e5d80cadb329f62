"""Floor 0: what every other room stands on: errors, nodes, path patterns, specs, weights and sharding."""
