"""Floor 3, losses: `loss(model, batch, key) -> (sum, weight, metrics)`, metrics being (sum, weight) pairs too.

Sums and weights, not means: microbatches of unlike token counts then add up to exactly one big batch. `model` is any
pytree that the loss understands; a loss closes over no arrays. Options are bound by `functools.partial`.
"""

from lmx.losses.cross_entropy import cross_entropy, targets_of
from lmx.losses.distillation import Distillation, distillation

__all__ = ["Distillation", "cross_entropy", "distillation", "targets_of"]
