"""The machine, as far as it explains numbers."""

import os
import platform


def describe():
    """Processors, memory and kernel, in one line."""
    return f"{len(os.sched_getaffinity(0))} × {_processor()}, {_memory_gib()} GiB, Linux {platform.release()}"


def _processor():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib():
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
