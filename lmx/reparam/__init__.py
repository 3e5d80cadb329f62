"""Floor 4: re-parameterization, the same model in fewer or other numbers.

pivot, quantize, quantize_model: a low-rank weight without its freedom, int8                           forms.py
fold, fold_value_bias, fold_embedding, untie, compose                                                  folds.py
fold_norms, norm_folds                                                                                 norms.py
"""

from lmx.reparam.folds import compose, fold, fold_embedding, fold_value_bias, untie
from lmx.reparam.forms import pivot, quantize, quantize_model
from lmx.reparam.norms import fold_norms, norm_folds

__all__ = [
    "compose",
    "fold",
    "fold_embedding",
    "fold_norms",
    "fold_value_bias",
    "norm_folds",
    "pivot",
    "quantize",
    "quantize_model",
    "untie",
]
