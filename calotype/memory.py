"""A step that does not fit into memory is taken in more parts; its result is the same."""

import torch
from torch import Tensor

from calotype.data import Batch
from calotype.errors import UserError
from calotype.stage import Stage


def backward_that_fits(stage: Stage, batch: Batch, step: int) -> dict[str, Tensor]:
    """`stage.backward`, in twice as many micro-batches each time that memory runs out.

    The number of parts is kept in the stage's state, so a resumed run begins with it. Raises UserError where a single
    example does not fit, or where other processes wait for this one's gradient and cannot be told.
    """
    while True:
        try:
            return stage.backward(batch, step)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
        stage.forget()  # outside of the handler, which would keep the tensors of the failed attempt alive
        _take_smaller_parts(stage, len(batch.x))


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory ran out; the allocator of the CPU has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _take_smaller_parts(stage: Stage, examples: int) -> None:
    parts = stage.state["memory"]["parts"]
    more = next((n for n in range(2 * parts, examples + 1) if examples % n == 0), None)
    if more is None or stage.accelerator.num_processes > 1:
        raise UserError(
            f"{stage.name}: memory runs out with --micro-batches {parts}; give {more or parts}"
            f"{'' if more else ' and a smaller --width or --gradient-checkpointing'}."
        )
    stage.state["memory"]["parts"] = more
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stage.accelerator.print(f"{stage.name}: memory ran out; each batch is now taken in {more} parts.")
