"""Why the rows of a batch may not be shared out: a number that ranks agree on, and the words for it."""

from __future__ import annotations

REASONS = (
    None,
    "an output does not have one entry for each row of the batch",
    "the outputs of a row depend on other rows",
    "the gradients of a batch are not the sum of its rows' gradients",
    "what training changes in the buffers depends on how the batch is split",
    "an output that is no tensor depends on how the batch is split",
    "the batches that the program takes are too small to be split",
    "the program refuses some batches that are made of the example's rows",
)
SHAPE, OUTPUTS, GRADIENTS, BUFFERS, OTHER_OUTPUTS, TOO_SMALL, REFUSED = 1, 2, 3, 4, 5, 6, 7
