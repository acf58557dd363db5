"""A model that exists into another policy, and back."""

from kerasmp.conversion.convert import convert
from kerasmp.conversion.report import ConversionReport, ConvertedLayer

__all__ = ["ConversionReport", "ConvertedLayer", "convert"]
