"""The order of the runs, and what is noted about each."""

import itertools
from dataclasses import dataclass, field

from . import backends, processes
from .ends import Ends
from .network import Failed
from .noise import Moment, wait_for_quiet
from .site import Site

# A program that has grown beyond is started anew: slirp4netns keeps 250 kB of each closed connection.
MEMORY_MAX_KB = 1 << 20
PATIENCE_S = 2

# The kernel counts processor time in ticks: shares of a shorter time mean nothing.
NOISE_WINDOW_S = 0.5


@dataclass
class Run:
    """One measurement of one backend, or why there is none."""

    backend: str
    metric: str
    round: int
    value: float | None = None
    also: dict = field(default_factory=dict)
    cpu_s_per_gb: float | None = None
    # The forwarder's share of one processor.
    cpu_pct: float | None = None
    # What the machine did beside; see noise.py.
    noise: dict = field(default_factory=dict)
    detail: dict = field(default_factory=dict)
    error: str | None = None


class World:
    """A backend that is up, with both ends."""

    numbers = itertools.count()

    def __init__(self, backend, scratch):
        self.backend, self.scratch, self.worn = backend, scratch, 0
        self._open()

    def _open(self):
        self.site = Site(f"{self.scratch}/{self.backend.name}.{next(self.numbers)}")
        try:
            self.joined = self.backend.join(self.site)
            self.ends = Ends(self.site, self.joined, self.backend.programs)
        except BaseException:
            self.site.close()
            raise

    def restart(self):
        """Starts everything anew."""
        self.site.close()
        self._open()

    @property
    def forwarder_pid(self):
        """The process between guest and host, if there is one."""
        return self.joined.forwarder.pid if self.joined.forwarder else None

    def is_worn(self):
        """Whether the forwarder has ended or has grown too large."""
        if self.joined.forwarder is None:
            return False
        return self.joined.forwarder.poll() is not None or processes.memory_kb(self.forwarder_pid) > MEMORY_MAX_KB


class Rounds:
    """All measurements of all backends, again and again, the backends side by side."""

    def __init__(self, chosen, metrics, programs, scratch, outside, say):
        self.metrics, self.outside, self.say = metrics, outside, say
        self.runs, self.notes, self.worlds, self.versions = [], [], [], {}
        self.has_failed = False
        for name in chosen:
            self._open(backends.ALL[name](programs), scratch)

    def _open(self, backend, scratch):
        missing = backend.missing()
        if missing:
            return self.note(f"left out: {missing}")
        try:
            self.worlds.append(World(backend, scratch))
            self.versions[backend.name] = backend.version()
        except Failed as failure:
            self.fail(f"left out: {backend.name}: {failure}")

    def note(self, text):
        """Keeps a remark for the report."""
        self.notes.append(text)
        self.say(text)

    def fail(self, text):
        """Keeps a remark that nobody should overlook: the run counts as failed."""
        self.has_failed = True
        self.note(text)

    def go(self, rounds, seconds, patience_s):
        """Measures. The backends take turns at the first place, so that none has the machine's warmth to
        itself; each waits so long at the most for the machine to be quiet."""
        for number in range(rounds):
            is_last = number == rounds - 1
            for place, metric in enumerate(metric for metric in self.metrics if is_last or not metric.of_fresh):
                turn = (number + place) % max(1, len(self.worlds))
                for world in self.worlds[turn:] + self.worlds[:turn]:    # A copy: one may leave.
                    if world.forwarder_pid or not metric.of_forwarder:
                        self._measure(world, metric, number, seconds, patience_s)
        for world in self.worlds:
            if world.worn:
                self.note(f"{world.backend.name} had to be started anew {world.worn} times: "
                          f"it had failed, or held more than {MEMORY_MAX_KB >> 10} MiB")

    def _measure(self, world, metric, number, seconds, patience_s):
        if metric.of_fresh and not self._restart(world):
            return
        run = Run(world.backend.name, metric.name, number + 1)
        self.runs.append(run)
        wait_for_quiet(self.outside, patience_s)
        try:
            measured(run, world, metric, seconds, self.outside)
        except Failed as failure:
            run.error, self.has_failed = str(failure), True
        self.say(line(run, metric))
        if run.error or world.is_worn():
            world.worn += 1
            self._restart(world)

    def _restart(self, world):
        """Whether it goes on."""
        try:
            world.restart()
            return True
        except Failed as failure:
            self.fail(f"{world.backend.name} takes no further part: it does not start again: {failure}")
            self.worlds.remove(world)
            return False


class Meanwhile:
    """What the processors did while `task` ran: `noise` of the machine, `cpu_s` and `cpu_pct` of the forwarder (None where
    there is none, or it has ended). `result` is the task's."""

    def __init__(self, world, outside, task):
        pid = world.forwarder_pid
        start, cpu_before = Moment(outside), processes.cpu_s(pid) if pid else None
        self.result = task()
        end = Moment(outside)
        self.seconds = end.time - start.time
        self.noise = end.since(start)
        self.cpu_s = self.cpu_pct = None
        if pid and world.joined.forwarder.poll() is None:
            self.cpu_s = processes.cpu_s(pid) - cpu_before
            self.cpu_pct = round(100 * self.cpu_s / self.seconds, 1)


def measured(run, world, metric, seconds, outside):
    """Measures once; notes what it took."""
    meanwhile = Meanwhile(world, outside, lambda: metric.measure(world.ends, seconds))
    reading = meanwhile.result
    run.value, run.detail = reading.value, reading.detail
    run.also = reading.also
    if meanwhile.seconds >= NOISE_WINDOW_S:
        run.noise = meanwhile.noise
    run.cpu_pct = meanwhile.cpu_pct
    if meanwhile.cpu_s is not None and reading.moved_bytes:
        run.cpu_s_per_gb = round(meanwhile.cpu_s / (reading.moved_bytes / 1e9), 3)


def line(run, metric):
    """A run as progress."""
    head = f"{run.round}  {run.metric:14} {run.backend:12}"
    if run.error:
        return f"{head} failed: {run.error}"
    also = "".join(f", {name} {value:,.1f}" for name, value in run.also.items())
    cost = f"   {run.cpu_s_per_gb} CPU s/GB" if run.cpu_s_per_gb is not None else ""
    noise = f"   others {run.noise['others_pct']} %" if run.noise else ""
    return f"{head} {run.value:12,.1f} {metric.unit}{also}{cost}{noise}"
