//! A guest in which a Docker Engine runs, with everything around it.
//!
//! ```text
//! containers ── docker0 ── guest ── eth0 ─ hythe ─ host ── far          host and far are those of the rig's site
//! ```

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Method;
use hythe::control::client::ask;
use hythe::control::shapes::Ports;
use nix::sys::signal::Signal;

use crate::engine::{Engine, Version};
use crate::rig::cell::ANY;
use crate::rig::directory::Directory;
use crate::rig::dns_server::DnsServer;
use crate::rig::hythe::Hythe;
use crate::rig::netns::Netns;
use crate::rig::site::{FAMILIES, Family, Site};
use crate::rig::wait::{PATIENCE, wait_until, wait_within};

/// Makes a test of each Engine from a claim: `with_both_engines! { a_claim(world) { … } }`.
macro_rules! with_both_engines {
    ($($name:ident($world:ident) $body:block)*) => {$(
        mod $name {
            #[allow(unused_imports, reason = "some claims need nothing but their world")]
            use super::*;
            use $crate::engine::Version;
            use $crate::world::World;

            #[allow(unused_mut, reason = "some claims change their world")]
            fn claim(mut $world: World) $body

            #[test]
            fn engine_26() {
                claim(World::new(Version::V26));
            }

            #[test]
            fn engine_28() {
                claim(World::new(Version::V28));
            }
        }
    )*};
}

pub(crate) use with_both_engines;

/// What is around containers. The Engine ends first.
pub struct World {
    pub engine: Engine,
    hythe: Option<Hythe>,
    pub guest: Netns,
    pub site: Site,
    _dns: DnsServer,
    api: PathBuf,
    _directory: Directory,
}

impl World {
    /// A guest that may publish.
    pub fn new(version: Version) -> Self {
        Self::with_options(version, "--guest-api publish")
    }

    pub fn with_options(version: Version, options: &str) -> Self {
        let site = Site::new();
        let dns = DnsServer::start(&site.far, Family::V4.far(), 1);
        let guest = Netns::new();
        // So that the Engine takes an address that is the host's only.
        guest.sysctl("ipv4/ip_nonlocal_bind", "1");
        guest.sysctl("ipv6/ip_nonlocal_bind", "1");
        let directory = Directory::new();
        let own = directory.path().join("own");
        fs::create_dir(&own).unwrap();
        fs::set_permissions(&own, Permissions::from_mode(0o755)).unwrap();
        let api = own.join("api.sock");
        let hythe = attach(&site, &guest, &format!("{options} --api {}", api.display()));
        let engine = Engine::start(version, &guest);
        Self { engine, hythe: Some(hythe), guest, site, _dns: dns, api, _directory: directory }
    }

    /// hythe is ended by a signal, and another one is started.
    pub fn restart_hythe(&mut self, signal: Signal) {
        if let Some(hythe) = self.hythe.take() {
            hythe.signal(signal);
            hythe.end();
        }
        let has_link = || self.guest.output(&["ip", "link", "show", "eth0"]).status.success();
        wait_until("the interface to go with it", || !has_link());
        self.hythe = Some(attach(
            &self.site,
            &self.guest,
            &format!("--guest-api publish --api {}", self.api.display()),
        ));
    }

    /// What hythe says is published, as docker(1) prints it.
    pub fn published(&self) -> BTreeSet<String> {
        let answer = ask(&self.api, Method::GET, "/v1/ports", None).unwrap();
        let ports = serde_json::from_slice::<Ports>(&answer).unwrap().ports;
        ports.into_iter().map(|port| port.binding.to_string()).collect()
    }

    /// The host's user unpublishes a port.
    pub fn unpublish(&self, spec: &str) {
        ask(&self.api, Method::DELETE, &format!("/v1/ports?spec={spec}"), None).unwrap();
    }

    /// Where the host has published something: `ADDRESS:PORT/PROTOCOL`.
    pub fn places(&self) -> BTreeSet<String> {
        self.published().iter().map(|line| place_of(line)).collect()
    }

    /// What docker(1) says of a container: the same.
    pub fn places_of(&self, container: &str) -> BTreeSet<String> {
        self.engine.docker(&["port", container]).lines().map(place_of).collect()
    }

    /// A page of the server in a container is at a port: for the host over its loopback, for others over its address.
    pub fn expect_page(&self, port: u16) {
        for family in FAMILIES {
            expect_page_at(&self.site.host, family.loopback(), port);
            expect_page_at(&self.site.far, family.host(), port);
        }
    }

    /// A port refuses whoever comes.
    pub fn expect_closed_within(&self, port: u16, time: Duration) {
        let closed = |netns: &Netns, address: IpAddr| netns.connect((address, port)).is_err();
        let all = || {
            FAMILIES.iter().all(|family| {
                closed(&self.site.host, family.loopback()) && closed(&self.site.far, family.host())
            })
        };
        assert!(wait_within(time, || all().then_some(())).is_some(), "port {port} is open");
    }
}

/// hythe serves the guest, with the far server as its resolver.
fn attach(site: &Site, guest: &Netns, options: &str) -> Hythe {
    Hythe::of(&site.host, ANY)
        .options(options)
        .mounts(|mounts| mounts.resolv_conf(&format!("nameserver {}\n", Family::V4.far())))
        .attach(&format!("--netns {}", guest.path().display()), guest)
}

/// `80/tcp -> 0.0.0.0:8000`: the host's side, with the protocol.
fn place_of(line: &str) -> String {
    let (guest, place) = line.split_once(" -> ").unwrap_or_else(|| panic!("{line}"));
    format!("{place}/{}", guest.split_once('/').unwrap().1)
}

/// What is at a place: a page, or why there is none.
pub fn page_at(netns: &Netns, address: IpAddr, port: u16) -> std::io::Result<String> {
    let mut stream = netns.connect(SocketAddr::new(address, port))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// A page of nginx is at a place, or soon will be: a server in a container takes a moment after `docker run`.
pub fn expect_page_at(netns: &Netns, address: IpAddr, port: u16) {
    let mut last = None;
    let found = wait_within(PATIENCE, || {
        let page = page_at(netns, address, port);
        let is_nginx = page.as_ref().is_ok_and(|page| page.contains("Welcome to nginx!"));
        last = Some(page);
        is_nginx.then_some(())
    });
    assert!(found.is_some(), "{address} port {port}: {last:?}");
}
