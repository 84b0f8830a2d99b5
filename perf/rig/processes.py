"""What a forwarder costs: processor time and memory of a process and all that it started."""

import os

TICKS = os.sysconf("SC_CLK_TCK")

# Fields of /proc/PID/stat behind the program's name, counted from 0.
PARENT, UTIME, CSTIME = 1, 11, 14


def stat(pid):
    """The fields of /proc/PID/stat behind the name, or None when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def family(root):
    """A process and its descendants, by process id, with their fields."""
    fields = {int(name): stat(name) for name in os.listdir("/proc") if name.isdigit()}
    fields = {pid: row for pid, row in fields.items() if row}
    found, new = {}, {root} & fields.keys()
    while new:
        found |= {pid: fields[pid] for pid in new}
        new = {pid for pid, row in fields.items() if int(row[PARENT]) in new}
    return found


def cpu_s(root):
    """User and system time of a process, its descendants, and those of them that have ended, in seconds."""
    return sum(sum(map(int, row[UTIME:CSTIME + 1])) for row in family(root).values()) / TICKS


def cpu_fine_s(root):
    """The same of the living threads alone, but in nanoseconds' steps: for what hardly runs."""
    nanoseconds = 0
    for pid in family(root):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                nanoseconds += int(file.read().split()[0])
    return nanoseconds / 1e9


def memory_kb(root):
    """Resident memory, in kB; a page that several processes share counts in parts, once in all. Memory that is shared by a
    descriptor is a virtual machine's, and does not count.
    """
    return sum(_proportional_kb(pid) for pid in family(root))


def _proportional_kb(pid):
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            rows = dict(line.split(":") for line in file if line.startswith("Pss"))
        return int(rows["Pss"].split()[0]) - int(rows["Pss_Shmem"].split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0    # It has ended meanwhile.
