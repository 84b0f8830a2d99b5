//! hythe goes and comes again, and containers stay.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::rig::site::{FAMILIES, Family};
use crate::rig::wait::{pause, wait_until};
use crate::world::{page_at, with_both_engines};

with_both_engines! {
    ports_are_back_after_hythe_without_a_container_being_restarted(world) {
        world.engine.docker(&[
            "run", "-d", "--name", "webserver", "-p", "8000:80", "-p", "127.0.0.1:8001:80", "-p", "9000-9003:80-83",
            "nginx",
        ]);
        world.expect_page(8000);
        let before = world.places();
        let started = world.engine.docker(&["inspect", "--format", "{{.State.StartedAt}}", "webserver"]);
        for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL] {
            world.restart_hythe(signal);
            let returned = Instant::now();
            wait_until("all ports to be back", || world.places() == before);
            println!("after {signal}, all ports were back {:?} after hythe's return", returned.elapsed());
            for family in FAMILIES {
                wait_until("a page", || page_at(&world.site.host, family.loopback(), 8000).is_ok());
                wait_until("a page", || page_at(&world.site.far, family.host(), 8000).is_ok());
            }
            wait_until("a page", || page_at(&world.site.host, Family::V4.loopback(), 8001).is_ok());
        }
        let after = world.engine.docker(&["inspect", "--format", "{{.State.StartedAt}}", "webserver"]);
        assert_eq!(after, started);
    }

    a_killed_engine_leaves_no_port(world) {
        world.engine.line("docker run -d -p 8000:80 --name webserver nginx");
        world.expect_page(8000);
        world.engine.kill();
        wait_until("no port to be published", || world.published().is_empty());
    }

    what_the_hosts_user_unpublishes_stays_so_and_the_container_goes_on(world) {
        world.engine.line("docker run -d -p 8000:80 --name webserver nginx");
        world.expect_page(8000);
        world.unpublish("8000:8000");
        world.expect_closed_within(8000, Duration::from_secs(1));
        // Longer than it takes who asks again.
        pause(Duration::from_secs(2));
        assert!(world.published().is_empty(), "{:?}", world.published());
        assert_eq!(world.engine.docker(&["ps", "--quiet"]).lines().count(), 1);
        world.engine.docker(&["restart", "--time", "0", "webserver"]);
        world.expect_page(8000);
    }
}
