"""Train a decoder on the text that every Python machine has: the experiment to copy.

    python experiments/train_lm.py                     # the training of `lmx train`, written out
    python experiments/train_lm.py --steps 50          # a look

An experiment is a Python file: copy it, change it, keep the numbers you got in its docstring. Everything below is
the library; `lmx train` adds resuming, tables and files around the same calls.

Results, bits per byte on the test split (Python 3.11 with jax 0.10.2, two cores; the text differs a little from machine
to machine, for `docs` is what is installed):

    lmx train                    all    reference  code   docs
     llama-2m, 400 steps         1.823  1.778      1.666  2.015
     unigram                     3.128  2.939      2.929  3.378
     lzma                        1.783  2.764      1.766  1.839

    lmx train --preset small     all    reference  code   docs
     llama-4m, 1100 steps        1.593  1.559      1.452  1.763
     lzma                        1.783  2.764      1.766  1.839

The small preset, 25 minutes beside other work on the two cores, is below lzma in every domain; the quick one in
`reference` and `code`, not in `docs`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

import jax

import lmx
from lmx import data, decode, evaluate, losses
from lmx.models import transformer
from lmx.train import optimizers
from lmx.train.feed import place_batch
from lmx.train.loop import Every, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="local", help='"local", or files, folders and globs of text')
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    arguments = parser.parse_args()

    # Text, split by content, tokenised into memory-mapped streams.
    splits = data.split(data.deduplicate(data.read(arguments.data)))
    tokenizer = data.train_bpe((document.text for document in splits["train"]), vocab_size=4096)
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: data.build_cache(documents, tokenizer, folder) for name, documents in splits.items()}
        experiment(arguments, tokenizer, caches)


def experiment(arguments: argparse.Namespace, tokenizer: data.Tokenizer, caches: dict[str, data.TokenCache]) -> None:
    # A model is a frozen config and a tree of parameters.
    config = lmx.preset("llama-2m", vocab_size=tokenizer.vocab_size)
    model = transformer.init(config, jax.random.key(0))

    # An optimizer is an optax transformation; the state splits the model into what is trained and what is frozen.
    rate = optimizers.cosine(arguments.learning_rate, arguments.steps, warmup=arguments.steps // 20)
    optimizer = optimizers.muon(rate)
    state = lmx.start(model, optimizer, train=".")

    # The step is made from a loss and an optimizer: jitted, donated, sharded on the mesh in force.
    step = lmx.make_train_step(losses.cross_entropy, optimizer, clip_norm=1.0)

    batches = data.Batches(caches["train"], arguments.batch_size, arguments.length, seed=0)
    shape = dict(length=arguments.length, batch_size=arguments.batch_size)

    def validate(state: lmx.train.TrainState) -> dict[str, float]:
        rows = itertools.islice(data.evaluation_rows(caches["valid"], **shape), 0, None, 4)  # every fourth batch
        return {"valid_loss": evaluate.mean_nll(state.model, rows, place=place_batch)}

    outcome = train(
        state, step, map(place_batch, batches.iterate()), steps=arguments.steps,
        every=Every(log=50, evaluate=100), evaluate=validate, report=Print(),
    )  # fmt: skip

    rows = data.evaluation_rows(caches["test"], overlap=arguments.length // 2, **shape)
    bits = evaluate.bits_per_byte(outcome.state.model, rows, caches["test"].domain_bytes, place=place_batch)
    print("bits per byte on the test split:", {domain: round(value, 3) for domain, value in bits.items()})
    how = dict(max_new_tokens=64, temperature=0.8, key=jax.random.key(0))
    print("def " + decode.generate_text(outcome.state.model, tokenizer, "def ", **how)[0])


class Print:
    """A plain report: one line for each event of the loop."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        print(f"step {step}: loss {values['loss']:.3f}, {values['tokens_per_second']:.0f} tokens/s")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        print(f"step {step}: {values}")

    def note(self, text: str) -> None:
        print(text)


if __name__ == "__main__":
    main()
