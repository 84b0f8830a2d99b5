//! The proxy's configuration script (PAC): where it comes from, and when it is read again.
//!
//! A script in a file comes with the settings. One at a URL is fetched when the first connection asks for it, again after a while, and when
//! the host's network has changed: another network may have another script under the same name. It is fetched as the host would
//! fetch it, by no proxy. A fetch that fails leaves the script as it was, if there was one.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::sync::Mutex;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

use super::http::HEAD_MAX;
use super::{addresses_of_host, dial};
use crate::pac::{Pac, PacError, SCRIPT_MAX, Starter};
use crate::policy::addresses::Addresses;
use crate::policy::proxy::{PacSource, PacWord};
use crate::slow::current_addresses::CurrentAddresses;
use crate::slow::dns::Dns;

/// How long a fetch may take.
const FETCH: Duration = Duration::from_secs(10);

/// How long a script that was fetched holds.
const FRESH: Duration = Duration::from_mins(30);

/// How long after a fetch that failed the next one waits.
const PAUSE: Duration = Duration::from_secs(10);

/// Why a script says nothing.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// Nothing evaluates scripts.
    #[error("this hythe evaluates no scripts")]
    None,
    /// It does not say what it should.
    #[error(transparent)]
    Pac(#[from] PacError),
    /// It takes too long.
    #[error("it does not answer in time")]
    Silent,
    /// It cannot be had.
    #[error("it cannot be fetched ({0})")]
    Fetch(String),
}

/// The script in use.
pub struct Script {
    pac: Option<Pac>,
    dns: Dns,
    current: Rc<CurrentAddresses>,
    state: RefCell<State>,
    /// Held by who fetches or loads.
    turn: Mutex<()>,
}

#[derive(Default)]
struct State {
    source: Option<PacSource>,
    /// The text of one that is a file.
    text: Option<String>,
    /// When it is to be had again; nothing for one that is there and lasts.
    due: Option<Instant>,
    /// Tells one set of these from the next.
    generation: u64,
}

impl Script {
    /// What evaluates scripts, if anything does.
    pub fn new(starter: Option<Starter>, dns: Dns, current: Rc<CurrentAddresses>) -> Self {
        let resolver = dns.clone();
        let pac = starter.map(|starter| {
            Pac::new(
                starter,
                Box::new(move |name: String| {
                    let dns = resolver.clone();
                    Box::pin(async move { dns.addresses_of(&name).await })
                }),
            )
        });
        Self { pac, dns, current, state: RefCell::default(), turn: Mutex::default() }
    }

    /// Another script, or none, for the next question.
    pub fn expect(&self, source: Option<PacSource>, text: Option<String>) {
        self.replace(source, text);
    }

    fn replace(&self, source: Option<PacSource>, text: Option<String>) -> State {
        let due = source.is_some().then(Instant::now);
        let generation = self.state.borrow().generation + 1;
        self.state.replace(State { source, text, due, generation })
    }

    /// Another script, or none, if it can be had now.
    pub async fn set(&self, source: Option<PacSource>, text: Option<String>) -> Result<(), ScriptError> {
        if source.is_none() {
            self.expect(None, None);
            if let Some(pac) = &self.pac {
                pac.unload().await;
            }
            return Ok(());
        }
        let before = self.replace(source, text);
        let loaded = self.load().await;
        if loaded.is_err() {
            self.replace(before.source, before.text);
        }
        loaded
    }

    /// What lies at a URL may be another script now.
    pub fn network_has_changed(&self) {
        let mut state = self.state.borrow_mut();
        if matches!(state.source, Some(PacSource::Http(_))) {
            state.due = Some(Instant::now());
        }
    }

    /// What the script says of a URL.
    pub async fn find(&self, url: &str, host: &str) -> Result<Vec<PacWord>, ScriptError> {
        let pac = self.pac.as_ref().ok_or(ScriptError::None)?;
        if self.is_due() {
            match self.load().await {
                Ok(()) => {}
                // One that was had before may still do.
                Err(error @ ScriptError::Fetch(_)) => {
                    let found = pac.find(url, host).await;
                    return found.map_err(|_| error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(pac.find(url, host).await?)
    }

    fn is_due(&self) -> bool {
        self.state.borrow().due.is_some_and(|at| at <= Instant::now())
    }

    async fn load(&self) -> Result<(), ScriptError> {
        let pac = self.pac.as_ref().ok_or(ScriptError::None)?;
        let _turn = self.turn.lock().await;
        // Another script may be set while this one is fetched: then that one counts.
        while self.is_due() {
            let (source, text, generation) = {
                let state = self.state.borrow();
                (state.source.clone(), state.text.clone(), state.generation)
            };
            let (had, next) = match source {
                Some(PacSource::Http(url)) => {
                    let fetched = timeout(FETCH, fetch(&url, &self.dns, &self.current.get())).await;
                    let fetched = fetched.unwrap_or_else(|_| Err("there is no answer".into()));
                    (fetched.map_err(ScriptError::Fetch), Some(Instant::now() + FRESH))
                }
                Some(PacSource::File(_)) => (Ok(text.unwrap_or_default()), None),
                None => return Ok(()),
            };
            if self.state.borrow().generation != generation {
                continue;
            }
            let loaded = match had {
                Ok(text) => pac.load(&text).await.map_err(ScriptError::Pac),
                Err(error) => Err(error),
            };
            let mut state = self.state.borrow_mut();
            if state.generation == generation {
                state.due = if loaded.is_ok() { next } else { Some(Instant::now() + PAUSE) };
                return loaded;
            }
        }
        Ok(())
    }
}

async fn fetch(url: &str, dns: &Dns, rules: &Addresses) -> Result<String, String> {
    fn words(error: impl std::fmt::Display) -> String {
        error.to_string()
    }
    let uri: Uri = url.parse().map_err(words)?;
    let authority = uri.authority().ok_or("the URL names no host")?;
    let addresses = addresses_of_host(authority.host(), authority.port_u16().unwrap_or(80), dns).await;
    let stream = dial::connect(&addresses, rules).await.map_err(words)?;
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(HEAD_MAX).handshake(TokioIo::new(stream)).await.map_err(words)?;
    spawn_local(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path).header(HOST, authority.as_str());
    let request = request.body(Empty::<Bytes>::new()).map_err(words)?;
    let response = sender.send_request(request).await.map_err(words)?;
    if response.status() != StatusCode::OK {
        return Err(format!("the server says {}", response.status()));
    }
    let body = Limited::new(response.into_body(), SCRIPT_MAX).collect().await.map_err(words)?;
    String::from_utf8(body.to_bytes().into()).map_err(|_| "it is no text in UTF-8".into())
}
