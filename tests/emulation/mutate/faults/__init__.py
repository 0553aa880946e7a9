"""Faults written by hand, one file for each family of kernels: those that no change of a single token makes."""

from __future__ import annotations

from tests.emulation.mutate.faults import attention_sm90, positional

PLANTED = (*positional.PLANTED, *attention_sm90.PLANTED)
