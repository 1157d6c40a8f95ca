"""Compiled kernels: a training pass, forward, loss and backward, as one graph for batches of just one shape.

A process of its own traces and compiles it while eager steps go on (`compiler`); the rank loads what it has written
(`compilation`), and runs it where the shapes fit (`rank_kernels`). Knows nothing of the journal: whoever commands the
ranks decides when kernels are taken into use.
"""
