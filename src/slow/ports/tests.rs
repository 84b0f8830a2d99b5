//! Published ports with workers that only hold what they are given.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use tokio::task::LocalSet;

use super::ephemeral::Ephemeral;
use super::table::{PortError, Publisher, Table, bind_error};
use super::{Published, Publishing, Removal, publish_at_start};
use crate::exchange::mail::ToWorker;
use crate::exchange::{Mailbox, Waker};
use crate::policy::guest_api::GuestBounds;
use crate::policy::port_set::PortSet;
use crate::policy::publish::{Binding, PublishRequest, PublishedProtocol, parse};
use crate::slow::mailing::RETRY;

/// The table, and workers that hold sockets and let them go.
pub struct Bench {
    pub publishing: Rc<Publishing>,
    workers: Vec<Mailbox<ToWorker<OwnedFd>>>,
}

/// What one worker holds.
#[derive(Default)]
pub struct Held {
    sockets: HashMap<u32, OwnedFd>,
    excluded: PortSet,
}

impl Bench {
    pub fn new(descriptors: u64) -> Self {
        let workers: Vec<_> = (0..2).map(|_| Mailbox::new(8, Arc::new(Waker::new().unwrap()))).collect();
        let table = Table::new(Ephemeral::read(), workers.len(), true, descriptors);
        Self { publishing: Publishing::new(table, workers.clone()), workers }
    }

    /// With a guest that may publish within bounds.
    pub fn for_guest(bounds: GuestBounds) -> Self {
        let bench = Self::new(1000);
        let table = Table::new(Ephemeral::read(), bench.workers.len(), true, 1000);
        Self { publishing: Publishing::new(table.with_guest_bounds(bounds), bench.workers.clone()), ..bench }
    }

    /// Runs a test beside workers that serve their mail.
    pub fn run<T>(self, test: impl AsyncFnOnce(Rc<Publishing>) -> T) -> (T, Vec<Held>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let publishing = self.publishing.clone();
        let held: Rc<std::cell::RefCell<Vec<Held>>> = Rc::default();
        held.borrow_mut().resize_with(self.workers.len(), Held::default);
        let served = held.clone();
        let workers = self.workers;
        let outcome = LocalSet::new().block_on(&runtime, async move {
            let serving = tokio::task::spawn_local(async move {
                loop {
                    for (worker, held) in workers.iter().zip(served.borrow_mut().iter_mut()) {
                        while let Some(mail) = worker.take() {
                            held.take(mail);
                        }
                    }
                    tokio::time::sleep(RETRY).await;
                }
            });
            let unheld = tokio::task::spawn_local(publishing.clone().take_back_unheld());
            let outcome = test(publishing).await;
            // What was mailed last is taken too.
            tokio::time::sleep(5 * RETRY).await;
            for task in [serving, unheld] {
                task.abort();
                let _ = task.await;
            }
            outcome
        });
        (outcome, Rc::into_inner(held).unwrap().into_inner())
    }
}

impl Held {
    fn take(&mut self, mail: ToWorker<OwnedFd>) {
        match mail {
            ToWorker::Publish(publication, socket) => {
                assert!(self.sockets.insert(publication.id, socket).is_none());
            }
            ToWorker::Unpublish { id, receipt } => {
                self.sockets.remove(&id);
                drop(receipt);
            }
            ToWorker::Exclude { port, excluded: true } => self.excluded.insert(port),
            ToWorker::Exclude { port, excluded: false } => self.excluded.remove(port),
            _ => panic!("no such mail is expected"),
        }
    }
}

/// Ports that were free a moment ago, one after the other.
pub fn free_ports(count: u16) -> u16 {
    'search: for _ in 0..100 {
        let first = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port();
        if first.checked_add(count).is_none() {
            continue;
        }
        for port in first..first + count {
            for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
                if TcpListener::bind((any, port)).is_err() || UdpSocket::bind((any, port)).is_err() {
                    continue 'search;
                }
            }
        }
        return first;
    }
    panic!("no ports are free");
}

fn requests(specs: &[&str]) -> Vec<PublishRequest> {
    specs.iter().flat_map(|spec| parse(spec).unwrap()).collect()
}

fn removal(specs: &[&str]) -> Removal {
    let meant =
        specs.iter().flat_map(|spec| parse(spec).unwrap().into_iter().map(|one| (spec.to_string(), one)));
    Removal::Meant(meant.collect())
}

async fn publish(publishing: &Rc<Publishing>, specs: &[&str]) -> Result<Vec<Binding>, PortError> {
    let published =
        publishing.publish(requests(specs), Publisher::Host, publishing.turn(Publisher::Host).await).await?;
    Ok(published.into_iter().map(|Published { binding, .. }| binding).collect())
}

async fn unpublish(publishing: &Rc<Publishing>, specs: &[&str]) -> Result<usize, PortError> {
    Ok(publishing
        .unpublish(removal(specs), Publisher::Host, publishing.turn(Publisher::Host).await)
        .await?
        .len())
}

fn listens(port: u16) -> [bool; 2] {
    [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()].map(|address| {
        match TcpStream::connect((address, port)) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address} {port}");
                false
            }
        }
    })
}

fn words(error: &PortError) -> String {
    error.to_string()
}

#[test]
fn a_port_listens_when_it_is_published_and_is_free_when_it_is_not() {
    let first = free_ports(2);
    let spec = format!("{first}:80");
    let udp = format!("{}:53/udp", first + 1);
    let ((), held) = Bench::new(1000).run(async |publishing| {
        let bindings = publish(&publishing, &[&spec, &udp]).await.unwrap();
        let places: Vec<String> = bindings.iter().map(Binding::place).collect();
        let second = first + 1;
        let expected = [
            format!("0.0.0.0:{first}"),
            format!("[::]:{first}"),
            format!("0.0.0.0:{second}/udp"),
            format!("[::]:{second}/udp"),
        ];
        assert_eq!(places, expected);
        assert_eq!(listens(first), [true, true]);
        let taken = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, second)).unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AddrInUse);

        assert_eq!(unpublish(&publishing, &[&spec]).await.unwrap(), 2);
        // At once: nobody has to wait or to try again.
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, first)).unwrap();
        assert_eq!(publishing.look(Table::len), 2);
        assert_eq!(unpublish(&publishing, &[&udp]).await.unwrap(), 2);
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, second)).unwrap();
        assert!(publishing.look(Table::is_empty));
        assert_eq!(publishing.look(Table::descriptors), 0);
    });
    for worker in held {
        assert!(worker.sockets.is_empty());
        assert!(!worker.excluded.contains(first) && !worker.excluded.contains(first + 1));
    }
}

#[test]
fn each_worker_has_a_listener_and_leaves_the_port_alone() {
    let first = free_ports(2);
    let specs = [format!("{first}:80"), format!("127.0.0.1:{}:81/udp", first + 1)];
    let ((), held) = Bench::new(1000).run(async |publishing| {
        publish(&publishing, &[&specs[0], &specs[1]]).await.unwrap();
    });
    let counts: Vec<usize> = held.iter().map(|worker| worker.sockets.len()).collect();
    // Both have the TCP port in both families, and one the UDP port.
    assert_eq!((counts.iter().sum::<usize>(), *counts.iter().min().unwrap()), (5, 2), "{counts:?}");
    for worker in &held {
        assert!(worker.excluded.contains(first) && worker.excluded.contains(first + 1));
    }
}

#[test]
fn a_range_is_published_as_a_whole_or_not_at_all() {
    let first = free_ports(8);
    let last = first + 7;
    let range = format!("{first}-{last}:80-87");
    Bench::new(1000).run(async |publishing| {
        let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, first + 5)).unwrap();
        let error = publish(&publishing, &[&range]).await.unwrap_err();
        let taken = format!("Bind for 0.0.0.0:{} failed: address already in use", first + 5);
        assert!(words(&error).starts_with(&taken), "{error}");
        assert!(publishing.look(Table::is_empty));
        for port in (first..=last).filter(|port| *port != first + 5) {
            assert_eq!(listens(port), [false, false]);
        }
        drop(stranger);

        // The same with one of our own in the way.
        let ours = format!("127.0.0.1:{}:99", first + 3);
        publish(&publishing, &[&ours]).await.unwrap();
        let error = publish(&publishing, &[&range]).await.unwrap_err();
        let allocated = format!("Bind for 0.0.0.0:{} failed: port is already allocated", first + 3);
        assert_eq!(words(&error), allocated);
        assert_eq!(publishing.look(Table::len), 1);
        let twice = format!("{first}:80");
        let error = publish(&publishing, &[&twice, &range]).await.unwrap_err();
        assert_eq!(words(&error), format!("Bind for 0.0.0.0:{first} failed: port is already allocated"));

        unpublish(&publishing, &[&ours]).await.unwrap();
        assert_eq!(publish(&publishing, &[&range]).await.unwrap().len(), 16);
        // Nothing is removed when a part is not there.
        let more = format!("{}:88", last + 1);
        let error = unpublish(&publishing, &[&range, &more]).await.unwrap_err();
        assert_eq!(words(&error), format!("{more} is not published"));
        assert_eq!(publishing.look(Table::len), 16);
        assert_eq!(unpublish(&publishing, &[&range]).await.unwrap(), 16);
    });
}

#[test]
fn random_ports_are_the_next_ones_and_a_range_gives_its_first_free_one() {
    let first = free_ports(3);
    Bench::new(1000).run(async |publishing| {
        let drawn: Vec<u16> = [
            publish(&publishing, &["80"]).await.unwrap(),
            publish(&publishing, &["127.0.0.1::80", "81"]).await.unwrap(),
        ]
        .concat()
        .iter()
        .map(|binding| binding.host_port)
        .collect();
        // 80 and 81 are of both families, on the same port.
        assert!(drawn[0] == drawn[1] && drawn[1] < drawn[2] && drawn[2] < drawn[3] && drawn[3] == drawn[4]);

        let range = format!("127.0.0.1:{first}-{}:90", first + 2);
        let _stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, first)).unwrap();
        for expected in [first + 1, first + 2] {
            assert_eq!(publish(&publishing, &[&range]).await.unwrap()[0].host_port, expected);
        }
        let error = publish(&publishing, &[&range]).await.unwrap_err();
        assert!(words(&error).starts_with(&format!("no port of {first}-{} is free", first + 2)), "{error}");
        // Without a port of the host, all that lead to the guest's.
        assert_eq!(unpublish(&publishing, &["127.0.0.1::90"]).await.unwrap(), 2);
    });
}

#[test]
fn several_changes_at_a_time_are_made_one_after_the_other() {
    let first = free_ports(1);
    let spec = format!("{first}:80");
    Bench::new(1000).run(async |publishing| {
        let ask = async || publish(&publishing, &[&spec]).await;
        let (one, two, three) = tokio::join!(ask(), ask(), ask());
        let outcomes = [one, two, three];
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        assert_eq!(publishing.look(Table::len), 2);
    });
}

#[test]
fn one_who_has_asked_and_goes_leaves_nothing_half_done() {
    let first = free_ports(20);
    let range = format!("{first}-{}:100-119", first + 19);
    let ((), held) = Bench::new(1000).run(async |publishing| {
        let turn = publishing.turn(Publisher::Host).await;
        let asked = publishing.publish(requests(&[&range]), Publisher::Host, turn);
        // Long enough for some ports, and not for all: mailboxes are small.
        let gone = tokio::time::timeout(RETRY, asked).await;
        assert!(gone.is_err());
        assert_eq!(unpublish(&publishing, &[&range]).await.unwrap(), 40);
    });
    assert!(held.iter().all(|worker| worker.sockets.is_empty()));
}

#[test]
fn changes_whose_askers_have_gone_still_take_their_turns() {
    let first = free_ports(20);
    let range = format!("{first}-{}:100-119", first + 19);
    Bench::new(1000).run(async |publishing| {
        for _ in 0..super::CHANGES {
            let turn = publishing.turn(Publisher::Host).await;
            let asked = publishing.publish(requests(&[&range]), Publisher::Host, turn);
            // Asked, and gone.
            tokio::select! {
                biased;
                _ = asked => panic!("nobody has had the time to answer"),
                () = std::future::ready(()) => {}
            }
        }
        assert_eq!(publishing.turns.available_permits(), 0);
        drop(publishing.turn(Publisher::Host).await);
    });
}

#[test]
fn only_low_ports_are_said_to_take_a_right() {
    let words = |host_port: u16| {
        let address = Ipv4Addr::LOCALHOST.into();
        let binding = Binding { address, host_port, guest_port: 80, protocol: PublishedProtocol::Tcp };
        bind_error(binding, std::io::Error::from_raw_os_error(libc::EACCES)).to_string()
    };
    assert!(words(1023).contains("ports below 1024"), "{}", words(1023));
    assert!(words(1024).starts_with("Bind for 127.0.0.1:1024 failed: Permission denied"), "{}", words(1024));
}

#[test]
fn ports_take_no_more_descriptors_than_they_may() {
    let first = free_ports(3);
    // Two workers, a handle of each socket, two families.
    Bench::new(16).run(async |publishing| {
        let three = format!("{first}-{}:80-82", first + 2);
        let error = publish(&publishing, &[&three]).await.unwrap_err();
        assert!(words(&error).starts_with("takes 24 descriptors, and 16 are left"), "{error}");
        let two = format!("{first}-{}:80-81", first + 1);
        publish(&publishing, &[&two]).await.unwrap();
        let error = publish(&publishing, &["127.0.0.1::99/udp"]).await.unwrap_err();
        assert!(matches!(error, PortError::Descriptors { needed: 1, left: 0 }), "{error}");
        unpublish(&publishing, &[&two]).await.unwrap();
        publish(&publishing, &["127.0.0.1::99/udp"]).await.unwrap();
    });
}

#[test]
fn a_port_that_a_worker_cannot_serve_is_published_no_more() {
    let first = free_ports(1);
    Bench::new(100).run(async |publishing| {
        let spec = format!("127.0.0.1:{first}:80");
        publish(&publishing, &[&spec]).await.unwrap();
        publishing.worker_refuses(1);
        // Changes are made one after the other: this one comes after it.
        publish(&publishing, &[&spec]).await.unwrap();
        assert!(publishing.look(|table| table.get(1).is_none() && table.len() == 1));
    });
}

#[test]
fn an_address_that_is_not_the_hosts_is_told() {
    Bench::new(100).run(async |publishing| {
        let error = publish(&publishing, &["203.0.113.9:8000:80"]).await.unwrap_err();
        let expected = "Bind for 203.0.113.9:8000 failed: the host does not have this address";
        assert_eq!(words(&error), expected);
    });
}

#[test]
fn the_start_fills_the_same_table() {
    let first = free_ports(1);
    let mut table = Table::new(Ephemeral::read(), 2, true, 100);
    let deliveries = publish_at_start(&mut table, requests(&[&format!("{first}:80")])).unwrap();
    let sockets: Vec<usize> = deliveries.iter().map(|delivery| delivery.sockets.len()).collect();
    assert_eq!((sockets, table.len(), table.descriptors()), (vec![2, 2], 2, 8));
    assert!(table.excluded().contains(first));
    let endpoint = SocketAddr::from((Ipv4Addr::LOCALHOST, first));
    TcpStream::connect(endpoint).unwrap();
    let again = publish_at_start(&mut table, requests(&[&format!("127.0.0.1:{first}:80")]));
    assert!(matches!(again, Err(PortError::Allocated(_))));
    let ids = table.matching(&requests(&["80"])[0], Publisher::Host);
    assert_eq!(ids.len(), 2);
    assert_eq!(table.get(ids[0]).unwrap().binding.protocol, PublishedProtocol::Tcp);
}
