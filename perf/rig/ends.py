"""The servers and clients at both ends."""

import json
import time

from . import backends, processes
from .network import Failed
from .site import FAR, wait_until

# Ports of the far namespace.
BULK, EXCHANGE, SINK = 6001, 6002, 6003

# Behind the far namespace, when flows to many addresses are to be opened.
IDLE_NET, IDLE_FIRST = "192.0.2.0/24", "192.0.2.1"

# Starting and ending a client takes no longer than that, on a busy machine too.
GRACE_S = 20


class Direction:
    """A client, and the server that it asks."""

    def __init__(self, client, server, address, bulk, exchange, sink):
        self.client, self.server, self.address = client, server, address
        self.bulk, self.exchange, self.sink = bulk, exchange, sink


class Ends:
    """Programs at both ends of a guest's network."""

    def __init__(self, site, joined, programs):
        self.site, self.joined, self.programs = site, joined, programs
        inbound = (backends.BULK_IN, backends.EXCHANGE_IN, backends.SINK_IN)
        self.outward = Direction(joined.guest, site.far, FAR, BULK, EXCHANGE, SINK)
        self.inward = Direction(site.far, joined.guest, joined.address_for_far, *inbound)
        self.from_host = Direction(joined.host or site.host, joined.guest, joined.address_for_host, *inbound)
        self._serve(site.far, BULK, EXCHANGE, "far")
        self._serve(joined.guest, backends.BULK_IN, backends.EXCHANGE_IN, "guest")
        self._wait_for_published()

    def _serve(self, namespace, bulk, exchange, place):
        self.site.start(namespace, ["iperf3", "--server", "--port", bulk], f"iperf3-{place}")
        server = self.site.start(namespace, [self.programs.traffic, "serve", exchange], f"serve-{place}")
        self.site.until_says(server, "ready")
        wait_until(f"iperf3 of {place}", lambda: namespace.is_listening(bulk))

    def _wait_for_published(self):
        """A forwarder may open a port only once somebody in the guest listens there."""
        if self.joined.address_for_host == "127.0.0.1":
            for port in backends.TCP_PORTS:
                wait_until(f"published port {port}", lambda port=port: self.site.host.is_listening(port))

    def iperf3(self, way, seconds, *options):
        """A bulk transfer: what iperf3 reports about it."""
        words = ["iperf3", "--client", way.address, "--port", way.bulk, "--time", seconds, "--interval", 0.25,
                 "--json", "--connect-timeout", 3000, *options]
        said = way.client.run(words, seconds + GRACE_S, check=False)
        try:
            report = json.loads(said)
        except ValueError:
            raise Failed(f"iperf3 said: {said[-300:].strip()}") from None
        if "error" in report or "sum_received" not in report.get("end", {}):
            raise Failed(f"iperf3: {report.get('error', 'no result')}")
        return report

    def traffic(self, way, test, seconds, *options):
        """A client of the exchange server: its line of JSON."""
        words = [self.programs.traffic, test, f"{way.address}:{way.exchange}", seconds, *options]
        return json_line(way.client.run(words, seconds + GRACE_S))

    def flood(self, way, size, seconds, *options):
        """Datagrams one way: what was sent, and what arrived."""
        sink = self.site.start(way.server, [self.programs.traffic, "udpsink", way.sink, seconds + 5], "sink")
        try:
            self.site.until_says(sink, "ready")
            words = [self.programs.traffic, "udpsend", f"{way.address}:{way.sink}", size, seconds, *options]
            sent = json_line(way.client.run(words, seconds + GRACE_S))
            sink.wait(timeout=GRACE_S)
            return sent, json_line(self.site.said(sink))
        finally:
            self.site.stop(sink)

    def hold(self, count):
        """Opens idle connections from the guest; returns the process that holds them, and how many stand."""
        way = self.outward
        words = [self.programs.traffic, "hold", count, f"{way.address}:{way.exchange}", 600]
        holder = self.site.start(way.client, words, "hold")
        self.site.until(holder, "connections", lambda: "{" in self.site.said(holder), 60)
        return holder, int(json_line(self.site.said(holder))["open"])

    def flows(self, sockets, addresses):
        """Sends a datagram from each of the guest's sockets to each of the far addresses, where somebody listens; returns the
        processes that hold them, and how many arrived.
        """
        self.site.far.ip(f"route replace local {IDLE_NET} dev lo")
        words = [self.programs.traffic, "udpsink", SINK, 600]
        sink = self.site.start(self.site.far, words, "idle-sink")
        self.site.until_says(sink, "ready")
        before = self._arrived()
        words = [self.programs.traffic, "flows", sockets, f"{IDLE_FIRST}:{SINK}", addresses, 600]
        holder = self.site.start(self.outward.client, words, "flows")
        self.site.until(holder, "datagrams", lambda: "{" in self.site.said(holder), 60)
        time.sleep(0.5)
        return [holder, sink], self._arrived() - before

    def _arrived(self):
        """Datagrams that the far namespace's sockets were given."""
        rows = self.site.far.run(["cat", "/proc/net/snmp"]).splitlines()
        head, counts = (row.split() for row in rows if row.startswith("Udp:"))
        return int(counts[head.index("InDatagrams")])

    def first_answer_ms(self):
        """From the start of the program to the first answer that a command gets for which it makes a guest."""
        words = [*self.joined.run, self.programs.traffic, "first", f"{FAR}:{EXCHANGE}"]
        begun_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) / 1e3
        return (json_line(self.site.host.run(words))["at_us"] - begun_us) / 1e3

    def dial(self, count, address, seconds):
        """Begins connections from the guest that nobody answers; returns the process."""
        words = [self.programs.traffic, "dial", count, f"{address}:{EXCHANGE}", seconds]
        dialler = self.site.start(self.outward.client, words, "dial")
        self.site.until(dialler, "connections", lambda: "{" in self.site.said(dialler))
        return dialler

    def memory_kb(self):
        """The forwarder's resident memory."""
        return processes.memory_kb(self.joined.forwarder.pid)

    def cpu_fine_s(self):
        """The forwarder's processor time so far, finely."""
        return processes.cpu_fine_s(self.joined.forwarder.pid)


def json_line(text):
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise Failed(f"no result: {text[-300:].strip()}")
