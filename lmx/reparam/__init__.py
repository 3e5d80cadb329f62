"""Floor 4: re-parameterization, the same model in fewer or other numbers.

    factorize, decompose_model, choose_ranks, rebuild: matrices as low rank        factorization.py
    factorize_weight: one matrix; its mathematics                                  factorization.py, decompose.py
    moments: what a model's weights see                                            grams.py
    pivot, quantize, quantize_model: low rank without its freedom, int8            forms.py
    share_latent: keys and values through one latent, all that the cache holds     latents.py
    fold, fold_value_bias, fold_embedding, untie, compose                          folds.py
    widen: parallel branches to train, which fold                                  branches.py
    fold_norms, norm_folds                                                         norms.py
    attach, merge, detach, unmerge, extract, rerank: LoRA adapters                 lora.py
    layer_importance, least_important, prune_layers, drop_layers, merge_layers     depth.py
    head_importance, unit_importance, prune_heads, prune_units, keep_heads, keep_units     width.py

All of them are functions from model to model.
"""

from lmx.reparam.branches import widen
from lmx.reparam.depth import drop_layers, layer_importance, least_important, merge_layers, prune_layers
from lmx.reparam.factorization import choose_ranks, decompose_model, factorize, factorize_weight, rebuild
from lmx.reparam.folds import compose, fold, fold_embedding, fold_value_bias, untie
from lmx.reparam.forms import pivot, quantize, quantize_model
from lmx.reparam.grams import moments
from lmx.reparam.latents import share_latent
from lmx.reparam.layers import check_tower
from lmx.reparam.lora import INITS, WITH_DATA, attach, detach, extract, matrix_paths, merge, rerank, unmerge
from lmx.reparam.norms import fold_norms, norm_folds
from lmx.reparam.width import head_importance, keep_heads, keep_units, prune_heads, prune_units, unit_importance

__all__ = [
    "INITS",
    "WITH_DATA",
    "attach",
    "check_tower",
    "choose_ranks",
    "compose",
    "decompose_model",
    "detach",
    "drop_layers",
    "extract",
    "factorize",
    "factorize_weight",
    "fold",
    "fold_embedding",
    "fold_norms",
    "fold_value_bias",
    "head_importance",
    "keep_heads",
    "keep_units",
    "layer_importance",
    "least_important",
    "matrix_paths",
    "merge",
    "merge_layers",
    "moments",
    "norm_folds",
    "pivot",
    "prune_heads",
    "prune_layers",
    "prune_units",
    "quantize",
    "quantize_model",
    "rebuild",
    "rerank",
    "share_latent",
    "unit_importance",
    "unmerge",
    "untie",
    "widen",
]
