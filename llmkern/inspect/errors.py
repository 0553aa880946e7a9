"""The one exception of the inspector: its message says what to do, without a trace."""

from __future__ import annotations


class InspectError(RuntimeError):
    """Something that the inspector needs is missing, unknown, or does not compile."""
