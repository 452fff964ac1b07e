"""What the launcher of several processes says of the one that failed."""

import signal
from types import SimpleNamespace

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from calotype import launch


def failed(**codes):
    """A run of which ranks ended so, in this order."""
    ends = enumerate(codes.items())
    failures = {int(rank[1:]): SimpleNamespace(exitcode=code, timestamp=when) for when, (rank, code) in ends}
    error = ChildFailedError.__new__(ChildFailedError)
    error.name, error.failures = "run", failures
    return error


def ended(monkeypatch, capsys, **codes):
    def torchrun(words):
        raise failed(**codes)

    monkeypatch.setattr(launch, "torchrun", torchrun)
    code = launch.main([])
    return code, capsys.readouterr().err


def test_a_killed_process_is_named_before_those_that_missed_it(monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, r0=1, r1=-9, r2=-15)
    assert (code, said) == (137, "calotype: process 1 of the run was killed by SIGKILL; the others were stopped.\n")


def test_the_first_that_failed_gives_the_exit_code(monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, r2=-15, r1=2, r0=1)
    assert (code, said) == (2, "calotype: process 1 of the run ended with exit code 2; the others were stopped.\n")


def test_a_signal_is_no_traceback(monkeypatch, capsys):
    def torchrun(words):
        raise SignalException("told to stop", sigval=signal.SIGTERM)

    monkeypatch.setattr(launch, "torchrun", torchrun)
    assert launch.main([]) == 143 and capsys.readouterr().err == ""


def test_all_is_well(monkeypatch, capsys):
    monkeypatch.setattr(launch, "torchrun", lambda words: None)
    assert launch.main([]) == 0 and capsys.readouterr().err == ""
