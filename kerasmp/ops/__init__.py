"""Numerics that are safe in float16: any float dtype outside, at least float32 inside."""

from kerasmp.ops.attention import dot_product_attention

__all__ = ["dot_product_attention"]
