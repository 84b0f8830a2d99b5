//! A port that is published, and stays so.
//!
//! ```text
//! asked ──▶ granted ──▶ unpublished by the host's user: that is that, and the container goes on
//!              ▲ │
//!              │ ▼ the connection breaks: hythe is gone
//!            asked again, after 100 ms at most, then after longer and longer, up to 700 ms; where somebody refuses to
//!              │ ▲         talk for long, up to half a minute
//!              │ ▲
//!              ▼ │ refused: another has the port now
//!            asked again, after 200 ms, then after longer and longer, up to half a minute
//! ```
//! There may be thousands that ask again at the same time, so each pause is a part of its length, by chance.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::arguments::Wanted;
use super::gateway::{self, AskError, Ended, Gateway, Grant};
use super::link::Link;
use super::parent::log;
use super::relay::{Relay, RelayError};

/// How long hythe may take to be connected to: at first, and again, when it may come back at any moment.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);
const AGAIN_PATIENCE: Duration = Duration::from_millis(700);

/// Between the attempts to reach a hythe that is gone. It is back, and asked, within two seconds of its return: the longest
/// pause and an attempt that has just begun.
const GONE: Pauses = Pauses { next: Duration::from_millis(100), longest: Duration::from_millis(700) };
/// Between the attempts to get what was refused. At first it may be the killed hythe itself whose sockets the kernel has not closed.
const REFUSED: Pauses = Pauses { next: Duration::from_millis(200), longest: Duration::from_secs(30) };

/// So often nobody was there: half a minute, or more.
const TURNED_AWAY_MAX: u32 = 60;

/// A grant that lasts so long was no mistake.
const LASTS: Duration = Duration::from_secs(5);

/// Why a port is not published.
#[derive(Debug, thiserror::Error)]
pub enum RefusedError {
    /// hythe, or nobody.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The guest.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// The kernel.
    #[error("cannot tell the guest's own address: {0}")]
    Link(std::io::Error),
}

/// Pauses, each twice as long as the one before.
#[derive(Clone, Copy)]
struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    async fn pause(&mut self) {
        sleep(self.next.mul_f64(rand::random_range(0.5..=1.0))).await;
        self.next = (self.next * 2).min(self.longest);
    }
}

/// A port that is published.
pub struct Published {
    wanted: Wanted,
    gateway: Gateway,
    relay: Option<Relay>,
    grant: Option<Grant>,
    granted: Instant,
    /// The pauses while hythe is gone.
    gone: Pauses,
}

impl Published {
    /// Publishes a port, by the gateway that the environment names.
    pub async fn new(wanted: Wanted) -> Result<Self, RefusedError> {
        let gateway = Gateway::find(std::env::var("HYTHE_GATEWAY").ok()).await?;
        Self::by(gateway, wanted).await
    }

    async fn by(gateway: Gateway, wanted: Wanted) -> Result<Self, RefusedError> {
        let relay =
            wanted.is_for_one_address().then(|| Relay::new(wanted.host, wanted.container, wanted.protocol));
        let mut published = Self { wanted, gateway, relay, grant: None, granted: Instant::now(), gone: GONE };
        published.grant = Some(published.ask(FIRST_PATIENCE).await?);
        Ok(published)
    }

    async fn ask(&mut self, patience: Duration) -> Result<Grant, RefusedError> {
        let stream = self.gateway.connect(patience).await?;
        let guest_port = match &mut self.relay {
            Some(relay) => relay.serve(link_of(&stream).map_err(RefusedError::Link)?)?,
            None => self.wanted.host.port(),
        };
        Ok(gateway::publish(stream, self.wanted.specification(guest_port)).await?)
    }

    /// Keeps it published. It can be dropped at any moment; what is being asked for then is not published.
    pub async fn keep(&mut self) -> Infallible {
        loop {
            let Some(grant) = &mut self.grant else {
                let grant = self.ask_again().await;
                self.grant = Some(grant);
                self.granted = Instant::now();
                continue;
            };
            let ended = grant.ended().await;
            self.grant = None;
            if ended == Ended::Unpublished {
                log(&format!("{} was unpublished", self.wanted.host));
                self.relay = None;
                return std::future::pending().await;
            }
            // One that grants and breaks at once is not asked without end.
            if self.granted.elapsed() > LASTS {
                self.gone = GONE;
            }
        }
    }

    async fn ask_again(&mut self) -> Grant {
        let (mut refused, mut turned_away) = (REFUSED, 0);
        self.gone.pause().await;
        loop {
            match self.ask(AGAIN_PATIENCE).await {
                Ok(grant) => return grant,
                Err(RefusedError::Ask(AskError::Refused(problem))) => {
                    log(&format!("{} is not published again: {}", self.wanted.host, problem.detail));
                    self.gone = GONE;
                    refused.pause().await;
                }
                // hythe is there, and answers no guest: it was started anew without leave to publish, so it seems.
                Err(RefusedError::Ask(AskError::Nobody { error, .. }))
                    if error.kind() == ErrorKind::ConnectionRefused && turned_away > TURNED_AWAY_MAX =>
                {
                    refused.pause().await;
                }
                Err(_) => {
                    turned_away += 1;
                    refused = REFUSED;
                    self.gone.pause().await;
                }
            }
        }
    }

    /// Gives it back.
    pub async fn give_back(self) {
        if let Some(grant) = self.grant {
            grant.give_back().await;
        }
    }
}

fn link_of(stream: &TcpStream) -> std::io::Result<Link> {
    Link::of(stream.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::super::gateway::fake_server::FakeHythe;
    use super::*;
    use tokio::net::TcpListener;

    fn wanted(host: &str, container: std::net::SocketAddr) -> Wanted {
        let words = format!(
            "-proto tcp -host-ip {host} -host-port 8000 -container-ip {} -container-port {}",
            container.ip(),
            container.port()
        );
        Wanted::parse(words.split_whitespace().map(str::to_string)).unwrap()
    }

    async fn publish(hythe: &FakeHythe, wanted: Wanted) -> Result<Published, RefusedError> {
        Published::by(Gateway::find(Some(hythe.address.to_string())).await.unwrap(), wanted).await
    }

    fn any() -> Wanted {
        wanted("0.0.0.0", "172.17.0.2:80".parse().unwrap())
    }

    #[tokio::test]
    async fn what_breaks_is_asked_for_again_and_what_is_refused_then_too() {
        let hythe = FakeHythe::new().await;
        let (published, asked) = tokio::join!(publish(&hythe, any()), hythe.grant());
        let mut published = published.unwrap();
        let play = async {
            asked.reset();
            // One that goes before it has answered, and then one that says no.
            hythe.accept().await.reset();
            drop(hythe.refuse("a test has this port").await);
            let asked = hythe.grant().await;
            assert!(asked.body.contains("0.0.0.0:8000:8000/tcp"));
            asked
        };
        tokio::select! {
            _asked = play => {}
            never = published.keep() => match never {},
        }
    }

    #[tokio::test]
    async fn a_hythe_that_is_away_for_long_is_asked_soon_after_its_return() {
        let hythe = FakeHythe::new().await;
        let address = hythe.address;
        let (published, asked) = tokio::join!(publish(&hythe, any()), hythe.grant());
        let mut published = published.unwrap();
        let play = async {
            drop(hythe.away());
            asked.reset();
            sleep(Duration::from_secs(3)).await;
            let hythe = FakeHythe::at(address).await;
            let returned = std::time::Instant::now();
            let asked = hythe.grant().await;
            assert!(returned.elapsed() < Duration::from_secs(2), "{:?}", returned.elapsed());
            asked
        };
        tokio::select! {
            _asked = play => {}
            never = published.keep() => match never {},
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_hosts_user_unpublishes_stays_so() {
        let hythe = FakeHythe::new().await;
        let (published, mut asked) = tokio::join!(publish(&hythe, any()), hythe.grant());
        let mut published = published.unwrap();
        asked.say("0\r\n\r\n").await;
        asked.finish().await;
        tokio::select! {
            _again = hythe.accept() => panic!("asked again"),
            never = published.keep() => match never {},
            () = sleep(Duration::from_secs(3600)) => {}
        }
    }

    #[tokio::test]
    async fn a_port_of_one_address_leads_to_a_relay_on_the_link() {
        let container = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hythe = FakeHythe::new().await;
        let wanted = wanted("127.0.0.1", container.local_addr().unwrap());
        let (published, asked) = tokio::join!(publish(&hythe, wanted), hythe.grant());
        let published = published.unwrap();
        let port = asked.body.split("127.0.0.1:8000:").nth(1).unwrap().split("/tcp").next().unwrap();
        let port: u16 = port.parse().unwrap();
        let client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let (server, _) = container.accept().await.unwrap();
        drop((client, server, published));
    }

    #[tokio::test]
    async fn what_is_refused_at_first_is_not_asked_for_again() {
        let hythe = FakeHythe::new().await;
        let (published, _asked) = tokio::join!(publish(&hythe, any()), hythe.refuse("no"));
        assert_eq!(published.err().unwrap().to_string(), "no");
    }
}
