"""adapter_config.json: what PEFT says of a LoRA adapter, which of it lmx computes, and the same written.

A module is named as in the model that the adapter is for, such as model.layers.0.self_attn.q_proj.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmx.core.errors import ConfigError, FolderError

NAME = "adapter_config.json"
# Fields that change nothing of what a trained adapter computes: which modules it has stands in its file of tensors too.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "parent_library", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type", "velora_config",
}  # fmt: skip
READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
}  # fmt: skip
# Ways to begin that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) take from it what they put in A B.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
REASONS = {
    "use_dora": "DoRA scales each output of the merged weight by a trained magnitude, which no low-rank update does",
    "lora_bias": "it has biases in its updates",
    "alora_invocation_tokens": "an activated LoRA only acts behind certain tokens",
    "trainable_token_indices": "it replaces single rows of the token table",
    "layer_replication": "it repeats layers of its base",
    "target_parameters": "it adapts parameters that are not those of a linear layer",
}
TASKS = {
    "lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "spans": "QUESTION_ANS",
    "pooled": "FEATURE_EXTRACTION", "none": "FEATURE_EXTRACTION",
}  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """The fields of a LoRA adapter's config.

    Raises FolderError if there is none or it is damaged, ConfigError for an adapter that lmx does not compute.
    """
    path = folder / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{folder} holds no adapter in PEFT's format: it has no {NAME}") from error
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise FolderError(f"{path} is damaged: it holds no JSON object")
    merge = "merge it with PEFT (merge_and_unload), save the model and load that"
    if values.get("peft_type") != "LORA":
        raise ConfigError(f"{path} is of peft_type {values.get('peft_type')!r}; lmx reads LORA: {merge}")
    for name, value in values.items():
        if name not in NEUTRAL | READ and value:
            reason = REASONS.get(name, "lmx does not know what it changes")
            raise ConfigError(f"{path} has {name} {value!r}: {reason}; {merge}")
    if values.get("bias", "none") != "none":
        raise ConfigError(f"{path} has bias {values['bias']!r}: it also trained biases of its base; {merge}")
    if values.get("init_lora_weights", True) not in BEGINNINGS:
        begun = values["init_lora_weights"]
        raise ConfigError(f"{path} has init_lora_weights {begun!r}, which changes the base's own weights; {merge}")
    return values


def strength(values: Mapping[str, Any], module: str) -> tuple[int, float]:
    """(rank, alpha) of a module's update in the sense of lmx's LoRA, which counts it alpha / rank times.

    rsLoRA (Kalajdzievski 2023, "Rank Stabilization") counts it alpha / sqrt(rank) times: its alpha is sqrt(rank) times
    as large here. Raises ConfigError for numbers or patterns that make no sense.
    """
    try:
        rank = int(_of(values.get("rank_pattern"), module, values.get("r", 8)))
        alpha = float(_of(values.get("alpha_pattern"), module, values.get("lora_alpha", 8)))
        return rank, alpha * rank**0.5 if values.get("use_rslora") else alpha
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{NAME}: r, lora_alpha or their patterns make no sense for {module}: {error}") from error


def _of(patterns: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    """The number of the first pattern that matches the end of a module's name, from a dot on."""
    found = (number for key, number in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, usual)


def write(
    strengths: Mapping[str, tuple[int, float]],
    modules: Iterable[str],
    base: str | None,
    task: str | None,
    flipped: bool,
    replaced: list[str],
) -> str:
    """The text of the file.

    strengths: module -> (rank, alpha) of the adapter; modules: all that the model has; base: where its base is;
    flipped: whether its modules store weights (inputs, outputs); replaced: modules that the file holds whole.
    """
    (rank, alpha), _ = Counter(strengths.values()).most_common(1)[0]
    values = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "rank_pattern": {name: r for name, (r, _) in strengths.items() if r != rank},
        "alpha_pattern": {name: _number(a) for name, (_, a) in strengths.items() if a != alpha},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": flipped,
        "init_lora_weights": True,
        "modules_to_save": replaced or None,
        "target_modules": targets(set(strengths), set(modules)),
    }
    return json.dumps(values, indent=2) + "\n"


def targets(adapted: set[str], modules: set[str]) -> list[str]:
    """The shortest endings that name the adapted modules and no other of the model, as PEFT matches them."""
    found = set()
    for name in adapted:
        parts = name.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts)))
        named = lambda end: {other for other in modules if other == end or other.endswith(f".{end}")}  # noqa: E731
        found.add(next((end for end in endings if named(end) <= adapted), name))
    return sorted(found)


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
