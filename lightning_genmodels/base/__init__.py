"""Abstract base classes of generative models of binary images.

A model implements what its kind leaves abstract; everything else is written here once and is final. What a model cannot
do it has no method for, so ``isinstance`` tells exact likelihoods, bounds and samplers apart.

==================== ============================== ======================================
kind                 scores by                      what a model implements
==================== ============================== ======================================
GenerativeModel      nothing                        ``_sample``, ``training_step``
ExplicitModel        exact ``log_prob``             ``_log_prob``, ``_sample``
TabularModel         the same, learned by counting  and ``statistics``, ``fit_statistics``
AutoregressiveModel  the chain rule, in one order   ``conditional_logits``, ``_fill``
OrderMixture         a mixture of several orders    ``conditional_logits``, ``_fill``
RasterModel          the same, row by row           the network ``net``
LatentVariableModel  ``elbo`` and ``iw_bound``      ``_encode``, ``_decode``, ``_log_joint``,
                                                    ``_log_weights``, ``_sample_latent``
AdversarialModel     nothing                        ``discriminator_loss``, ``generator_loss``
RepresentationModel  (an interface: it has codes)   ``encode``, ``decode``
CompletionModel      (an interface: it completes)   ``complete``
==================== ============================== ======================================
"""

from __future__ import annotations

from lightning_genmodels.base.adversarial import AdversarialModel, AdversarialOptions
from lightning_genmodels.base.autoregressive import AutoregressiveModel, OrderMixture
from lightning_genmodels.base.completion import CompletionModel
from lightning_genmodels.base.explicit import ExplicitModel, TabularModel
from lightning_genmodels.base.generative import (
    EventShape,
    GenerativeModel,
    TrainingOptions,
)
from lightning_genmodels.base.latent import LatentVariableModel
from lightning_genmodels.base.raster import RasterModel, fill_raster, from_raster, to_raster
from lightning_genmodels.base.representation import RepresentationModel

__all__ = [
    "AdversarialModel",
    "AdversarialOptions",
    "AutoregressiveModel",
    "CompletionModel",
    "EventShape",
    "ExplicitModel",
    "GenerativeModel",
    "LatentVariableModel",
    "OrderMixture",
    "RasterModel",
    "RepresentationModel",
    "TabularModel",
    "TrainingOptions",
    "fill_raster",
    "from_raster",
    "to_raster",
]
