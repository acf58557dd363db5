"""Callbacks that log what mixed precision does, and warn."""

from kerasmp.callbacks.overflow_monitor import OverflowMonitor

__all__ = ["OverflowMonitor"]
