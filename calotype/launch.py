"""torchrun for `calotype run --nproc`: as `python -m torch.distributed.run`, but that the end is one line.

python -m calotype.launch --nproc_per_node=2 -m calotype.stage1_vae.train ...
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_STOPPED = {-signal.SIGTERM, 128 + signal.SIGTERM}  # what the launcher does to the others


def main(words: list[str]) -> int:
    """Run to the end; returns 0, the exit code of the process that failed first, or 128 + the signal that ended it."""
    try:
        torchrun(words)
    except ChildFailedError as error:
        rank, failure = culprit(error)
        print(
            f"calotype: process {rank} of the run {ending(failure.exitcode)}; the others were stopped.", file=sys.stderr
        )
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:  # the processes have been told, and have saved
        return 128 + stop.sigval
    return 0


def culprit(error: ChildFailedError):
    """The rank that failed of its own, and its failure; a killed process before those that missed it."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    killed = [item for item in failures if item[1].exitcode < 0 and item[1].exitcode not in _STOPPED]
    own = [item for item in failures if item[1].exitcode not in _STOPPED]
    return (killed or own or failures)[0]


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
