"""What is measured, one function a metric."""

import contextlib
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable

from .network import Failed

IDLE_CONNECTIONS = 4000
DIALS = 2000
# Behind the far namespace, which forwards nothing: not a packet comes back.
BLACK_HOLE = "203.0.113.1"
DATAGRAM = 1400
PINGS = 200


@dataclass
class Reading:
    """One measurement."""

    value: float
    # Payload, for the price of a gigabyte.
    moved_bytes: float = 0
    # Other figures of the same run that have a row of their own in the report.
    also: dict = field(default_factory=dict)
    # What explains it.
    detail: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """Something that can be measured of every backend."""

    name: str
    title: str
    unit: str
    measure: Callable
    more_is_better: bool = True
    is_bulk: bool = False
    is_quick: bool = False
    # Only about programs: the kernel's bounds have no process.
    of_forwarder: bool = False
    # Of a program that has just been started. Such a measurement leaves traces: it comes once, after all others.
    of_fresh: bool = False


def bulk(direction, *options):
    """A transfer by iperf3, in Mbit/s that arrived."""
    def measure(ends, seconds):
        end = ends.iperf3(getattr(ends, direction), seconds, *options)["end"]
        received = end["sum_received"]
        detail = {"retransmits": end["sum_sent"].get("retransmits")}
        return Reading(received["bits_per_second"] / 1e6, received["bytes"], detail=detail)
    return measure


def round_trip(direction, test):
    """One byte there and back, in microseconds."""
    def measure(ends, seconds):
        said = ends.traffic(getattr(ends, direction), test, seconds)
        if not said["n"]:
            raise Failed(f"no answer; {said['lost']} lost")
        return Reading(said["p50_us"], also={"p99": said["p99_us"]}, detail=said)
    return measure


def connects(direction, concurrent):
    """Connect, a byte there and back, close: how many a second."""
    def measure(ends, seconds):
        said = ends.traffic(getattr(ends, direction), "crr", seconds, concurrent)
        return Reading(said["per_s"], detail=said)
    return measure


def datagrams(direction, *options):
    """Datagrams as fast as the sender can: how many a second arrived."""
    def measure(ends, seconds):
        sent, got = ends.flood(getattr(ends, direction), DATAGRAM, seconds, *options)
        lost = 100 * (1 - got["got"] / max(1, sent["sent"]))
        detail = {"sent_per_s": sent["per_s"], "lost_pct": round(lost, 1), "reordered": got["reordered"]}
        return Reading(got["got"] / max(sent["secs"], got["secs"]), got["bytes"], detail=detail)
    return measure


def ping(ends, _seconds):
    """Round trips of echo requests."""
    way = ends.outward
    said = way.client.run(["ping", "-n", "-c", PINGS, "-i", 0.005, "-W", 1, way.address], check=False)
    times_us = sorted(1000 * float(time) for time in re.findall(r"time=([\d.]+) ms", said))
    if not times_us:
        raise Failed(f"ping: {said[-200:].strip()}")
    detail = {"answers": len(times_us), "max_us": times_us[-1]}
    return Reading(statistics.median(times_us), also={"p99": times_us[len(times_us) * 99 // 100]}, detail=detail)


def memory_idle(ends, _seconds):
    """Of a program that has moved nothing yet."""
    return Reading(ends.memory_kb())


def memory_held(ends, _seconds):
    """What a program grows by for each idle connection."""
    before_kb = ends.memory_kb()
    with held(ends):
        time.sleep(0.5)
        grown_kb = ends.memory_kb() - before_kb
    return Reading(grown_kb / IDLE_CONNECTIONS, detail={"before_kb": before_kb, "grown_kb": grown_kb})


def idle_cpu(ends, seconds):
    """What a program does while it holds idle connections, in percent of one processor."""
    with held(ends):
        # What opening them has left to do is not meant.
        time.sleep(3)
        before_s = ends.cpu_fine_s()
        time.sleep(seconds)
        return Reading(100 * (ends.cpu_fine_s() - before_s) / seconds)


@contextlib.contextmanager
def held(ends):
    """Idle connections of the guest, while something is measured."""
    holder, standing = ends.hold(IDLE_CONNECTIONS)
    try:
        if standing < IDLE_CONNECTIONS:
            raise Failed(f"only {standing} of {IDLE_CONNECTIONS} connections stand")
        yield
    finally:
        ends.site.stop(holder)


def black_hole(ends, seconds):
    """How much slower others connect while many connections are begun that nobody answers."""
    def p99_us():
        runs = [ends.traffic(ends.outward, "crr", seconds) for _ in range(3)]
        if any(run["lost"] for run in runs):
            raise Failed(f"{sum(run['lost'] for run in runs):.0f} other connects failed")
        return statistics.median(run["p99_us"] for run in runs)
    without = p99_us()
    dialler = ends.dial(DIALS, BLACK_HOLE, 600)
    try:
        while_dialling = p99_us()
    finally:
        ends.site.stop(dialler)
    detail = {"p99_us": round(while_dialling, 1), "without_us": round(without, 1)}
    return Reading(while_dialling / without, detail=detail)


ALL = {metric.name: metric for metric in (
    Metric("tcp_out_1", "TCP out, 1 stream", "Mbit/s", bulk("outward"), is_bulk=True, is_quick=True),
    Metric("tcp_rev_1", "TCP out, data back, 1 stream", "Mbit/s", bulk("outward", "--reverse"),
           is_bulk=True, is_quick=True),
    Metric("tcp_in_1", "TCP in, 1 stream", "Mbit/s", bulk("inward"), is_bulk=True, is_quick=True),
    Metric("tcp_out_4", "TCP out, 4 streams", "Mbit/s", bulk("outward", "--parallel", "4"), is_bulk=True),
    Metric("tcp_rev_4", "TCP out, data back, 4 streams", "Mbit/s", bulk("outward", "--reverse", "--parallel", "4"),
           is_bulk=True),
    Metric("tcp_in_4", "TCP in, 4 streams", "Mbit/s", bulk("inward", "--parallel", "4"), is_bulk=True),
    Metric("tcp_host_1", "TCP in from the host's loopback, 1 stream", "Mbit/s", bulk("from_host"), is_bulk=True),
    Metric("tcp_rr", "TCP round trip", "µs", round_trip("outward", "pp"), False, is_quick=True),
    Metric("udp_rr", "UDP round trip", "µs", round_trip("outward", "udppp"), False, is_quick=True),
    Metric("tcp_in_rr", "TCP round trip, in", "µs", round_trip("inward", "pp"), False),
    Metric("tcp_host_rr", "TCP round trip, in from the host's loopback", "µs", round_trip("from_host", "pp"), False),
    Metric("ping", "Echo", "µs", ping, False),
    Metric("tcp_crr", "Connections, one at a time", "/s", connects("outward", 1), is_quick=True),
    Metric("tcp_crr_16", "Connections, 16 at a time", "/s", connects("outward", 16)),
    Metric("tcp_in_crr", "Connections in, one at a time", "/s", connects("inward", 1)),
    Metric("tcp_in_crr_16", "Connections in, 16 at a time", "/s", connects("inward", 16)),
    Metric("udp_out", "UDP out, 1,400-byte datagrams", "/s", datagrams("outward"), is_quick=True),
    Metric("udp_out_gso", "UDP out, segmented by the kernel", "/s", datagrams("outward", "--gso")),
    Metric("udp_in", "UDP in, 1,400-byte datagrams", "/s", datagrams("inward")),
    Metric("black_hole", f"p99 of a connect beside {DIALS:,} that nobody answers, against without", "×", black_hole,
           False, of_fresh=True),
    Metric("memory_idle", "Memory, nothing moved yet", "kB", memory_idle, False, of_forwarder=True, of_fresh=True),
    Metric("memory_held", f"Memory of an idle connection ({IDLE_CONNECTIONS:,} held)", "kB", memory_held, False,
           of_forwarder=True, of_fresh=True),
    Metric("idle_cpu", f"CPU with {IDLE_CONNECTIONS:,} idle connections", "% of one", idle_cpu, False,
           of_forwarder=True, of_fresh=True),
)}
