"""Executes PTX, from nvcc -ptx and from triton.compile, over numpy buffers, and looks for faults while it does.

    report = launch.run(ptx, "kernel", grid, block, [array, launch.empty((64,), np.float32), 64])
    report.raise_if_faulty()

launch.py is the entry. From text to execution: parse.py (instructions), operands.py (registers, immediates, addresses),
control.py (the order of blocks, threads that part and meet), machine.py (the blocks that run together, schedules).
Instructions by kind: integer.py, bits.py, compare.py, floating.py, conversion.py with the numbers of values.py;
memory.py, atomics.py; collective.py, barriers.py and gather.py (who must come); registers.py; matrix.py and wgmma.py;
asynchronous.py, tensor_copy.py and mbarrier.py.
What is found: check.py (order of accesses), publish.py (fences and flags), count.py (traffic, conflicts, instructions).
docs/emulation.md says what is executed, found, counted, and what is not modelled.
"""
