"""How much memory does it take to load a checkpoint of Hugging Face's format, beside the model itself?

    python experiments/benchmarks/load.py [--json] [--quick] [--results FOLDER]

A checkpoint of many layers in several safetensors files (Llama's shape, random numbers; 0.3 GB, with --quick 20 MB) is
loaded in fresh processes: by `lmx.load` on one device and on 8 simulated ones (fsdp=8), and, the peer, as scripts do
it: all files read by safetensors, the layers stacked, then given to jax. `above` is the most memory that the process
held while loading, less what it held before (a small checkpoint is loaded first) and less the model's own bytes; lmx
promises at most one leaf (`leaf`: the matrices of all layers, stacked), of which each device gets its part. Where torch
is there, transformers loads it too, which only maps the files as long as nothing writes to the weights. `ratio` is the
peer's `above` to that of `lmx.load`; the medians are seconds; `floor` is reading the files once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import turns

LMX, MESH, STACK, TORCH = "lmx", "lmx, 8 devices", "safetensors, stacked", "transformers"
LOADERS = {
    LMX: "model = lmx.load(folder)",
    MESH: "model = lmx.load(folder, mesh='fsdp=8')",
    STACK: """
from safetensors.numpy import load_file
stored = {}
for file in sorted(glob.glob(folder + '/*.safetensors')):
    stored |= load_file(file)
layers = max(int(name.split('.')[2]) for name in stored if '.layers.' in name) + 1
names = sorted({re.sub('layers.[0-9]+', 'layers.{}', name) for name in stored})
pick = lambda name: np.stack([stored[name.format(i)].T for i in range(layers)]) if '{}' in name else stored[name]
model = {name: jnp.asarray(pick(name)) for name in names}
""",
    TORCH: "model = transformers.AutoModelForCausalLM.from_pretrained(folder)",
}
ONE_LOAD = """
import glob, json, re, sys, time
folder = sys.argv[2]
{imports}
{load}  # a small one: what is imported and compiled on the way does not count
folder = sys.argv[1]
def memory(name):
    with open('/proc/self/status') as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))
before = memory('VmRSS')
with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')  # the peak begins anew
begin = time.perf_counter()
{load}
seconds = time.perf_counter() - begin
print(json.dumps({{'seconds': seconds, 'peak': memory('VmHWM') - before}}))
"""
JAX = "import jax, jax.numpy as jnp, numpy as np\nimport lmx, lmx.hf\njnp.zeros(3).block_until_ready()"


def benchmark(options: Namespace) -> dict[str, Any]:
    quick = options.quick
    names = [LMX, MESH, STACK, *([TORCH] if importlib.util.find_spec("torch") else [])]
    layers, width, rounds = (16, 128, 1) if quick else (32, 448, 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder, small = f"{scratch}/folder", f"{scratch}/small"
        write(Path(small), 2, 32)
        model_bytes, leaf_bytes = write(Path(folder), layers, width)
        loads = {name: [] for name in names}
        floors = []
        for number in range(rounds):
            turns.say(f"round {number + 1} of {rounds}")
            floors.append(turns.timed(lambda: [path.read_bytes() for path in Path(folder).glob("*.safetensors")]))
            for name in names:
                loads[name].append(one_load(name, folder, small))
    rows = []
    for name, found in loads.items():
        peak = statistics.median(load["peak"] for load in found)
        above = max(peak - model_bytes, 1)
        seconds = statistics.median(load["seconds"] for load in found)
        rows.append({
            "case": name, "seconds": seconds, "above_bytes": above, "model_bytes": model_bytes, "leaf_bytes": leaf_bytes
        })  # fmt: skip
        turns.say(
            f"{name:<22} {1e3 * seconds:7.0f} ms, {above / 1e6:6.1f} MB above the model's {model_bytes / 1e6:.0f} MB "
            f"(largest leaf {leaf_bytes / 1e6:.1f} MB)"
        )
    above = {row["case"]: row["above_bytes"] for row in rows}
    packages = ["jax", "numpy", "safetensors", *(["transformers", "torch"] if TORCH in names else [])]
    return {
        "name": "load",
        "ratio": above[STACK] / above[LMX],
        "medians": {row["case"]: row["seconds"] for row in rows},
        "floor": statistics.median(floors),
        "versions": turns.versions(*packages),
        "cases": rows,
    }


def write(folder: Path, layers: int, width: int) -> tuple[int, int]:
    """A checkpoint of random numbers; (bytes of the model, bytes of its largest leaf)."""
    import jax
    import numpy as np

    import lmx
    from lmx import hf
    from lmx.core import specs
    from lmx.models import transformer

    config = lmx.Config(8192, layers, width, 8, 11 * width // 4, tie_embeddings=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: rng.standard_normal(spec.shape, np.float32), transformer.abstract(config)
    )  # fmt: skip
    size = specs.nbytes(params)
    hf.save(transformer.Model(config, params), folder, format="hf", max_file_bytes=size // 4)
    return size, max(leaf.nbytes for leaf in jax.tree.leaves(params))


def one_load(name: str, folder: str, small: str) -> dict[str, float]:
    imports = "import torch, transformers, transformers.models.llama.modeling_llama" if name == TORCH else JAX
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"} if name == MESH else {}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | devices | turns.SILENT
    source = ONE_LOAD.format(imports=imports, load=LOADERS[name])
    done = subprocess.run(
        [sys.executable, "-c", source, folder, small], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    turns.main(__doc__, None, benchmark)
