"""Callbacks that watch, log and warn."""

from kerasmp.callbacks.overflow_monitor import OverflowMonitor

__all__ = ["OverflowMonitor"]
