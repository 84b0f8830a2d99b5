"""What joins guest and host: hythe, its peers, and the bounds.

Each starts in a site of its own, and says where the guest's programs run and how its ports are reached.
"""

import json
import os
import socket
import subprocess
from dataclasses import dataclass

from .network import Failed, Namespace
from .programs import version
from .site import FAR, HOST, ROUTER

# Ports of the guest that are published: bulk, exchanges, datagrams one way.
BULK_IN, EXCHANGE_IN, SINK_IN = 7001, 7002, 7003
TCP_PORTS, UDP_PORTS = (BULK_IN, EXCHANGE_IN), (EXCHANGE_IN, SINK_IN)

LINK_GATEWAY, LINK_GUEST = "10.78.0.1", "10.78.0.2"


@dataclass
class Joined:
    """A guest that has a network."""

    guest: Namespace
    # Where a client of the far namespace, and one of the host's own, reach the guest's ports.
    address_for_far: str
    address_for_host: str
    # The program between guest and host: a bound of the kernel's has none.
    forwarder: subprocess.Popen | None = None
    # Where that client of the host's own runs, if not in the host namespace.
    host: Namespace | None = None
    # The words that, before a command, run it in a guest of its own.
    run: tuple = ()


class Backend:
    """One way from guest to host."""

    name = ""
    is_bound = False
    # Which one of ours it is compared with.
    beside = "hythe"

    def __init__(self, programs):
        self.programs = programs

    def missing(self):
        """Why it cannot take part here, or None."""
        return None

    def version(self):
        """Which it is, in one line."""
        return "this kernel"

    def join(self, site):
        """Starts it; returns when the guest has its network."""
        raise NotImplementedError


class Loopback(Backend):
    """The far namespace to itself: what both ends cost, with nothing between."""

    name, is_bound = "loopback", True

    def join(self, site):
        return Joined(site.far, FAR, FAR, host=site.far)


class Veth(Backend):
    """The host is the guest: the wire alone."""

    name, is_bound = "veth", True

    def join(self, site):
        return Joined(site.host, HOST, "127.0.0.1")


class Routed(Backend):
    """The host's kernel forwards packets between two wires."""

    name, is_bound = "routed", True

    def join(self, site):
        site.host.ip(f"link add link0 type veth peer name link0 netns {site.guest.path}")
        return route_through_host(site, "link0")


class TapBridge(Backend):
    """Two taps and a program that copies frames between them: the bound of all that serve a tap."""

    name, is_bound = "tap-bridge", True

    def version(self):
        return "perf/tapbridge.rs"

    def join(self, site):
        bridge = site.start(site.host, [self.programs.tapbridge, site.guest.path], self.name)
        site.until_says(bridge, "ready")
        joined = route_through_host(site, "tap0")
        joined.forwarder = bridge
        return joined


def route_through_host(site, device):
    """Gives both ends of a link addresses, and lets the host forward."""
    site.host.ip(f"addr add {LINK_GATEWAY}/24 dev {device}", f"link set {device} up")
    site.guest.ip(f"addr add {LINK_GUEST}/24 dev {device}", f"link set {device} up",
                  f"route add default via {LINK_GATEWAY}")
    site.far.ip(f"route add {LINK_GUEST}/32 via {HOST} src {FAR}")
    site.host.set("ipv4/ip_forward", "1")
    return Joined(site.guest, LINK_GUEST, LINK_GUEST)


def published():
    """The guest's ports, in hythe's words."""
    specs = [f"{port}:{port}/tcp" for port in TCP_PORTS] + [f"{port}:{port}/udp" for port in UDP_PORTS]
    return [word for spec in specs for word in ("-p", spec)]


def numbers(ports):
    """Ports, in passt's and pasta's words."""
    return ",".join(map(str, ports))


class Hythe(Backend):
    """hythe, on io_uring."""

    name, engine, spin = "hythe", "io-uring", ()

    def version(self):
        return " ".join([f"{version(self.programs.hythe)}, --engine {self.engine}", *self.spin])

    def join(self, site):
        words = [self.programs.hythe, "attach", "--netns", site.guest.path, "--engine", self.engine, *self.spin, *published()]
        forwarder = site.start(site.host, words, self.name)
        site.until(forwarder, "a route in the guest", site.guest.has_default_route)
        run = (self.programs.hythe, "run", "--engine", self.engine, *self.spin, "--")
        return Joined(site.guest, HOST, "127.0.0.1", forwarder, run=run)


class HytheEpoll(Hythe):
    """hythe, on epoll."""

    name, engine = "hythe-epoll", "epoll"


class HytheNospin(Hythe):
    """hythe, whose workers sleep without looking for more work before."""

    name, spin = "hythe-nospin", ("--spin-us", "0")


class Pasta(Backend):
    """pasta, as Podman starts it: segments of up to 64 KiB by a large MTU."""

    name = "pasta"

    def missing(self):
        return None if self.programs.pasta else "pasta: not installed (Debian: passt)"

    def version(self):
        return version(self.programs.pasta, "passt")

    def join(self, site):
        words = [self.programs.pasta, "--foreground", "--config-net", "--runas", "0", "--ns-ifname", "tap0",
                 "--tcp-ports", numbers(TCP_PORTS), "--udp-ports", numbers(UDP_PORTS),
                 "--tcp-ns", "none", "--udp-ns", "none", "--netns", site.guest.path]
        forwarder = site.start(site.host, words, self.name)
        site.until(forwarder, "a route in the guest", site.guest.has_default_route)
        run = (self.programs.pasta, "--config-net", "--runas", "0", "--")
        return Joined(site.guest, HOST, "127.0.0.1", forwarder, run=run)


class Slirp4netns(Backend):
    """slirp4netns, as Docker's and Podman's rootless modes start it."""

    name = "slirp4netns"

    def missing(self):
        return None if self.programs.slirp4netns else "slirp4netns: not installed (Debian: slirp4netns)"

    def version(self):
        return version(self.programs.slirp4netns, "slirp4netns")

    def join(self, site):
        api = f"{site.directory}/api"
        words = [self.programs.slirp4netns, "--configure", "--mtu=65520", "--api-socket", api,
                 "--netns-type=path", site.guest.path, "tap0"]
        forwarder = site.start(site.host, words, self.name)
        site.until(forwarder, "a route in the guest",
                   lambda: site.guest.has_default_route() and os.path.exists(api))
        for protocol, numbers in (("tcp", TCP_PORTS), ("udp", UDP_PORTS)):
            for port in numbers:
                _ask_slirp4netns(api, protocol, port)
        return Joined(site.guest, HOST, "127.0.0.1", forwarder)


def _ask_slirp4netns(api, protocol, port):
    arguments = {"proto": protocol, "host_addr": "0.0.0.0", "host_port": port,
                 "guest_addr": "10.0.2.100", "guest_port": port}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(api)
        connection.sendall(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(4096).decode()
    if "error" in answer:
        raise Failed(f"slirp4netns does not publish port {port}: {answer}")


class Vguest(Backend):
    """A back-end of vhost-user. Its guest is a namespace, and vguest in front of it what a virtual machine's driver is."""

    # What the guest's interface is given: as the back-end's own DHCP server would.
    address, gateway, mtu = "", "", 1500

    def serve(self, site, link):
        """Starts the back-end."""
        raise NotImplementedError

    def join(self, site):
        link = f"{site.directory}/link"
        forwarder = self.serve(site, link)
        site.until(forwarder, "a socket", lambda: os.path.exists(link))
        driver = site.start(site.host, [self.programs.vguest, link, site.guest.path], "vguest")
        site.until_says(driver, "ready")
        site.guest.ip(f"link set tap0 mtu {self.mtu} up", f"addr add {self.address}/24 dev tap0",
                      f"route add default via {self.gateway}")
        return Joined(site.guest, HOST, "127.0.0.1", forwarder)


class HytheVguest(Vguest):
    """hythe over vhost-user, on io_uring; MTU 1,500."""

    name = "hythe-vguest"
    address, gateway = "192.168.65.3", "192.168.65.1"

    def version(self):
        return f"{version(self.programs.hythe)}, vm --vhost-user"

    def serve(self, site, link):
        words = [self.programs.hythe, "vm", "--vhost-user", link, "--engine", "io-uring", *published()]
        return site.start(site.host, words, self.name)


class PasstVguest(Vguest):
    """passt over vhost-user; MTU 65,520, its own default."""

    name, beside = "passt-vguest", HytheVguest.name
    # The guest has the host's own address.
    address, gateway, mtu = HOST, ROUTER, 65_520

    def missing(self):
        words = [self.programs.passt or "false", "--help"]
        said = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        return None if "--vhost-user" in said else "passt: none that speaks vhost-user (perf/peers fetches one)"

    def version(self):
        return f"{version(self.programs.passt)}, --vhost-user"

    def serve(self, site, link):
        words = [self.programs.passt, "--foreground", "--vhost-user", "--socket-path", link,
                 "--tcp-ports", numbers(TCP_PORTS), "--udp-ports", numbers(UDP_PORTS)]
        return site.start(site.host, words, self.name)


# In the order of the report's columns.
ALL = {kind.name: kind for kind in (Hythe, HytheEpoll, HytheNospin, Pasta, Slirp4netns, TapBridge, Routed, Veth, Loopback,
                                    HytheVguest, PasstVguest)}
OF_VHOST_USER = {HytheVguest.name, PasstVguest.name}
ON_REQUEST = {HytheEpoll.name, HytheNospin.name} | OF_VHOST_USER
QUICK = (Hythe.name, Pasta.name, TapBridge.name, Routed.name)
