"""Namespaces of our own, so that nothing is left behind.

    caller ─ run() ─┬─ waits, passes signals on, removes the scratch directory
                    └─ PID 1 of a new PID namespace, in a new mount namespace: does the work

When PID 1 ends, however it ends, the kernel ends every process in there, and with the last of them go the network
namespaces, the devices and routes in them, and the file system under the scratch directory. No list of things to
clean up has to be kept, and none can be forgotten.
"""

import ctypes
import os
import resource
import signal
import sys
import tempfile
import traceback

from .noise import take_precedence

CLONE_NEWNS, CLONE_NEWPID = 0x0002_0000, 0x2000_0000
MS_REC, MS_PRIVATE = 0x4000, 0x4_0000
PR_SET_PDEATHSIG = 1
INTERRUPTED = 130
DESCRIPTORS = 65_536

_libc = ctypes.CDLL(None, use_errno=True)


class Interrupted(BaseException):
    """The user wants it to end now."""


class Outside:
    """The machine around the cage: its /proc, as a directory descriptor."""

    def __init__(self):
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)


def run(work):
    """Runs `work(scratch, outside)` in a cage; returns the exit status."""
    if os.geteuid() != 0:
        sys.exit(f"{os.path.basename(sys.argv[0])}: takes root: it makes network namespaces")
    scratch = tempfile.mkdtemp(prefix="hythe-perf.")
    try:
        _call("unshare", CLONE_NEWPID)
        first = os.fork()
        if first == 0:
            os._exit(_first_process(work, scratch))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: os.kill(first, signal.SIGTERM))
        return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    finally:
        os.rmdir(scratch)


def _first_process(work, scratch):
    try:
        # In a session of its own: Ctrl-C reaches the caller alone, which passes it on; nobody gets it twice.
        take_precedence()
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, _interrupt)
        outside = Outside()
        _take_descriptors()
        _call("unshare", CLONE_NEWNS)
        _mount(None, "/", None, MS_REC | MS_PRIVATE)
        _mount("proc", "/proc", "proc", 0)
        _mount("tmpfs", scratch, "tmpfs", 0)
        return work(scratch, outside) or 0
    except Interrupted:
        return INTERRUPTED
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def _take_descriptors():
    """Thousands of connections at both ends, and in what is between."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, max(DESCRIPTORS, hard)))
    except ValueError:
        pass    # Not allowed here: what fails for it will say so.


def _interrupt(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted


def _mount(source, target, kind, flags):
    text = lambda word: None if word is None else word.encode()
    _call("mount", text(source), text(target), text(kind), ctypes.c_ulong(flags), None)


def _call(name, *arguments):
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
