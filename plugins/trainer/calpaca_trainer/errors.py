"""What can go wrong in training."""

from __future__ import annotations

from calpaca.core.errors import CalpacaError


class DataError(CalpacaError):
    """Training data cannot be read, or there is nothing to learn from it."""


class TrainingError(CalpacaError):
    """Training stopped: a loss or a saved file is not what it must be."""
