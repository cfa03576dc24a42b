"""Entry points for ``torch.hub``: one per model, by the model's name.

>>> model = torch.hub.load("lightning-genmodels/lightning-genmodels", "vae", trust_repo=True)
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from lightning_genmodels.weights.names import MODELS as _MODELS

dependencies = ["lightning", "numpy", "safetensors", "torch", "torchmetrics", "typing_extensions"]


def _entry_point(name: str) -> _Callable[..., _Any]:
    def entry_point(*, pretrained: bool = True, weights: str | None = None, **kwargs: _Any) -> _Any:
        from lightning_genmodels.errors import OptionError
        from lightning_genmodels.weights.loading import load_model
        from lightning_genmodels.weights.names import model_class

        if not pretrained and weights is not None:
            raise OptionError(f"expected pretrained=True beside weights={weights!r}; a new model has none")
        if not pretrained:
            return model_class(name)(**kwargs)
        return load_model(name, weights, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"""Loads the model ``{name}``, a LightningModule.

    Args:
        pretrained: Trained weights, in evaluation mode; else a new model that is to be trained.
        weights: The name of a weight; default: the model's default weight. ``genmodels list`` names them.
        kwargs: With ``pretrained``, hyper-parameters that the weights must have been trained with; else the new
            model's hyper-parameters.
    """
    return entry_point


globals().update({_name: _entry_point(_name) for _name in _MODELS})
