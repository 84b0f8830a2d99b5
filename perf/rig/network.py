"""One network namespace, and commands in it."""

import functools
import subprocess


class Failed(Exception):
    """Something that was measured, or is needed to measure, did not work."""


@functools.cache
def congestion_control():
    """The kernel's own default, whatever this machine has chosen; where namespaces are not allowed it, the oldest."""
    with open("/proc/sys/net/ipv4/tcp_allowed_congestion_control") as file:
        return "cubic" if "cubic" in file.read().split() else "reno"


class Namespace:
    """A network namespace, named by a file in the scratch directory; its loopback is up."""

    def __init__(self, path):
        self.path = path
        open(path, "w").close()
        subprocess.run(["unshare", f"--net={path}", "true"], check=True)
        self.ip("link set lo up")
        # Echo sockets for everybody; ports and TIME-WAIT sockets enough for thousands of connections a second.
        self.set("ipv4/ping_group_range", "0 2147483647")
        self.set("ipv4/ip_local_port_range", "10000 65535")
        self.set("ipv4/tcp_tw_reuse", "1")
        self.set("ipv4/tcp_congestion_control", congestion_control())
        # What one run has learned of a path is not for the next one.
        self.set("ipv4/tcp_no_metrics_save", "1")

    def release(self):
        """Lets go of the namespace: it ends with the last process in it."""
        subprocess.run(["umount", self.path], check=True)

    def words(self, words):
        """The command that runs `words` inside; it becomes that program, so its process id is the program's."""
        return ["nsenter", f"--net={self.path}", "--", *map(str, words)]

    def run(self, words, timeout=30, check=True):
        """What a program prints; a failure holds the end of it."""
        try:
            done = subprocess.run(self.words(words), timeout=timeout, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode(errors="replace")[-300:].strip()
            raise Failed(f"{words[0]} did not end within {timeout:.0f} s: {said}") from None
        if check and done.returncode != 0:
            raise Failed(f"{words[0]} failed ({done.returncode}): {done.stdout[-300:].strip()}")
        return done.stdout

    def ip(self, *commands):
        """ip(8), one command each."""
        for command in commands:
            self.run(["ip", *command.split()])

    def set(self, key, value):
        """Sets a kernel parameter below /proc/sys/net, of this namespace."""
        self.run(["sh", "-c", f"echo {value} > /proc/sys/net/{key}"])

    def is_listening(self, port):
        """Whether a TCP socket listens at a port."""
        tables = self.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"], check=False)
        rows = (line.split() for line in tables.splitlines())
        return any(len(row) > 3 and row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)

    def has_default_route(self):
        """Whether IPv4 leads anywhere."""
        return "default" in self.run(["ip", "-4", "route"])
