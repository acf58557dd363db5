"""Keras models for mixed precision: a bad step leaves no trace, losses are in float32."""

from kerasmp.model.model import FunctionalModel, Model, Sequential

__all__ = ["FunctionalModel", "Model", "Sequential"]
