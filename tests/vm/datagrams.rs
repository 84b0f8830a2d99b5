//! UDP between a guest and the far server, asked by either.

use std::net::SocketAddr;

use crate::rig::pattern::Pattern;
use crate::rig::site::FAMILIES;
use crate::rig::socket::receive;
use crate::world::{GUEST_PORT, PORT, with_every_guest};

/// Bytes of a datagram: the least, one packet, fragments, the most that IPv4 carries.
const SIZES: [usize; 4] = [1, 1400, 9000, 65_507];

with_every_guest! {
    datagrams_of_every_size_go_there_and_back(world) {
        let sizes = SIZES.map(|size| size.to_string()).join(" ");
        for family in FAMILIES {
            let far = world.site.far.udp(family.far(), 7000);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut bytes = vec![0; 70_000];
                    for size in SIZES {
                        let (len, from) = receive(&far, &mut bytes).unwrap();
                        assert!(bytes[..len] == Pattern(size as u64).bytes(size), "{len} bytes came of {size}, or others");
                        far.send_to(&bytes[..len], from).unwrap();
                    }
                });
                world.vm.command(&format!("talker ask {} {sizes}", SocketAddr::new(family.far(), 7000)));
            });
        }
        world.finish();
    }
}

with_every_guest! {
    a_published_port_takes_datagrams_of_every_size(world) {
        world.vm.serve(GUEST_PORT);
        for family in FAMILIES {
            let client = world.site.far.udp(family.next_hop(), 0);
            let to = SocketAddr::new(family.host(), PORT);
            let mut bytes = vec![0; 70_000];
            for size in SIZES {
                let question = Pattern(size as u64).bytes(size);
                client.send_to(&question, to).unwrap();
                let (len, from) = receive(&client, &mut bytes).unwrap_or_else(|error| panic!("{size} bytes, {family:?}: {error}"));
                assert!(bytes[..len] == question, "{len} bytes returned of {size}, or others");
                assert_eq!(from, to);
            }
        }
        world.finish();
    }
}
