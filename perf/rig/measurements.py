"""What is measured, one function a metric."""

import contextlib
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable

from .network import Failed

IDLE_CONNECTIONS = 4000
MANY_CONNECTIONS = 15_000
# Flows of datagrams: each of so many sockets has spoken to each of so many addresses.
FLOW_SOCKETS, FLOW_ADDRESSES = 2000, 50
IDLE_FLOWS = FLOW_SOCKETS * FLOW_ADDRESSES
CHURNED = 50_000
STARTS = 10
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
    # Takes long, or most peers fail in it: measured when it is named.
    on_request: bool = False


def bulk(direction, *options):
    """A transfer by iperf3, in Mbit/s that arrived."""
    def measure(ends, seconds):
        end = ends.iperf3(getattr(ends, direction), seconds, *options)["end"]
        received = end["sum_received"]
        detail = {"retransmits": end["sum_sent"].get("retransmits")}
        return Reading(received["bits_per_second"] / 1e6, received["bytes"], detail=detail)
    return measure


def fairness(direction, *options):
    """Jain's index of the streams of a transfer by iperf3: 1 when all get the same, 1/n when one gets all."""
    def measure(ends, seconds):
        end = ends.iperf3(getattr(ends, direction), seconds, *options)["end"]
        rates = [stream["receiver"]["bits_per_second"] for stream in end["streams"]]
        index = sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates))
        detail = {"least_mbit": round(min(rates) / 1e6, 1), "most_mbit": round(max(rates) / 1e6, 1),
                  "total_mbit": round(sum(rates) / 1e6)}
        return Reading(index, detail=detail)
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


def memory_held(count):
    """What a program grows by for each idle connection."""
    def measure(ends, _seconds):
        before_kb = ends.memory_kb()
        with held(ends, count):
            # What its buffers held while the connections were opened is not meant.
            time.sleep(1)
            grown_kb = ends.memory_kb() - before_kb
        return Reading(grown_kb / count, detail={"before_kb": before_kb, "grown_kb": grown_kb})
    return measure


def memory_of_flows(ends, _seconds):
    """What a program grows by for each idle flow of datagrams."""
    before_kb = ends.memory_kb()
    with idle_flows(ends):
        time.sleep(1)
        grown_kb = ends.memory_kb() - before_kb
    return Reading(grown_kb / IDLE_FLOWS, detail={"before_kb": before_kb, "grown_kb": grown_kb})


def memory_after_churn(ends, _seconds):
    """What a program has of it that many connections were opened and closed, against what it had after the first hundreds."""
    def settled_kb():
        # Connections that are closed are remembered for a while.
        time.sleep(5)
        return ends.memory_kb()
    fresh_kb = ends.memory_kb()
    ends.traffic(ends.outward, "crr", 0.2)
    before_kb, done = settled_kb(), 0
    while done < CHURNED:
        said = ends.traffic(ends.outward, "crr", 2, 16)
        if not said["n"]:
            raise Failed(f"no connection more after {done}")
        done += said["n"]
    after_kb = settled_kb()
    detail = {"fresh_kb": fresh_kb, "before_kb": before_kb, "after_kb": after_kb, "connections": done}
    return Reading(after_kb / before_kb, detail=detail)


def idle_cpu(ends, seconds):
    """What a program does while it holds idle connections, in percent of one processor."""
    with held(ends, IDLE_CONNECTIONS):
        # What opening them has left to do is not meant.
        time.sleep(3)
        before_s = ends.cpu_fine_s()
        time.sleep(seconds)
        return Reading(100 * (ends.cpu_fine_s() - before_s) / seconds)


@contextlib.contextmanager
def held(ends, count):
    """Idle connections of the guest, while something is measured."""
    holder, standing = ends.hold(count)
    try:
        if standing < count:
            raise Failed(f"only {standing} of {count} connections stand")
        yield
    finally:
        ends.site.stop(holder)


@contextlib.contextmanager
def idle_flows(ends):
    """Idle flows of the guest's datagrams, while something is measured."""
    processes, arrived = ends.flows(FLOW_SOCKETS, FLOW_ADDRESSES)
    try:
        if arrived < IDLE_FLOWS:
            raise Failed(f"only {arrived} of {IDLE_FLOWS} flows stand")
        yield
    finally:
        for process in processes:
            ends.site.stop(process)


def beside_idle_flows(ends, seconds):
    """How much longer a round trip takes beside idle flows than without."""
    def p50_us():
        return statistics.median(ends.traffic(ends.outward, "pp", seconds)["p50_us"] for _ in range(5))
    without_us = p50_us()
    with idle_flows(ends):
        time.sleep(1)
        beside_us = p50_us()
    detail = {"without_us": round(without_us, 1), "beside_us": round(beside_us, 1)}
    return Reading(beside_us / without_us, detail=detail)


def start(ends, _seconds):
    """From the start of a program, with a guest of its own, to the first answer that a command in the guest gets."""
    if not ends.joined.run:
        raise Failed("it runs no command")
    times_ms = sorted(ends.first_answer_ms() for _ in range(STARTS))
    return Reading(statistics.median(times_ms), also={"worst": times_ms[-1]}, detail={"ms": times_ms})


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
    Metric("memory_held", f"Memory of an idle connection ({IDLE_CONNECTIONS:,} held)", "kB", memory_held(IDLE_CONNECTIONS),
           False, of_forwarder=True, of_fresh=True),
    Metric("memory_many", f"Memory of an idle connection ({MANY_CONNECTIONS:,} held)", "kB",
           memory_held(MANY_CONNECTIONS), False, of_forwarder=True, of_fresh=True, on_request=True),
    Metric("memory_flows", f"Memory of an idle flow of datagrams ({IDLE_FLOWS:,})", "kB", memory_of_flows, False,
           of_forwarder=True, of_fresh=True, on_request=True),
    Metric("memory_churn", f"Memory after {CHURNED:,} connections against that before", "×", memory_after_churn, False,
           of_forwarder=True, of_fresh=True, on_request=True),
    Metric("idle_cpu", f"CPU with {IDLE_CONNECTIONS:,} idle connections", "% of one", idle_cpu, False,
           of_forwarder=True, of_fresh=True),
    Metric("tcp_out_64", "TCP out, 64 streams", "Mbit/s", bulk("outward", "--parallel", "64"), is_bulk=True,
           on_request=True),
    Metric("tcp_rev_64", "TCP out, data back, 64 streams", "Mbit/s", bulk("outward", "--reverse", "--parallel", "64"),
           is_bulk=True, on_request=True),
    Metric("fair_out_64", "Fairness of 64 streams out", "Jain's index", fairness("outward", "--parallel", "64"),
           on_request=True),
    Metric("fair_rev_64", "Fairness of 64 streams out, data back", "Jain's index",
           fairness("outward", "--reverse", "--parallel", "64"), on_request=True),
    Metric("idle_flows_rr", f"TCP round trip beside {IDLE_FLOWS:,} idle flows, against without", "×", beside_idle_flows,
           False, of_fresh=True, on_request=True),
    Metric("start", "From start to the first answer", "ms", start, False, of_forwarder=True, on_request=True),
)}
