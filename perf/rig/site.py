"""The world of one backend.

    guest ── backend ── host ── up0 ═══════ up1 ── far
                     10.77.0.2/24     10.77.0.1/24    198.51.100.1: the servers that the guest asks

Every backend has a site of its own with the same addresses, so all can be up at once and be measured in turn.
"""

import os
import signal
import subprocess
import time

from .network import Failed, Namespace

FAR = "198.51.100.1"
HOST = "10.77.0.2"
ROUTER = "10.77.0.1"


class Site:
    """Three namespaces, host and far joined by a wire."""

    def __init__(self, directory):
        os.mkdir(directory)
        self.directory = directory
        self.processes = []
        self.host, self.guest, self.far = (Namespace(f"{directory}/{name}") for name in ("host", "guest", "far"))
        self.host.ip(
            f"link add up0 type veth peer name up1 netns {self.far.path}",
            f"addr add {HOST}/24 dev up0",
            "link set up0 up",
        )
        self.far.ip(f"addr add {FAR}/32 dev lo", f"addr add {ROUTER}/24 dev up1", "link set up1 up")
        self.host.ip(f"route add default via {ROUTER}")
        # A datagram server at the unspecified address answers from the address that was asked.
        self.far.ip(f"route replace 10.77.0.0/24 dev up1 src {FAR}")

    def start(self, namespace, words, name):
        """Starts a program in a namespace; what it prints goes to a file, which `said` reads."""
        with open(f"{self.directory}/{name}.log", "wb") as log:
            process = subprocess.Popen(namespace.words(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        process.name = name
        self.processes.append(process)
        return process

    def said(self, process):
        """What a program that was started here has printed so far."""
        with open(f"{self.directory}/{process.name}.log", errors="replace") as log:
            return log.read()

    def until(self, process, what, is_so, seconds=10):
        """Waits for what a program brings about; fails at once when the program ends."""
        def is_so_or_ended():
            if process.poll() is not None:
                raise Failed(f"{process.name} ended ({process.returncode}): {self.said(process)[-300:].strip()}")
            return is_so()
        wait_until(f"{process.name}: {what}", is_so_or_ended, seconds)

    def until_says(self, process, word):
        """Waits for a line of a program."""
        self.until(process, f"'{word}'", lambda: word in self.said(process))

    def stop(self, process):
        """Ends a program that was started here."""
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        self.processes.remove(process)

    def close(self):
        """Ends all programs, the last one first, and lets go of the namespaces."""
        for process in reversed(self.processes[:]):
            self.stop(process)
        for namespace in (self.host, self.guest, self.far):
            namespace.release()


def wait_until(what, is_so, seconds=10):
    """Waits for something that comes soon."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.02)
