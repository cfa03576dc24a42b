"""Models that are known by their samples alone."""

from __future__ import annotations

from abc import ABC

from lightning_genmodels.base.generative import GenerativeModel


class ImplicitModel(GenerativeModel, ABC):
    """A model that is known by its samples alone; it owns its training step."""
