"""Mixed-precision training for Keras 3 in which every step is either right or explained."""

__version__ = "0.1.0"
