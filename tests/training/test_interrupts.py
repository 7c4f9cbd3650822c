"""Ctrl-C and SIGTERM during a training: the first is answered at once, the second ends the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from tamingfast.training.interrupts import STOPPED_NOW, Interrupts

#: One call of native code that no signal handler of Python's can interrupt.
BUSY = """
import hashlib, signal
from tamingfast.training.interrupts import Interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
with Interrupts():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_are_answered_while_native_code_runs(number):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", BUSY], env=environment, **pipes) as process:
        try:
            assert process.stdout.readline() == b"begun\n"
            process.send_signal(number)
            assert process.stderr.readline() + process.stderr.readline() == (
                b"\nstopping after this step; again stops now\n"
            )
            process.send_signal(number)  # within the time in which signals count as one
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(60) == STOPPED_NOW
            assert process.stderr.read() == b"\nstopped; --resume continues from the last checkpoint\n"
        finally:
            process.kill()


def test_handlers_are_put_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.received == "SIGTERM"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert capfd.readouterr().err == "\nstopping after this step; again stops now\n"


def test_processes_that_read_data_leave_it_to_the_training(capfd):
    forked = multiprocessing.get_context("fork")
    with Interrupts() as interrupts:
        begun, done = forked.Event(), forked.Event()
        process = forked.Process(target=lambda: (begun.set(), done.wait()))
        process.start()
        assert begun.wait(60)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
        assert process.is_alive()
        done.set()
        process.join()
        assert process.exitcode == 0
    assert interrupts.received is None and capfd.readouterr().err == ""


def test_only_one_of_several_processes_speaks(capfd):
    with Interrupts(quiet=True) as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.received == "SIGINT" and capfd.readouterr().err == ""
