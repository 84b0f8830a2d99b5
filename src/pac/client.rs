//! How scripts are asked: one question after the other, each bounded in time, answers kept for a while.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use lru::LruCache;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::policy::proxy::{PacResultError, PacWord, parse_pac_result};

use super::SCRIPT_MAX;
use super::process::Starter;
use super::words::{self, Failure, FromEvaluator, ToEvaluator};

/// How long a script may take for its next word, names apart.
const STEP: Duration = Duration::from_secs(1);
/// How long a name may take.
const NAME: Duration = Duration::from_secs(2);
/// How long a question may take in all, those of the same script before it apart.
const TOTAL: Duration = Duration::from_secs(6);
/// Questions that wait.
const WAITING_MAX: usize = 256;
/// Answers that are kept, and how long: scripts look at the time, and at names.
const KEPT_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);
const KEPT: Duration = Duration::from_secs(30);
/// How long it is kept that there was none: the next connection need not wait for the same time-out.
const KEPT_FAILURE: Duration = Duration::from_secs(3);
/// The longest URL that a script is told as it is, and that an answer is kept for.
const URL_MAX: usize = 1024;

/// How a script's names are resolved.
pub type Resolve = Box<dyn Fn(String) -> Pin<Box<dyn Future<Output = Vec<IpAddr>>>>>;

/// Why a script has not said where a connection goes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PacError {
    /// There is none.
    #[error("there is no PAC script")]
    NoScript,
    /// It is too long.
    #[error("the PAC script has more than {SCRIPT_MAX} bytes")]
    TooLong,
    /// It threw something.
    #[error("the PAC script failed: {}", .0.escape_debug())]
    Threw(String),
    /// It took too long.
    #[error("the PAC script took too long")]
    TimedOut,
    /// It has no function to ask.
    #[error("the PAC script has no function FindProxyForURL")]
    NoFunction,
    /// It said something else than text.
    #[error("the PAC script gave something that is no text")]
    NotText,
    /// It said something that means nothing.
    #[error("the PAC script gave what means nothing: {0}")]
    Result(#[from] PacResultError),
    /// Its process has ended.
    #[error("the PAC script brought its process to an end")]
    Died,
    /// There can be no process for it.
    #[error("no process could be started for the PAC script: {0}")]
    NoProcess(String),
    /// Too many are waiting.
    #[error("{WAITING_MAX} questions wait for the PAC script already")]
    Busy,
}

impl From<Failure> for PacError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Threw(words) => Self::Threw(words),
            Failure::TimedOut => Self::TimedOut,
            Failure::NoFunction => Self::NoFunction,
            Failure::NotText => Self::NotText,
            Failure::TooLong => Self::Result(PacResultError::TooLong),
        }
    }
}

type Answer = Result<Vec<PacWord>, PacError>;

/// A PAC script, and who evaluates it. Clones are the same.
#[derive(Clone)]
pub struct Pac(Rc<Inner>);

struct Inner {
    starter: Starter,
    resolve: Resolve,
    script: RefCell<Option<Rc<str>>>,
    /// The evaluator, while nobody asks it.
    idle: Mutex<Option<Evaluator>>,
    waiting: Cell<usize>,
    kept: RefCell<LruCache<(String, String), (Instant, Answer)>>,
}

struct Evaluator {
    stream: UnixStream,
    /// What it has loaded.
    script: Rc<str>,
    /// Whether it has answered: if it ends before, it will end again.
    has_answered: bool,
}

/// A question's place among those that wait.
struct Waiting<'w>(&'w Cell<usize>);

impl<'w> Waiting<'w> {
    fn new(count: &'w Cell<usize>) -> Result<Self, PacError> {
        if count.get() == WAITING_MAX {
            return Err(PacError::Busy);
        }
        count.set(count.get() + 1);
        Ok(Self(count))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Pac {
    /// Without a script yet.
    pub fn new(starter: Starter, resolve: Resolve) -> Self {
        Self(Rc::new(Inner {
            starter,
            resolve,
            script: RefCell::new(None),
            idle: Mutex::new(None),
            waiting: Cell::new(0),
            kept: RefCell::new(LruCache::new(KEPT_MAX)),
        }))
    }

    /// Takes a script in place of the one before, if it can be run. The same one again changes nothing.
    pub async fn load(&self, text: &str) -> Result<(), PacError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        if text.len() > SCRIPT_MAX {
            return Err(PacError::TooLong);
        }
        if self.0.script.borrow().as_deref() == Some(text) {
            return Ok(());
        }
        let script: Rc<str> = text.into();
        let mut idle = self.0.idle.lock().await;
        *idle = None;
        let loaded = timeout(TOTAL, self.0.load(&script)).await.unwrap_or(Err(PacError::TimedOut));
        if loaded.is_err() {
            self.0.starter.end();
        }
        *idle = Some(loaded?);
        self.0.script.replace(Some(script));
        self.0.kept.borrow_mut().clear();
        Ok(())
    }

    /// Forgets the script.
    pub async fn unload(&self) {
        self.0.script.replace(None);
        self.0.kept.borrow_mut().clear();
        *self.0.idle.lock().await = None;
    }

    /// Where a URL goes: at least one word, to be tried in their order. `host` is its host, as the guest named it. Of what is
    /// encrypted the script learns the host alone.
    pub async fn find(&self, url: &str, host: &str) -> Answer {
        let url = visible(url);
        let key = (url, host.to_string());
        if let Some(answer) = self.0.known(&key) {
            return answer;
        }
        let _waiting = Waiting::new(&self.0.waiting)?;
        let mut idle = self.0.idle.lock().await;
        // Somebody may have asked the same before.
        if let Some(answer) = self.0.known(&key) {
            return answer;
        }
        let script = self.0.script.borrow().clone().ok_or(PacError::NoScript)?;
        // Not in its place while it is asked: a question that is given up takes the evaluator with it.
        let evaluator = idle.take().filter(|evaluator| Rc::ptr_eq(&evaluator.script, &script));
        let asked = timeout(TOTAL, self.0.ask(evaluator, &script, &key)).await;
        let (evaluator, answer) = asked.unwrap_or((None, Err(PacError::TimedOut)));
        if evaluator.is_none() {
            // It may still compute.
            self.0.starter.end();
        }
        *idle = evaluator;
        let is_current = self.0.script.borrow().as_ref().is_some_and(|current| Rc::ptr_eq(current, &script));
        if is_current && key.0.len() + key.1.len() <= 2 * URL_MAX {
            self.0.kept.borrow_mut().put(key, (Instant::now(), answer.clone()));
        }
        answer
    }
}

impl Inner {
    fn known(&self, key: &(String, String)) -> Option<Answer> {
        let mut kept = self.kept.borrow_mut();
        let (at, answer) = kept.get(key)?;
        let lifetime = if answer.is_ok() { KEPT } else { KEPT_FAILURE };
        (at.elapsed() < lifetime).then(|| answer.clone())
    }

    async fn ask(
        &self,
        evaluator: Option<Evaluator>,
        script: &Rc<str>,
        (url, host): &(String, String),
    ) -> (Option<Evaluator>, Answer) {
        let mut evaluator = evaluator;
        let question = ToEvaluator::Find { url: url.clone(), host: host.clone(), own: own_addresses() };
        loop {
            let mut current = match evaluator.take() {
                Some(evaluator) => evaluator,
                None => match self.load(script).await {
                    Ok(evaluator) => evaluator,
                    Err(error) => return (None, Err(error)),
                },
            };
            match self.converse(&mut current.stream, &question).await {
                Ok(FromEvaluator::Found(text)) => {
                    current.has_answered = true;
                    return (Some(current), parse_pac_result(&text).map_err(PacError::from));
                }
                Ok(FromEvaluator::Failed(Failure::TimedOut)) => return (None, Err(PacError::TimedOut)),
                Ok(FromEvaluator::Failed(failure)) => {
                    current.has_answered = true;
                    return (Some(current), Err(failure.into()));
                }
                // It may have been at the end of its time.
                Err(PacError::Died) if current.has_answered => {}
                Err(error) => return (None, Err(error)),
                Ok(FromEvaluator::Loaded | FromEvaluator::Resolve(_)) => return (None, Err(PacError::Died)),
            }
        }
    }

    /// An evaluator that has loaded a script.
    async fn load(&self, script: &Rc<str>) -> Result<Evaluator, PacError> {
        let none = |error: io::Error| PacError::NoProcess(error.to_string());
        let stream = self.starter.start().map_err(none)?;
        stream.set_nonblocking(true).map_err(none)?;
        let mut stream = UnixStream::from_std(stream).map_err(none)?;
        match self.converse(&mut stream, &ToEvaluator::Load(script.to_string())).await? {
            FromEvaluator::Loaded => Ok(Evaluator { stream, script: script.clone(), has_answered: false }),
            FromEvaluator::Failed(failure) => Err(failure.into()),
            FromEvaluator::Found(_) | FromEvaluator::Resolve(_) => Err(PacError::Died),
        }
    }

    /// Says something, and resolves names until there is an answer.
    async fn converse(&self, stream: &mut UnixStream, word: &ToEvaluator) -> Result<FromEvaluator, PacError> {
        self.send(stream, word).await?;
        loop {
            let said = timeout(STEP, words::receive_async(stream)).await.map_err(|_| PacError::TimedOut)?;
            match said.map_err(|_| PacError::Died)? {
                FromEvaluator::Resolve(name) => {
                    let addresses = timeout(NAME, (self.resolve)(name)).await.unwrap_or_default();
                    self.send(stream, &ToEvaluator::Resolved(addresses)).await?;
                }
                answer => return Ok(answer),
            }
        }
    }

    async fn send(&self, stream: &mut UnixStream, word: &ToEvaluator) -> Result<(), PacError> {
        let sent = timeout(STEP, words::send_async(stream, word)).await.map_err(|_| PacError::TimedOut)?;
        sent.map_err(|_| PacError::Died)
    }
}

/// What a script may know of a URL: nobody's credentials, no fragment, and of what is encrypted no path. Of a very long one it
/// learns no path either.
fn visible(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.chars().take(URL_MAX).collect() };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
    let path = path.split('#').next().unwrap_or_default();
    let is_plain = scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("ws");
    let path = if is_plain && path.len() <= URL_MAX { path } else { "" };
    let slash = if path.starts_with('/') { "" } else { "/" };
    format!("{scheme}://{place}{slash}{path}")
}

/// The addresses by which the host reaches the world. Connecting a datagram socket chooses one, and sends nothing.
fn own_addresses() -> Vec<IpAddr> {
    let of = |from: IpAddr, to: IpAddr| {
        let socket = UdpSocket::bind(SocketAddr::new(from, 0)).ok()?;
        socket.connect(SocketAddr::new(to, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    let v4 = of(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into());
    let v6 = of(Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into());
    v4.into_iter().chain(v6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::Process;
    use crate::pac::process::{Limit, start};
    use crate::sandbox::{self, Thread};

    /// A script's answers, as text; evaluated by processes as limited as those of a running hythe.
    struct Bench {
        pac: Pac,
        asked: Rc<RefCell<Vec<String>>>,
        process: Process,
    }

    fn limited(limit: Limit) -> io::Result<()> {
        let thread = match limit {
            Limit::Starter => Thread::PacStarter,
            Limit::Evaluator => Thread::PacEvaluator,
        };
        if limit == Limit::Starter {
            sandbox::drop_capabilities(&[]).map_err(io::Error::other)?;
            sandbox::shut_files(&[], &[]).map_err(io::Error::other)?;
        }
        sandbox::limit_system_calls(thread).map_err(io::Error::other)
    }

    impl Bench {
        fn new() -> Self {
            let (starter, process) = start(limited).unwrap();
            let asked: Rc<RefCell<Vec<String>>> = Rc::default();
            let log = asked.clone();
            let resolve: Resolve = Box::new(move |name| {
                log.borrow_mut().push(name.clone());
                Box::pin(async move {
                    match name.as_str() {
                        "silent.example" => std::future::pending().await,
                        "in.example" => vec!["10.0.0.7".parse().unwrap()],
                        _ => Vec::new(),
                    }
                })
            });
            Self { pac: Pac::new(starter, resolve), asked, process }
        }

        async fn find(&self, url: &str) -> Result<String, PacError> {
            let host = url.split('/').nth(2).unwrap();
            let shown = |word: PacWord| match word {
                PacWord::Direct => "DIRECT".to_string(),
                PacWord::Via(proxy) => proxy.to_string(),
            };
            let words = self.pac.find(url, host).await?;
            Ok(words.into_iter().map(shown).collect::<Vec<_>>().join(" "))
        }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(future)
    }

    #[test]
    fn a_script_is_asked_in_its_own_process() {
        run(async {
            let bench = Bench::new();
            assert_eq!(bench.find("http://a.test/").await, Err(PacError::NoScript));
            let script = "\u{feff}function FindProxyForURL(url, host) { \
                if (isInNet(host, '10.0.0.0', '255.0.0.0')) return 'DIRECT'; \
                if (url == 'http://a.test/x?y') return 'PROXY x:1; DIRECT'; \
                if (url == 'https://b.test/') return 'SOCKS b'; \
                if (host == 'own.test') return 'PROXY ' + myIpAddress(); \
                return new Date().getFullYear() > 2000 ? 'HTTPS c' : 'DIRECT'; }";
            bench.pac.load(script).await.unwrap();
            assert_eq!(bench.find("http://in.example/").await.unwrap(), "DIRECT");
            assert_eq!(bench.find("http://a.test/x?y#z").await.unwrap(), "http://x:1 DIRECT");
            assert_eq!(bench.find("https://b.test/secret?token").await.unwrap(), "socks5h://b:1080");
            assert_eq!(bench.find("http://user:password@c.test/").await.unwrap(), "https://c:443");
            assert!(bench.find("http://own.test/").await.unwrap().starts_with("http://"));
            assert_eq!(bench.asked.borrow()[0], "in.example");
            bench.pac.unload().await;
            assert_eq!(bench.find("http://a.test/").await, Err(PacError::NoScript));
        });
    }

    #[test]
    fn answers_are_kept_for_a_while() {
        run(async {
            let bench = Bench::new();
            bench
                .pac
                .load("var n = 0; function FindProxyForURL(url, host) { return 'PROXY p:' + ++n; }")
                .await
                .unwrap();
            assert_eq!(bench.find("https://a.test/1").await.unwrap(), "http://p:1");
            assert_eq!(bench.find("https://a.test/2").await.unwrap(), "http://p:1");
            assert_eq!(bench.find("http://a.test/1").await.unwrap(), "http://p:2");
            assert_eq!(bench.find("http://a.test/2").await.unwrap(), "http://p:3");
            tokio::time::pause();
            tokio::time::advance(KEPT).await;
            tokio::time::resume();
            assert_eq!(bench.find("https://a.test/3").await.unwrap(), "http://p:4");
            bench.pac.load("function FindProxyForURL() { return 'PROXY q' }").await.unwrap();
            assert_eq!(bench.find("https://a.test/3").await.unwrap(), "http://q:80");
        });
    }

    #[test]
    fn a_script_that_ends_its_process_costs_an_error_and_no_more() {
        run(async {
            let bench = Bench::new();
            bench
                .pac
                .load(
                    "function FindProxyForURL(url, host) { if (host == 'loop.test') for (;;) {} \
                       if (host == 'name.test') dnsResolve('silent.example'); \
                       if (host == 'throw.test') throw 'no'; \
                       if (host == 'word.test') return 'GO AWAY'; \
                       if (host == 'native.test') return new Array(1 << 30).join('x'); \
                       if (host == 'bomb.test') { var a = []; for (;;) a.push(new ArrayBuffer(100000)); } \
                       return 'DIRECT' }",
                )
                .await
                .unwrap();
            for (url, said) in [
                ("http://loop.test/", "took too long"),
                // What the engine cannot bound: one step of its own, of half a minute.
                ("http://native.test/", "took too long"),
                ("http://throw.test/", "failed: no"),
                ("http://word.test/", "'GO AWAY' is none of"),
                ("http://bomb.test/", "out of memory"),
            ] {
                let begun = Instant::now();
                let error = bench.find(url).await.unwrap_err().to_string();
                assert!(error.contains(said), "{url}: {error}");
                assert_eq!(bench.find(url).await.unwrap_err().to_string(), error, "kept");
                assert_eq!(bench.find(&format!("http://{}.ok/", url.len())).await.unwrap(), "DIRECT");
                assert!(begun.elapsed() < TOTAL, "{url}");
            }
            // A name that nobody answers has no address.
            assert_eq!(bench.find("http://name.test/").await.unwrap(), "DIRECT");
        });
    }

    /// Whether the process at the other end of an evaluator's socket has ended.
    async fn has_ended(stream: std::os::unix::net::UnixStream) -> bool {
        stream.set_nonblocking(true).unwrap();
        let mut stream = UnixStream::from_std(stream).unwrap();
        let said = words::receive_async::<FromEvaluator>(&mut stream);
        timeout(Duration::from_secs(20), said).await.is_ok_and(|said| said.is_err())
    }

    #[test]
    fn the_kernel_ends_an_evaluator_that_the_engine_cannot_stop() {
        run(async {
            let bench = Bench::new();
            let mut stream = bench.pac.0.starter.start().unwrap();
            words::send(&mut stream, &ToEvaluator::Load("new Array(1 << 30).join('x')".into())).unwrap();
            assert!(has_ended(stream).await, "it has two seconds");
        });
    }

    #[test]
    fn an_evaluator_believes_nothing() {
        run(async {
            let bench = Bench::new();
            for word in [
                ToEvaluator::Resolved(Vec::new()),
                ToEvaluator::Find { url: String::new(), host: String::new(), own: Vec::new() },
            ] {
                let mut stream = bench.pac.0.starter.start().unwrap();
                words::send(&mut stream, &word).unwrap();
                assert!(has_ended(stream).await);
            }
        });
    }

    #[test]
    fn an_evaluator_that_was_killed_is_replaced() {
        run(async {
            let bench = Bench::new();
            bench.pac.load("function FindProxyForURL() { return 'DIRECT' }").await.unwrap();
            assert_eq!(bench.find("http://a.test/").await.unwrap(), "DIRECT");
            // The starter ends the one that is there.
            let other = bench.pac.0.starter.start().unwrap();
            assert_eq!(bench.find("http://b.test/").await.unwrap(), "DIRECT");
            drop(other);
            assert_eq!(bench.find("http://c.test/").await.unwrap(), "DIRECT");
        });
    }

    #[test]
    fn a_question_that_is_given_up_spoils_no_other() {
        run(async {
            let bench = Bench::new();
            bench
                .pac
                .load("function FindProxyForURL(url, host) { dnsResolve('silent.example'); return 'PROXY ' + host }")
                .await
                .unwrap();
            let given_up = timeout(Duration::from_millis(50), bench.find("http://a.test/")).await;
            assert!(given_up.is_err());
            assert_eq!(bench.find("http://b.test/").await.unwrap(), "http://b.test:80");
            assert_eq!(bench.pac.0.waiting.get(), 0);
        });
    }

    #[test]
    fn a_script_that_cannot_be_run_is_not_taken() {
        run(async {
            let bench = Bench::new();
            bench.pac.load("function FindProxyForURL() { return 'PROXY p' }").await.unwrap();
            for (script, said) in
                [("<html>", "failed: "), ("for (;;) {}", "took too long"), ("throw 'x'", "failed: x")]
            {
                let error = bench.pac.load(script).await.unwrap_err().to_string();
                assert!(error.contains(said), "{script}: {error}");
            }
            let long = "/".repeat(SCRIPT_MAX + 1);
            assert_eq!(bench.pac.load(&long).await, Err(PacError::TooLong));
            assert_eq!(
                bench.find("http://a.test/").await.unwrap(),
                "http://p:80",
                "the one before is still there"
            );
            let long = format!(
                "function FindProxyForURL() {{ return 'PROXY q' }} //{}",
                "é".repeat(SCRIPT_MAX / 2 - 60)
            );
            bench.pac.load(&long).await.unwrap();
            assert_eq!(bench.find("http://a.test/").await.unwrap(), "http://q:80");
        });
    }

    #[test]
    fn a_starter_that_is_gone_is_said() {
        run(async {
            let Bench { pac, process, .. } = Bench::new();
            drop(process);
            let error = pac.load("function FindProxyForURL() {}").await.unwrap_err();
            assert!(matches!(error, PacError::NoProcess(_)), "{error}");
        });
    }

    #[test]
    fn a_script_learns_no_secrets() {
        let long = format!("http://a.test/{}", "x".repeat(URL_MAX));
        for (url, expected) in [
            ("http://a.test/x?y#z", "http://a.test/x?y"),
            ("http://a.test", "http://a.test/"),
            ("http://a.test?x", "http://a.test/?x"),
            ("http://u:p@a.test:80/", "http://a.test:80/"),
            ("https://u:p@a.test:8443/x?y#z", "https://a.test:8443/"),
            ("https://[::1]/x", "https://[::1]/"),
            ("wss://a.test/x", "wss://a.test/"),
            ("http://a.test/x@y", "http://a.test/x@y"),
            (&long, "http://a.test/"),
            ("a.test:443", "a.test:443"),
        ] {
            assert_eq!(visible(url), expected, "{url}");
        }
    }
}
