"""Faults written by hand, one file for each family of kernels: those that no change of a single token makes."""

from __future__ import annotations

from tests.emulation.mutate.faults import (
    attention_cached,
    attention_forward,
    attention_sm90,
    int8,
    int8_sm90,
    positional,
)

PLANTED = (
    *positional.PLANTED,
    *int8.PLANTED,
    *attention_forward.PLANTED,
    *attention_cached.PLANTED,
    *attention_sm90.PLANTED,
    *int8_sm90.PLANTED,
)
