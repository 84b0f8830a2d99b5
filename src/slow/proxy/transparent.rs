//! Streams of guests that know of no proxy: the first bytes say whom they are for.
//!
//! They are looked at and stay where they are (`MSG_PEEK`), so that whoever takes the stream over reads all of it. A guest that says nothing
//! at first waits for the server's word: after a moment the address decides.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::guest_stream::GuestStream;
use super::http::{self, Entry};
use super::peek::{Peeked, peek};
use super::place::Place;
use super::tunnel::Way;
use super::{Failure, Proxy};
use crate::policy::proxy::Kind;
use crate::slow::shared_stream::SharedStream;

/// How long the first byte may take. A client that wants TLS may load its certificates between its connection and its greeting, and
/// is known by its address alone when it is late; one that waits for the server waits for as long, and is not to wait for 300 ms.
const FIRST: Duration = Duration::from_millis(250);

/// How long the rest of a greeting may take.
const REST: Duration = Duration::from_secs(3);

/// As much of a stream is looked at, in bytes: a ClientHello of 16 KiB in its records, and the head of a request.
const LOOKED_AT: usize = 64 << 10;

/// Takes a stream where it is to go.
pub async fn serve(proxy: Proxy, place: Place, end: SharedStream, stream: GuestStream) {
    let Some(greeting) = greeting(&end).await else { return };
    let (kind, name) = match greeting {
        Greeting::Tls(name) => (Kind::Tunnel, name),
        Greeting::Http(host) => {
            let named = Place { name: host, ..place.clone() };
            // Requests that all go straight, whatever they name, need no look at each.
            if proxy.decides_by_request(&named).await {
                return http::serve(proxy, Entry::Through(place), end, stream).await;
            }
            (Kind::Http, named.name)
        }
        Greeting::Other => (Kind::Tunnel, None),
    };
    let place = Place { name, ..place }.held_to_its_name(&proxy.addresses().egress);
    if let Err(failure) = join(&proxy, kind, &place, end, &stream).await {
        tracing::debug!(%place, %failure, "a stream of the guest's goes nowhere");
        stream.reset().await;
    }
}

async fn join(
    proxy: &Proxy,
    kind: Kind,
    place: &Place,
    end: SharedStream,
    stream: &GuestStream,
) -> Result<(), Failure> {
    let ways: Vec<Way> = proxy.route(kind, place).await?;
    let tunnel = proxy.tunnel(&ways, place, None).await?;
    Ok(stream.hand_over(end, &[], tunnel.wire, &tunnel.early).await?)
}

/// What a guest says first.
enum Greeting {
    /// It wants TLS, with a server of this name if it says so.
    Tls(Option<String>),
    /// It has a request for a host of this name, if it says so.
    Http(Option<String>),
    /// Something else, or nothing.
    Other,
}

/// Looks at what a guest says first; `None` when it has gone.
async fn greeting(end: &SharedStream) -> Option<Greeting> {
    let mut bytes = vec![0; LOOKED_AT];
    let mut known = 0;
    let mut deadline = Instant::now() + FIRST;
    loop {
        let looked = timeout_at(deadline, end.peek(&mut bytes, known)).await;
        // One that says no more has said what there is to judge by.
        let (len, ended) = looked.unwrap_or(Ok((known, true))).ok()?;
        if known == 0 {
            deadline = Instant::now() + REST;
        }
        known = len;
        let ended = ended || len == bytes.len();
        match peek(&bytes[..len], ended) {
            Peeked::More if !ended => {}
            Peeked::Tls { name } => return Some(Greeting::Tls(name)),
            Peeked::Http => match host_of(&bytes[..len]) {
                Head::Partial if !ended => {}
                Head::Whole(name) => return Some(Greeting::Http(name)),
                Head::Partial | Head::None => return Some(Greeting::Http(None)),
            },
            Peeked::More | Peeked::Http2 | Peeked::Other => return Some(Greeting::Other),
        }
    }
}

/// The head of a request.
#[derive(PartialEq, Eq, Debug)]
enum Head {
    /// It has not come to its end.
    Partial,
    /// It has, and names this host.
    Whole(Option<String>),
    /// It is none.
    None,
}

fn host_of(bytes: &[u8]) -> Head {
    let mut fields = [httparse::EMPTY_HEADER; http::HEADERS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => Head::Partial,
        Err(_) => Head::None,
        Ok(httparse::Status::Complete(_)) => {
            let mut hosts = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case("host"));
            let host = hosts.next().and_then(|field| hyper::http::uri::Authority::try_from(field.value).ok());
            Head::Whole(host.and_then(|authority| Place::of_host(authority.host(), 0)?.name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_a_request_is_known_when_its_head_is_whole() {
        let request = b"GET / HTTP/1.1\r\nhOsT: Example.COM:8080\r\n\r\n";
        for len in 0..request.len() {
            assert_eq!(host_of(&request[..len]), Head::Partial, "{len}");
        }
        assert_eq!(host_of(request), Head::Whole(Some("example.com".into())));
        assert_eq!(host_of(b"GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n"), Head::Whole(None));
        assert_eq!(host_of(b"GET / HTTP/1.1\r\n\r\n"), Head::Whole(None));
        assert_eq!(host_of(b"GET  / HTTP/1.1\r\n\r\n"), Head::None);
    }
}
