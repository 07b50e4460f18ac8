"""What goes wrong around a process: it is killed, or may not write."""

import os
import signal
import warnings
from contextlib import contextmanager, suppress


@contextmanager
def forked(work):
    """Run a function in a forked process, which is killed at the end at the latest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks besides threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextmanager
def unprivileged():
    """Obey permissions, as a user does."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
