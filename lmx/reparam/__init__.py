"""Re-parameterization: the same model in fewer numbers.

    pivot, quantize, quantize_model     forms: a low-rank weight without its freedom, int8 (`forms`)
"""

from lmx.reparam.forms import pivot, quantize, quantize_model

__all__ = ["pivot", "quantize", "quantize_model"]
