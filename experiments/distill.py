"""A small student from scratch: does it learn more from text, or from a teacher's distributions over the same text?

    python experiments/distill.py                      # nine minutes on two cores
    python experiments/distill.py --quick              # a look

The teacher is not free: at every step of distillation it runs forward. So cross-entropy is given the same number of
steps, and then as many as the FLOPs of student and teacher together would have bought (`Recovered.flops`). All arms of
a seed start from the same student and read the same batches in the same order; the differences are paired by seed.

Results on the test split (Python 3.11 with jax 0.10.2; the text differs a little from machine to machine). The teacher
has 4 layers of width 128 and was trained for 300 steps on the same text, 3.69 TFLOPs to perplexity 41.52; the student
has 2 of width 64. Means over three seeds, differences with their 95 % intervals:

                      steps    FLOPs  teacher  perplexity      KL   nats a token above KD
    KD                  150    951 G     65 %       57.09   0.286
    KD, T = 2           150    951 G     65 %       59.26   0.327   +0.037 +- 0.031
    CE, equal steps     150    336 G      0 %       73.22   0.660   +0.249 +- 0.032
    CE, equal FLOPs     424    950 G      0 %       44.06   0.416   -0.259 +- 0.083

A step of distillation teaches much more than one of cross-entropy, and here it costs 2.8 times as much: from scratch,
with text to spare and a teacher this much larger than its student, the same FLOPs are better spent on cross-entropy.
What distillation gives at either price is a student nearer to its teacher (KL), which is what recovery after surgery is
for. One learning rate, one size of teacher: the crossing point was not looked for.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import tempfile
from typing import Any

import jax
import numpy as np

import lmx
from lmx import data, evaluate
from lmx.losses import Distillation, cross_entropy, distillation
from lmx.recipes.recovery import Recovered, recover
from lmx.train.feed import place_batch
from lmx.train.progress import si

SHAPE = dict(batch_size=16, length=128)
CRITICAL = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t at 95 %, by the number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="local", help='"local", or files, folders and globs of text')
    parser.add_argument("--steps", type=int, default=150, help="of distillation")
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(CRITICAL))
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps, two seeds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.teacher_steps, arguments.seeds = 4, 4, 2

    splits = data.split(data.deduplicate(data.read(arguments.data)))
    tokenizer = data.train_bpe((document.text for document in splits["train"]), vocab_size=1024)
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: data.build_cache(documents, tokenizer, folder) for name, documents in splits.items()}
        experiment(arguments, tokenizer.vocab_size, caches)


def experiment(arguments: argparse.Namespace, vocab_size: int, caches: dict[str, data.TokenCache]) -> None:
    sizes = dict(num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=4, intermediate_size=352)
    small = dict(num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=2, intermediate_size=176)
    if arguments.quick:
        sizes = small
    shape_of = lambda sizes: lmx.preset("llama-tiny", vocab_size=vocab_size, **sizes)  # noqa: E731
    rows = list(itertools.islice(data.evaluation_rows(caches["test"], **SHAPE), 0, None, 4))[:16]

    def fit(model: Any, teacher: Any, loss: Any, steps: int, seed: int) -> Recovered:
        batches = data.Batches(caches["train"], **SHAPE, seed=seed).iterate()
        how = dict(loss=loss, optimizer="muon", seed=seed)
        return recover(model, teacher, batches, steps, arguments.learning_rate, **how)

    def perplexity(model: Any) -> float:
        return math.exp(evaluate.mean_nll(model, rows, place=place_batch))

    taught = fit(lmx.init(shape_of(sizes), jax.random.key(0)), None, from_text, arguments.teacher_steps, 0)
    teacher = taught.model
    print(f"teacher: {si(taught.flops)}FLOPs, perplexity {perplexity(teacher):.2f}", flush=True)

    found: dict[str, list[tuple[Recovered, float, float]]] = {}

    def arm(name: str, student: Any, teacher_or_none: Any, loss: Any, steps: int, seed: int) -> Recovered:
        run = fit(student, teacher_or_none, loss, steps, seed)
        apart = evaluate.mean_kl(run.model, teacher, rows, place=place_batch)
        found.setdefault(name, []).append((run, perplexity(run.model), apart))
        print(f"seed {seed}: {name}: {run.steps} steps, perplexity {found[name][-1][1]:.2f}", flush=True)
        return run

    steps, warm = arguments.steps, functools.partial(distillation, temperature=2.0)
    for seed in range(1, arguments.seeds + 1):
        student = lmx.init(shape_of(small), jax.random.key(seed))
        taught = arm("KD", student, teacher, distillation, steps, seed)
        arm("KD, T = 2", student, teacher, warm, steps, seed)
        alone = arm("CE, equal steps", student, None, from_text, steps, seed)
        arm("CE, equal FLOPs", student, None, from_text, round(steps * taught.flops / alone.flops), seed)
    show(found)


def from_text(pair: Distillation, batch: dict, key: jax.Array):
    """Cross-entropy of the student; the teacher is not looked at."""
    return cross_entropy(pair.student, batch)


def show(found: dict[str, list[tuple[Recovered, float, float]]]) -> None:
    """One line an arm: means over the seeds; log-perplexity above KD's is paired, with its 95 % interval."""
    print(f"{'':17s}{'steps':>6s}{'FLOPs':>9s}{'teacher':>9s}{'perplexity':>12s}{'KL':>8s}   nats a token above KD")
    of_kd = np.log([p for _, p, _ in found["KD"]])
    for name, runs in found.items():
        run, perplexities, kls = runs[0][0], [p for _, p, _ in runs], [k for _, _, k in runs]
        above = np.log(perplexities) - of_kd
        margin = CRITICAL[len(runs)] * above.std(ddof=1) / math.sqrt(len(runs))
        share = f"{100 * run.teacher_flops / run.flops:.0f} %"
        difference = "" if name == "KD" else f"{above.mean():+.3f} +- {margin:.3f}"
        spent = f"{name:17s}{run.steps:6d}{si(run.flops):>9s}{share:>9s}"
        print(f"{spent}{np.mean(perplexities):12.2f}{np.mean(kls):8.3f}   {difference}")


if __name__ == "__main__":
    main()
