"""The mutation score of the GPU kernels: faults planted in their sources, and how many the emulated tests notice.

`python -m tests.emulation.mutate` runs it; docs/mutation.md says what the score means.
"""
