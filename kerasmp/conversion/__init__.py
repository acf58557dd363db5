"""A model that exists into another policy, and back."""

from kerasmp.conversion.convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]
