"""Where the programs are that take part."""

import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# What perf/peers has fetched.
FETCHED = os.path.join(ROOT, "target", "peers")


class Programs:
    """hythe, its measuring tools from the same build, and what else is installed."""

    def __init__(self, hythe):
        self.hythe = os.path.abspath(hythe)
        examples = os.path.join(os.path.dirname(self.hythe), "examples")
        self.traffic = os.path.join(examples, "traffic")
        self.tapbridge = os.path.join(examples, "tapbridge")
        self.vguest = os.path.join(examples, "vguest")
        self.flamegraph = os.path.join(examples, "flamegraph")
        for path in (self.hythe, self.traffic, self.tapbridge, self.vguest, self.flamegraph):
            if not os.access(path, os.X_OK):
                sys.exit(f"{path}: not there; build it: cargo build --release --bins --examples")
        for name, package in (("iperf3", "iperf3"), ("nsenter", "util-linux"), ("ip", "iproute2")):
            if not shutil.which(name):
                sys.exit(f"{name}: not there; Debian's package is {package}")
        self.pasta = peer("PASTA", "pasta")
        self.slirp4netns = peer("SLIRP4NETNS", "slirp4netns")
        self.passt = peer("PASST", os.path.join(FETCHED, "usr", "bin", "passt")) or peer("PASST", "passt")


def default_hythe():
    """The release build of this repository."""
    target = os.environ.get("CARGO_TARGET_DIR") or os.path.join(ROOT, "target")
    return os.path.join(target, "release", "hythe")


def peer(variable, name):
    """A program named by a variable, or else found on PATH; None where there is none."""
    path = os.environ.get(variable) or shutil.which(name)
    if path and not os.access(path, os.X_OK):
        sys.exit(f"{variable}={path}: no such program")
    return path


def version(path, package=None):
    """What a program says about its version, in one line, and what its package says."""
    said = subprocess.run([path, "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    said = said.splitlines()[0].strip() if said else "unknown"
    return f"{said} ({package} {_package_version(package)})" if package else said


def _package_version(package):
    """Of the installed Debian package: some programs do not know their own."""
    words = ["dpkg-query", "--show", "--showformat=${Version}", package]
    try:
        said = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    except FileNotFoundError:
        said = ""    # Not a Debian machine.
    return said or "not packaged"
