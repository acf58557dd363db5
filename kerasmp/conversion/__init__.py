"""A model that exists into another policy, and back."""

from kerasmp.conversion.convert import convert
from kerasmp.conversion.report import ConversionReport, ConvertedLayer
from kerasmp.conversion.stock_file import save_for_stock_keras

__all__ = ["ConversionReport", "ConvertedLayer", "convert", "save_for_stock_keras"]
