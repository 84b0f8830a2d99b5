//! What containers reach, and by which names.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};

use crate::rig::site::Family;
use crate::world::with_both_engines;

/// Where the name server of the tests says that `address.test` is.
const OUTSIDE: [u8; 4] = [203, 0, 113, 10];

/// Answers whoever asks for a page, until the test ends.
fn serve(listener: TcpListener, page: &'static str) {
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{page}").as_bytes());
        }
    });
}

with_both_engines! {
    containers_know_and_reach_the_host_the_gateway_and_the_outside(world) {
        world.site.far.ip("addr add 203.0.113.10/32 dev lo");
        serve(world.site.host.listen(Family::V4.loopback(), 3000), "the host's page");
        serve(world.site.far.listen(IpAddr::from(OUTSIDE), 80), "a page outside");
        world.engine.docker(&["network", "create", "own"]);
        for (name, network) in [("on-default", "bridge"), ("on-own", "own")] {
            world.engine.docker(&["run", "-d", "--name", name, "--network", network, "nginx"]);
            let inside = |script: &str| world.engine.inside(name, script);
            for (known, address) in
                [("host.docker.internal", "192.168.65.254"), ("gateway.docker.internal", "192.168.65.1")]
            {
                let said = inside(&format!("nslookup -type=a {known}"));
                assert!(said.contains(&format!("Address: {address}")), "{name}: {said}");
            }
            assert_eq!(inside("wget -q -O - http://host.docker.internal:3000/"), "the host's page");
            assert_eq!(inside("wget -q -O - http://address.test/"), "a page outside");
            inside("ping -c 1 -W 5 gateway.docker.internal");
        }
        // Names of containers are the Engine's, on a network of one's own.
        world.engine.docker(&["run", "-d", "--name", "other", "--network", "own", "nginx"]);
        assert!(world.engine.inside("on-own", "wget -q -O - http://other/").contains("Welcome to nginx!"));
    }
}
