"""Floor 4: re-parameterization, the same model in fewer or other numbers.

factorize, decompose_model, choose_ranks, rebuild: matrices as low rank; factorize_weight: one   factorization.py
moments: what a model's weights see                                                              grams.py
pivot, quantize, quantize_model: a low-rank weight without its freedom, int8                     forms.py
fold, fold_value_bias, fold_embedding, untie, compose                                            folds.py
fold_norms, norm_folds                                                                           norms.py
"""

from lmx.reparam.factorization import choose_ranks, decompose_model, factorize, factorize_weight, rebuild
from lmx.reparam.folds import compose, fold, fold_embedding, fold_value_bias, untie
from lmx.reparam.forms import pivot, quantize, quantize_model
from lmx.reparam.grams import moments
from lmx.reparam.norms import fold_norms, norm_folds

__all__ = [
    "choose_ranks",
    "compose",
    "decompose_model",
    "factorize",
    "factorize_weight",
    "fold",
    "fold_embedding",
    "fold_norms",
    "fold_value_bias",
    "moments",
    "norm_folds",
    "pivot",
    "quantize",
    "quantize_model",
    "rebuild",
    "untie",
]
