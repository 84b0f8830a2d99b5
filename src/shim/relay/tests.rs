//! The relay, between a client and a container on the loopback.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::*;

const SOON: Duration = Duration::from_secs(10);

fn loopback(is_ipv6: bool) -> IpAddr {
    if is_ipv6 { "::1".parse().unwrap() } else { "127.0.0.1".parse().unwrap() }
}

fn link() -> Link {
    Link::of(loopback(false)).unwrap()
}

/// What is published at the host's loopback, and leads to `container`: where it is served.
fn relay(container: SocketAddr, protocol: PublishedProtocol, is_ipv6: bool) -> (Relay, SocketAddr) {
    let host = SocketAddr::new(loopback(is_ipv6), 8001);
    let mut relay = Relay::new(host, container, protocol);
    let port = relay.serve(link()).unwrap();
    (relay, SocketAddr::new(loopback(is_ipv6), port))
}

#[tokio::test]
async fn each_end_of_a_conversation_ends_by_itself() {
    for is_ipv6 in [false, true] {
        let container = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (_relay, at) = relay(container.local_addr().unwrap(), PublishedProtocol::Tcp, is_ipv6);
        let mut client = TcpStream::connect(at).await.unwrap();
        let (mut server, _) = container.accept().await.unwrap();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        let answer = vec![7; 1 << 20];
        let (written, read) = tokio::join!(
            async {
                server.write_all(&answer).await.unwrap();
                drop(server);
            },
            async {
                let mut read = Vec::new();
                client.read_to_end(&mut read).await.unwrap();
                read
            }
        );
        assert_eq!((written, read), ((), answer.clone()));
    }
}

#[tokio::test]
async fn a_reset_of_one_side_is_one_of_the_other() {
    let container = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_relay, at) = relay(container.local_addr().unwrap(), PublishedProtocol::Tcp, false);
    for server_resets in [true, false] {
        let client = TcpStream::connect(at).await.unwrap();
        let (server, _) = container.accept().await.unwrap();
        let (resets, mut other) = if server_resets { (server, client) } else { (client, server) };
        socket2::SockRef::from(&resets).set_linger(Some(Duration::ZERO)).unwrap();
        drop(resets);
        let read = timeout(SOON, other.read(&mut [0; 8])).await.unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_container_that_does_not_listen_resets_its_clients() {
    let container = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (_relay, at) = relay(container, PublishedProtocol::Tcp, false);
    let mut client = TcpStream::connect(at).await.unwrap();
    let read = timeout(SOON, client.read(&mut [0; 8])).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn each_client_gets_the_answers_to_its_own_datagrams() {
    for is_ipv6 in [false, true] {
        let container = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (_relay, at) = relay(container.local_addr().unwrap(), PublishedProtocol::Udp, is_ipv6);
        let mut clients = Vec::new();
        for number in 0..3u8 {
            let client = UdpSocket::bind((loopback(is_ipv6), 0)).await.unwrap();
            client.connect(at).await.unwrap();
            client.send(&vec![number; 40_000]).await.unwrap();
            clients.push(client);
        }
        let mut datagram = vec![0; 1 << 16];
        for _ in 0..clients.len() {
            let (length, from) = timeout(SOON, container.recv_from(&mut datagram)).await.unwrap().unwrap();
            container.send_to(&datagram[..length], from).await.unwrap();
        }
        for (number, client) in clients.iter().enumerate() {
            let length = timeout(SOON, client.recv(&mut datagram)).await.unwrap().unwrap();
            assert!(length == 40_000 && datagram[..length].iter().all(|byte| usize::from(*byte) == number));
        }
    }
}

#[tokio::test]
async fn a_refused_datagram_does_not_end_the_conversation() {
    let container = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let place = container.local_addr().unwrap();
    drop(container);
    let (_relay, at) = relay(place, PublishedProtocol::Udp, false);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.send_to(b"lost", at).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let container = UdpSocket::bind(place).await.unwrap();
    let mut datagram = [0; 64];
    let arrived = timeout(SOON, async {
        loop {
            client.send_to(b"hello", at).await.unwrap();
            if let Ok(received) = timeout(Duration::from_millis(20), container.recv(&mut datagram)).await {
                return received.unwrap();
            }
        }
    });
    assert_eq!(arrived.await.unwrap(), 5);
}

#[tokio::test]
async fn a_flood_of_clients_takes_a_bounded_number_of_sockets() {
    let container = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (_relay, at) = relay(container.local_addr().unwrap(), PublishedProtocol::Udp, false);
    // Sockets that are connected to the container: the relay's, one a client.
    let port = format!(":{:04X} ", container.local_addr().unwrap().port());
    let sockets = || {
        let all = std::fs::read_to_string("/proc/self/net/udp").unwrap();
        all.lines().filter(|line| line[20..].contains(&port)).count()
    };
    let mut datagram = [0; 8];
    for number in 0..1500u32 {
        // Each is closed again: what stays is the relay's.
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(&number.to_be_bytes(), at).await.unwrap();
        timeout(SOON, container.recv(&mut datagram)).await.unwrap().unwrap();
    }
    assert_eq!(sockets(), 1024);
}

#[tokio::test]
async fn a_link_that_stays_keeps_its_port_and_whichever_of_its_addresses_is_called_serves() {
    let container = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (mut relay, at) = relay(container.local_addr().unwrap(), PublishedProtocol::Tcp, false);
    assert_eq!(relay.serve(link()).unwrap(), at.port());
    for address in ["127.0.0.1", "127.9.9.9"] {
        TcpStream::connect((address, at.port())).await.unwrap();
        timeout(SOON, container.accept()).await.unwrap().unwrap();
    }
    drop(relay);
    let gone = timeout(SOON, async {
        while TcpStream::connect(at).await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    gone.await.unwrap();
}
