"""What else the machine did while something was measured."""

import os
import time

TICKS = os.sysconf("SC_CLK_TCK")
KERNEL_THREADS = "2"
NICE = -20


class Moment:
    """The machine's clocks at one moment; `since` gives percentages."""

    def __init__(self, outside):
        self.time = time.monotonic()
        with open("/proc/stat") as file:
            user, nice, system, idle, wait, irq, softirq, steal = map(int, file.readline().split()[1:9])
        self.all, self.idle, self.steal = user + nice + system + idle + wait + irq + softirq + steal, idle + wait, steal
        self.others = _others(outside)

    def since(self, start):
        """Shares of the machine's time that were idle or stolen by the hypervisor, and what other processes used,
        in percent of one processor."""
        share = lambda field: 100 * (getattr(self, field) - getattr(start, field)) / max(1, self.all - start.all)
        others = 100 * (self.others - start.others) / TICKS / max(1e-9, self.time - start.time)
        return {"idle_pct": round(share("idle"), 1), "steal_pct": round(share("steal"), 1),
                "others_pct": round(max(0.0, others), 1)}


def _others(outside):
    """Ticks of all processes outside the cage, of their ended children too. Kernel threads are left out: some of what
    they do is done for us."""
    ours, total = os.readlink("/proc/self/ns/pid"), 0
    for pid in os.listdir(outside.proc):
        if not pid.isdigit():
            continue
        try:
            file = os.open(f"{pid}/stat", os.O_RDONLY, dir_fd=outside.proc)
            with open(file) as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
            if fields[1] == KERNEL_THREADS or os.readlink(f"{pid}/ns/pid", dir_fd=outside.proc) == ours:
                continue
        except OSError:
            continue    # It has ended; its time has gone to its parent.
        total += sum(map(int, fields[11:15]))
    return total


def take_precedence():
    """Ordinary work yields to what is measured. Where the kernel groups processes by session, the group counts."""
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    os.setsid()
    try:
        with open("/proc/self/autogroup", "w") as group:
            group.write(str(NICE))
    except FileNotFoundError:
        pass    # No groups here: the process's own priority counts.


def wait_for_quiet(outside, patience_s, others_pct=25):
    """Waits until other processes use less than a quarter of a processor, or patience is over."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        start = Moment(outside)
        time.sleep(0.4)
        if Moment(outside).since(start)["others_pct"] < others_pct:
            return
