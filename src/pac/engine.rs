//! One script in one engine: QuickJS with bounds, and the functions that scripts call.
//!
//! The engine's own bounds end a script that is only JavaScript. The process around it has bounds of its own, for what the engine
//! might get wrong.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::time::Duration;

use ipnet::IpNet;
use nix::time::{ClockId, clock_gettime};
use rquickjs::context::EvalOptions;
use rquickjs::{CatchResultExt, CaughtError, Context, Ctx, Function, Object, Runtime, Value};

use crate::policy::proxy::PAC_RESULT_MAX;
use crate::policy::target::{host_address, host_name};

use super::words::Failure;

/// What a script may hold. The largest scripts that companies have take a few MiB.
const MEMORY_MAX: usize = 32 << 20;
/// How deep it may call.
const STACK_MAX: usize = 512 << 10;
/// How long it may compute, at its start and for each question.
const CPU_MAX: Duration = Duration::from_millis(500);
/// Names that are resolved for one question; the rest have no addresses.
const NAMES_MAX: usize = 16;
/// Addresses of one name that count.
const ADDRESSES_MAX: usize = 32;
/// What is kept of what a script throws.
const WORDS_MAX: usize = 300;

const LIBRARY: &str = include_str!("library.js");

/// What lies outside the engine.
pub trait World {
    /// The addresses of a name; a name in small letters.
    fn resolve(&self, name: &str) -> Vec<IpAddr>;
}

/// An engine.
pub struct Engine {
    context: Context,
    limits: Rc<Limits>,
    names: Rc<Names>,
    // Last: the context belongs to it.
    _runtime: Runtime,
}

/// How long the script may go on.
#[derive(Default)]
struct Limits {
    /// In time of the processor.
    until: Cell<Duration>,
    is_over: Cell<bool>,
}

impl Limits {
    fn begin(&self) {
        self.until.set(cpu_time() + CPU_MAX);
        self.is_over.set(false);
    }

    fn check(&self) -> bool {
        if cpu_time() > self.until.get() {
            self.is_over.set(true);
        }
        self.is_over.get()
    }
}

/// What this thread has computed. A clock that cannot be read has run out.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::MAX, Duration::from)
}

/// Names, during one question.
struct Names {
    world: Box<dyn World>,
    known: RefCell<BTreeMap<String, Vec<IpAddr>>>,
    own: RefCell<Vec<IpAddr>>,
}

impl Names {
    fn begin(&self, own: Vec<IpAddr>) {
        self.known.borrow_mut().clear();
        self.own.replace(own);
    }

    fn resolve(&self, host: &str) -> Vec<IpAddr> {
        if let Some(address) = host_address(host) {
            return vec![address];
        }
        let Some(name) = host_name(host) else { return Vec::new() };
        if let Some(known) = self.known.borrow().get(&name) {
            return known.clone();
        }
        if self.known.borrow().len() == NAMES_MAX {
            return Vec::new();
        }
        let mut addresses = self.world.resolve(&name);
        addresses.truncate(ADDRESSES_MAX);
        self.known.borrow_mut().insert(name, addresses.clone());
        addresses
    }
}

impl Engine {
    /// An engine with the functions of PAC in it. `None` where memory does not suffice.
    pub fn new(world: impl World + 'static) -> Option<Self> {
        Self::with_clock(world, "() => new Date()")
    }

    fn with_clock(world: impl World + 'static, now: &str) -> Option<Self> {
        let runtime = Runtime::new().ok()?;
        runtime.set_memory_limit(MEMORY_MAX);
        runtime.set_max_stack_size(STACK_MAX);
        let limits = Rc::new(Limits::default());
        let interrupts = limits.clone();
        runtime.set_interrupt_handler(Some(Box::new(move || interrupts.check())));
        let context = Context::full(&runtime).ok()?;
        let names =
            Rc::new(Names { world: Box::new(world), known: RefCell::default(), own: RefCell::default() });
        limits.begin();
        let ready = context.with(|ctx| {
            let library: Function<'_> = ctx.eval(LIBRARY)?;
            let now: Function<'_> = ctx.eval(now)?;
            library.call::<_, ()>((natives(&ctx, &names)?, now))
        });
        ready.ok()?;
        Some(Self { context, limits, names, _runtime: runtime })
    }

    /// Has the C library read which time zone this is, as long as it can.
    pub fn learn_time_zone() {
        struct Nobody;
        impl World for Nobody {
            fn resolve(&self, _: &str) -> Vec<IpAddr> {
                Vec::new()
            }
        }
        if let Some(engine) = Self::new(Nobody) {
            // Whatever hour it is.
            let _ = engine.load("new Date().getHours()");
        }
    }

    /// Runs the script, which then can be asked.
    pub fn load(&self, script: &str) -> Result<(), Failure> {
        self.begin(Vec::new());
        self.context.with(|ctx| {
            let mut options = EvalOptions::default();
            // Scripts are older than strict mode.
            options.strict = false;
            let run = ctx.eval_with_options::<Value<'_>, _>(script, options).catch(&ctx);
            run.map_err(|error| self.failure(error)).map(drop)
        })
    }

    /// What the script says about a URL.
    pub fn find(&self, url: &str, host: &str, own: Vec<IpAddr>) -> Result<String, Failure> {
        self.begin(own);
        self.context.with(|ctx| {
            let globals = ctx.globals();
            let function = ["FindProxyForURL", "FindProxyForURLEx"]
                .into_iter()
                .find_map(|name| globals.get::<_, Function<'_>>(name).ok())
                .ok_or(Failure::NoFunction)?;
            let said: Value<'_> =
                function.call((url, host)).catch(&ctx).map_err(|error| self.failure(error))?;
            // Netscape: "if the string is null, no proxies should be used".
            if said.is_null() {
                return Ok(String::new());
            }
            let text = said.as_string().ok_or(Failure::NotText)?.to_string().map_err(|_| Failure::NotText)?;
            if text.len() > PAC_RESULT_MAX { Err(Failure::TooLong) } else { Ok(text) }
        })
    }

    fn begin(&self, own: Vec<IpAddr>) {
        self.limits.begin();
        self.names.begin(own);
    }

    fn failure(&self, error: CaughtError<'_>) -> Failure {
        if self.limits.is_over.get() {
            return Failure::TimedOut;
        }
        let words = match error {
            CaughtError::Exception(exception) => exception.message(),
            CaughtError::Value(value) => value.as_string().and_then(|text| text.to_string().ok()),
            CaughtError::Error(error) => Some(error.to_string()),
        };
        // Reading what was thrown may have run the script again.
        if self.limits.is_over.get() {
            return Failure::TimedOut;
        }
        let words = words.unwrap_or_else(|| "something that is no text".to_string());
        Failure::Threw(words.chars().take(WORDS_MAX).collect())
    }
}

/// What scripts get done outside.
fn natives<'js>(ctx: &Ctx<'js>, names: &Rc<Names>) -> rquickjs::Result<Object<'js>> {
    let native = Object::new(ctx.clone())?;
    let shown = |list: Vec<IpAddr>| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (resolver, own) = (names.clone(), names.clone());
    native.set("resolve", Function::new(ctx.clone(), move |host: String| shown(resolver.resolve(&host)))?)?;
    native.set("own", Function::new(ctx.clone(), move || shown(own.own.borrow().clone()))?)?;
    native.set(
        "matches",
        Function::new(ctx.clone(), |text: String, pattern: String| matches(&text, &pattern))?,
    )?;
    native.set(
        "isInNet",
        Function::new(ctx.clone(), |address: String, network: String, mask: String| {
            is_in_net(&address, &network, &mask)
        })?,
    )?;
    native.set(
        "isInPrefix",
        Function::new(ctx.clone(), |address: String, prefix: String| is_in_prefix(&address, &prefix))?,
    )?;
    native.set("sort", Function::new(ctx.clone(), |list: String| sorted(&list))?)?;
    Ok(native)
}

/// Whether a text is what a pattern says: `*` for any letters, `?` for one. In time that grows with the product of the lengths, at
/// the worst.
fn matches(text: &str, pattern: &str) -> bool {
    let (text, pattern): (Vec<char>, Vec<char>) = (text.chars().collect(), pattern.chars().collect());
    let (mut at, mut of) = (0, 0);
    // Behind the last asterisk, and where it has been taken to end.
    let mut asterisk = None;
    while at < text.len() {
        match pattern.get(of) {
            Some('*') => {
                asterisk = Some((of + 1, at));
                of += 1;
            }
            Some(letter) if *letter == '?' || *letter == text[at] => {
                at += 1;
                of += 1;
            }
            _ => {
                let Some((behind, end)) = asterisk else { return false };
                asterisk = Some((behind, end + 1));
                (at, of) = (end + 1, behind);
            }
        }
    }
    pattern[of..].iter().all(|letter| *letter == '*')
}

/// Whether an address is one of a network, by a mask that may have holes.
fn is_in_net(address: &str, network: &str, mask: &str) -> bool {
    let bits = |text: &str| text.trim().parse::<Ipv4Addr>().map(Ipv4Addr::to_bits).ok();
    let (Some(address), Some(network), Some(mask)) = (bits(address), bits(network), bits(mask)) else {
        return false;
    };
    address & mask == network & mask
}

fn is_in_prefix(address: &str, prefix: &str) -> bool {
    let (Some(address), Ok(prefix)) = (host_address(address.trim()), prefix.trim().parse::<IpNet>()) else {
        return false;
    };
    prefix.contains(&address)
}

/// A list of addresses in the order of Microsoft's function: IPv6 first, each family by number. Empty where one is no address.
fn sorted(list: &str) -> String {
    let addresses: Option<Vec<IpAddr>> = list.split(';').map(|text| host_address(text.trim())).collect();
    let mut addresses = addresses.unwrap_or_default();
    addresses.sort_by_key(|address| (address.is_ipv4(), *address));
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(";")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::time::Instant;

    /// Names that there are, and what was asked for.
    #[derive(Clone, Default)]
    struct Zone(Rc<RefCell<Vec<String>>>);

    impl World for Zone {
        fn resolve(&self, name: &str) -> Vec<IpAddr> {
            self.0.borrow_mut().push(name.to_string());
            let texts: &[&str] = match name {
                "www.corp.example" => &["2001:db8::7", "10.1.2.3"],
                "six.example" => &["2001:db8::6"],
                "www.example.com" => &["198.51.100.80"],
                _ => &[],
            };
            texts.iter().map(|text| text.parse().unwrap()).collect()
        }
    }

    fn engine(script: &str) -> Engine {
        let engine = Engine::new(Zone::default()).unwrap();
        engine.load(script).unwrap();
        engine
    }

    fn ask(engine: &Engine, url: &str) -> Result<String, Failure> {
        let host = url.split('/').nth(2).unwrap().split(':').next().unwrap();
        engine.find(url, host, vec!["2001:db8::1".parse().unwrap(), "10.9.8.7".parse().unwrap()])
    }

    /// What an expression is, as text.
    fn value(expression: &str) -> String {
        let script = format!("function FindProxyForURL(url, host) {{ return String({expression}); }}");
        ask(&engine(&script), "http://www.example.com/").unwrap()
    }

    /// A Wednesday, at a quarter to five in the afternoon by UTC.
    const CLOCK: &str = "() => new Date(Date.UTC(2026, 6, 15, 16, 45, 30))";

    fn at_that_time(expression: &str) -> String {
        let engine = Engine::with_clock(Zone::default(), CLOCK).unwrap();
        engine.load(&format!("function FindProxyForURL() {{ return String({expression}); }}")).unwrap();
        ask(&engine, "http://a.test/").unwrap()
    }

    #[test]
    fn a_companys_script_is_understood() {
        let engine = engine(
            r#"
            // Written by hand, over the years.
            var proxies = "PROXY proxy1.corp.example:3128; PROXY proxy2.corp.example:3128; DIRECT";
            bypass = ["*.corp.example", "*.internal"];
            function FindProxyForURL(url, host)
            {
                host = host.toLowerCase()
                if (isPlainHostName(host) || dnsDomainIs(host, ".intranet.example")) return "DIRECT";
                for (var i in bypass) if (shExpMatch(host, bypass[i])) return "DIRECT";
                var ip = dnsResolve(host);
                if (ip && (isInNet(ip, "10.0.0.0", "255.0.0.0") || isInNet(ip, "192.168.0.0", "255.255.0.0")))
                    return "DIRECT";
                if (url.substring(0, 6) == "https:") return "HTTPS secure.corp.example:443; " + proxies;
                if (isInNet(myIpAddress(), "10.9.0.0", "255.255.0.0")) return "SOCKS5 branch.example:1080";
                return proxies;
            }
            "#,
        );
        let proxies = "PROXY proxy1.corp.example:3128; PROXY proxy2.corp.example:3128; DIRECT";
        for (url, expected) in [
            ("http://intranet/", "DIRECT"),
            ("http://wiki.intranet.example/", "DIRECT"),
            ("http://WWW.Corp.Example/", "DIRECT"),
            ("http://www.example.com/x", "SOCKS5 branch.example:1080"),
            ("https://www.example.com/", &format!("HTTPS secure.corp.example:443; {proxies}")),
            ("http://10.4.4.4/", "DIRECT"),
            ("http://nowhere.example/", "SOCKS5 branch.example:1080"),
        ] {
            assert_eq!(ask(&engine, url).unwrap(), expected, "{url}");
        }
    }

    #[test]
    fn each_function_says_what_it_is_documented_to_say() {
        for (expression, expected) in [
            ("isPlainHostName('www')", "true"),
            ("isPlainHostName('www.example.com')", "false"),
            ("isPlainHostName('::1')", "false"),
            ("dnsDomainIs('www.Example.com', '.example.com')", "true"),
            ("dnsDomainIs('www', '.example.com')", "false"),
            ("localHostOrDomainIs('www.example.com', 'www.example.com')", "true"),
            ("localHostOrDomainIs('www', 'www.example.com')", "true"),
            ("localHostOrDomainIs('www.corp.example', 'www.example.com')", "false"),
            ("localHostOrDomainIs('home.example.com', 'www.example.com')", "false"),
            ("isResolvable('www.example.com')", "true"),
            ("isResolvable('bogus.example.com')", "false"),
            ("isResolvable('six.example')", "false"),
            ("isResolvableEx('six.example')", "true"),
            ("isInNet('198.51.100.80', '198.51.100.80', '255.255.255.255')", "true"),
            ("isInNet('www.corp.example', '10.1.0.0', '255.255.0.0')", "true"),
            ("isInNet('www.corp.example', '10.2.0.0', '255.255.0.0')", "false"),
            ("isInNet('www.corp.example', '10.0.2.0', '255.0.255.0')", "true"),
            ("isInNet('bogus.example', '0.0.0.0', '0.0.0.0')", "false"),
            ("isInNet('10.0.0.1', 'x', '255.0.0.0')", "false"),
            ("dnsResolve('www.example.com')", "198.51.100.80"),
            ("dnsResolve('www.corp.example')", "10.1.2.3"),
            ("dnsResolve('192.0.2.9')", "192.0.2.9"),
            ("dnsResolve('six.example')", "null"),
            ("dnsResolveEx('www.corp.example')", "2001:db8::7;10.1.2.3"),
            ("dnsResolveEx('bogus.example')", ""),
            ("convert_addr('104.16.41.2')", "1745889538"),
            ("convert_addr('255.255.255.255')", "-1"),
            ("convert_addr('x')", "0"),
            ("myIpAddress()", "10.9.8.7"),
            ("myIpAddressEx()", "2001:db8::1;10.9.8.7"),
            ("dnsDomainLevels('www')", "0"),
            ("dnsDomainLevels('www.example.com')", "2"),
            ("shExpMatch('http://home.example.com/people/ari/index.html', '*/ari/*')", "true"),
            ("shExpMatch('http://home.example.com/people/montulli/index.html', '*/ari/*')", "false"),
            ("isInNetEx('2001:db8:1::5', '2001:db8::/32')", "true"),
            ("isInNetEx('10.1.2.3', '10.1.0.0/16')", "true"),
            ("isInNetEx('10.1.2.3', '10.2.0.0/16')", "false"),
            ("isInNetEx('x', 'y')", "false"),
            (
                "sortIpAddressList('10.2.3.9;2001:4898:28:3:201:2ff:feea:fc14;::1;127.0.0.1;::9')",
                "::1;::9;2001:4898:28:3:201:2ff:feea:fc14;10.2.3.9;127.0.0.1",
            ),
            ("sortIpAddressList('x;10.0.0.1')", ""),
            ("getClientVersion()", "1.0"),
            ("alert('here')", "undefined"),
            ("typeof process + typeof require + typeof fetch", "undefinedundefinedundefined"),
        ] {
            assert_eq!(value(expression), expected, "{expression}");
        }
    }

    #[test]
    fn time_is_within_ranges_of_days_dates_and_hours() {
        for (expression, expected) in [
            ("weekdayRange('WED', 'GMT')", "true"),
            ("weekdayRange('MON', 'FRI', 'GMT')", "true"),
            ("weekdayRange('SAT', 'MON', 'GMT')", "false"),
            ("weekdayRange('SAT', 'WED', 'GMT')", "true"),
            ("weekdayRange('wed', 'gmt')", "true"),
            ("weekdayRange('DAY', 'GMT')", "false"),
            ("weekdayRange()", "false"),
            ("dateRange(15, 'GMT')", "true"),
            ("dateRange(16, 'GMT')", "false"),
            ("dateRange(1, 15, 'GMT')", "true"),
            ("dateRange(16, 14, 'GMT')", "false"),
            ("dateRange(20, 15, 'GMT')", "true"),
            ("dateRange('JUL', 'GMT')", "true"),
            ("dateRange('JAN', 'MAR', 'GMT')", "false"),
            ("dateRange('NOV', 'AUG', 'GMT')", "true"),
            ("dateRange(2026, 'GMT')", "true"),
            ("dateRange(2027, 2028, 'GMT')", "false"),
            ("dateRange(15, 'JUL', 'GMT')", "true"),
            ("dateRange(15, 'JUL', 2026, 'GMT')", "true"),
            ("dateRange(15, 'JUL', 2025, 'GMT')", "false"),
            ("dateRange(1, 'JUN', 15, 'AUG', 'GMT')", "true"),
            ("dateRange(16, 'JUL', 15, 'AUG', 'GMT')", "false"),
            ("dateRange('JUN', 2025, 'MAR', 2027, 'GMT')", "true"),
            ("dateRange('AUG', 2026, 'MAR', 2027, 'GMT')", "false"),
            ("dateRange(1, 'JUN', 2026, 15, 'JUL', 2026, 'GMT')", "true"),
            ("dateRange(16, 'JUL', 2026, 15, 'AUG', 2026, 'GMT')", "false"),
            ("dateRange(1, 2, 3, 'GMT')", "false"),
            ("dateRange('x', 'GMT')", "false"),
            ("dateRange()", "false"),
            ("timeRange(16, 'GMT')", "true"),
            ("timeRange(15, 'GMT')", "false"),
            ("timeRange(9, 17, 'GMT')", "true"),
            ("timeRange(9, 16, 'GMT')", "false"),
            ("timeRange(22, 17, 'GMT')", "true"),
            ("timeRange(22, 6, 'GMT')", "false"),
            ("timeRange(16, 30, 17, 0, 'GMT')", "true"),
            ("timeRange(16, 46, 17, 0, 'GMT')", "false"),
            ("timeRange(16, 45, 0, 16, 45, 30, 'GMT')", "true"),
            ("timeRange(16, 45, 31, 16, 45, 59, 'GMT')", "false"),
            ("timeRange('x', 'GMT')", "false"),
            ("timeRange()", "false"),
        ] {
            assert_eq!(at_that_time(expression), expected, "{expression}");
        }
        // By the clock on the wall: whatever zone this is, one of the hours is the one.
        let hours = (0..24).filter(|hour| at_that_time(&format!("timeRange({hour})")) == "true").count();
        assert_eq!(hours, 1);
    }

    #[test]
    fn patterns_match_as_a_whole() {
        for (text, pattern, expected) in [
            ("", "", true),
            ("", "*", true),
            ("a", "", false),
            ("abc", "a?c", true),
            ("abc", "a?", false),
            ("abc", "*c", true),
            ("abcbc", "a*bc", true),
            ("abcbd", "a*bc", false),
            ("a.b", "a.b", true),
            ("axb", "a.b", false),
            ("é", "?", true),
            ("(x)[1]+", "(x)[1]+", true),
        ] {
            assert_eq!(matches(text, pattern), expected, "{text} {pattern}");
        }
        let begun = Instant::now();
        assert!(!matches(&"a".repeat(2000), &("*a".repeat(200) + "b")));
        assert!(begun.elapsed() < Duration::from_secs(2), "no backtracking without end");
    }

    #[test]
    fn a_script_that_goes_on_for_ever_is_stopped() {
        for script in [
            "for (;;) {}",
            "for (;;) { try { for (;;) {} } catch (e) {} }",
            "try { for (;;) {} } finally { for (;;) {} }",
            "var e = {}; Object.defineProperty(e, 'message', { get: function () { for (;;) {} } }); e.__proto__ = Error.prototype; throw e",
            "/^(a+)+$/.test('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!')",
            "while (true) shExpMatch('aaaaaaaaaaaaaaaaaaaaaaaaaaa', '*a*a*a*a*b')",
            "var x = []; x.toString = function () { for (;;) {} }; dnsResolve(x)",
        ] {
            let begun = cpu_time();
            let engine = engine(&format!("function FindProxyForURL() {{ {script}; return 'DIRECT'; }}"));
            let said = ask(&engine, "http://a.test/");
            let took = cpu_time().saturating_sub(begun);
            assert!(matches!(said, Err(Failure::TimedOut | Failure::Threw(_))), "{script}: {said:?}");
            assert!(took < CPU_MAX * 3, "{script}: {took:?}");
        }
        let begun = Engine::new(Zone::default()).unwrap().load("while (1);");
        assert_eq!(begun, Err(Failure::TimedOut));
    }

    #[test]
    fn a_script_that_takes_too_much_is_told_so() {
        for script in [
            "var a = []; for (;;) a.push(new Array(1000).fill(0))",
            "var s = 'x'; for (;;) s = s + s",
            "return 'x'.repeat(1 << 29)",
            "return new ArrayBuffer(1 << 30)",
            "return FindProxyForURL()",
            "var f = function (n) { return [n].map(f) }; return f(1)",
            "return JSON.parse('['.repeat(1000000))",
            "return new RegExp('('.repeat(100000))",
            "return eval('('.repeat(100000))",
            "var s = '', i; for (i = 0; i < 300000; i++) s += 'x' + i; return s",
        ] {
            let engine = engine(&format!("function FindProxyForURL() {{ {script} }}"));
            let said = ask(&engine, "http://a.test/");
            assert!(
                matches!(
                    said,
                    Err(Failure::Threw(_) | Failure::TimedOut | Failure::TooLong | Failure::NotText)
                ),
                "{script}: {said:?}"
            );
        }
    }

    #[test]
    fn what_is_no_text_is_no_answer() {
        for (body, expected) in [
            ("return 'DIRECT'", Ok(String::from("DIRECT"))),
            ("return null", Ok(String::new())),
            ("return undefined", Err(Failure::NotText)),
            ("", Err(Failure::NotText)),
            ("return 1", Err(Failure::NotText)),
            ("return {}", Err(Failure::NotText)),
            ("return ['DIRECT']", Err(Failure::NotText)),
            ("return new String('DIRECT')", Err(Failure::NotText)),
            ("return { toString: function () { return 'DIRECT' } }", Err(Failure::NotText)),
            ("return Promise.resolve('DIRECT')", Err(Failure::NotText)),
            ("return Symbol('x')", Err(Failure::NotText)),
            ("return 'x'.repeat(20000)", Err(Failure::TooLong)),
            ("throw new Error('no way')", Err(Failure::Threw("no way".into()))),
            ("throw 'plain'", Err(Failure::Threw("plain".into()))),
            ("throw { a: 1 }", Err(Failure::Threw("something that is no text".into()))),
            ("return isInNet(Symbol('x'))", Ok(String::new())),
        ] {
            let said = ask(&engine(&format!("function FindProxyForURL() {{ {body} }}")), "http://a.test/");
            if body.contains("isInNet(Symbol") {
                assert_eq!(said, Err(Failure::NotText), "a truth value");
            } else {
                assert_eq!(said, expected, "{body}");
            }
        }
        for (script, expected) in [
            ("var x = 1", Failure::NoFunction),
            ("var FindProxyForURL = 7", Failure::NoFunction),
            ("", Failure::NoFunction),
        ] {
            assert_eq!(ask(&engine(script), "http://a.test/"), Err(expected), "{script}");
        }
        assert_eq!(
            ask(&engine("function FindProxyForURLEx() { return 'DIRECT' }"), "http://a.test/"),
            Ok("DIRECT".into())
        );
        for script in ["<html>", "function (", "x\0y", "throw 1"] {
            let loaded = Engine::new(Zone::default()).unwrap().load(script);
            assert!(matches!(loaded, Err(Failure::Threw(_))), "{script}: {loaded:?}");
        }
    }

    #[test]
    fn a_name_is_asked_for_once_a_question_and_some_names_are() {
        let zone = Zone::default();
        let engine = Engine::new(zone.clone()).unwrap();
        engine
            .load(
                "function FindProxyForURL(url, host) { for (var i = 0; i < 100; i++) dnsResolve('h' + i); \
                   for (i = 0; i < 100; i++) isInNet(host, '10.0.0.0', '255.0.0.0'); \
                   return '' + dnsResolve('a b') + dnsResolve(''); }",
            )
            .unwrap();
        assert_eq!(ask(&engine, "http://www.corp.example/").unwrap(), "nullnull");
        assert_eq!(zone.0.borrow().len(), NAMES_MAX);
        assert_eq!(ask(&engine, "http://www.corp.example/").unwrap(), "nullnull");
        assert_eq!(zone.0.borrow().len(), 2 * NAMES_MAX);
    }

    #[test]
    fn what_a_script_does_to_its_functions_hurts_itself_alone() {
        let engine = engine(
            "dnsResolve = isInNet = null; Object.prototype.find = 1; String.prototype.includes = function () { throw 1 }; \
             function FindProxyForURL() { return 'DIRECT' }",
        );
        assert_eq!(ask(&engine, "http://a.test/"), Ok("DIRECT".into()));
    }
}
