"""Floor 3, training: optimizers, the state, the step, the loop, checkpoints and metrics.

    optimizer = adamw(cosine(3e-3, steps=1000, warmup=50))                            # optimizers.py
    state = start(model, optimizer, train="mlp")                                           # state.py
    step = make_train_step(loss, optimizer)                                                 # step.py
    state, metrics = step(state, batch)
"""

from lmx.train.optimizers import adafactor, adamw, cosine, muon, optimizer, schedule, wsd
from lmx.train.state import TrainState, abstract_start, start
from lmx.train.step import make_train_step

__all__ = [
    "TrainState",
    "abstract_start",
    "adafactor",
    "adamw",
    "cosine",
    "make_train_step",
    "muon",
    "optimizer",
    "schedule",
    "start",
    "wsd",
]
