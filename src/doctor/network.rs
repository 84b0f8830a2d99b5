//! What of the host's network the guest will meet: resolvers, proxies, routes.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use super::Finding;
use crate::config::{Config, ConfigError, Options};
use crate::host::RESOLV_CONF;
use crate::netlink::HostNetwork;
use crate::slow::dns::ResolvConf;

/// How long a resolver may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// The question that every resolver can answer: which servers the root has (RFC 8109).
const QUESTION: [u8; 17] = [0x68, 0x79, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];

/// Variables by which programs find a proxy.
const PROXIES: [&str; 6] =
    ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];

pub(super) fn examine() -> Vec<Finding> {
    let readable = std::fs::File::open(RESOLV_CONF).map(drop);
    let servers = ResolvConf::read(Path::new(RESOLV_CONF)).servers;
    let mut findings = vec![resolv_conf(&readable, &servers)];
    findings.extend(resolvers(&ask_all(&servers)));
    findings.push(proxies(PROXIES.into_iter().filter_map(|name| Some((name, std::env::var(name).ok()?)))));
    let network = HostNetwork::read();
    findings.push(routes(network.as_ref()));
    findings.extend(network.ok().map(|network| subnets(Config::new(Options::default(), &network))));
    findings
}

fn resolv_conf(readable: &io::Result<()>, servers: &[SocketAddr]) -> Finding {
    const SUBJECT: &str = "resolv.conf";
    match readable {
        Ok(()) => {
            let servers: Vec<String> = servers.iter().map(|server| server.ip().to_string()).collect();
            let found = format!("{RESOLV_CONF} leads to {}", servers.join(", "));
            Finding::ok(SUBJECT, found, "these are asked for the guest, in this order")
        }
        Err(error) => Finding::warning(
            SUBJECT,
            format!("{RESOLV_CONF} cannot be read ({error})"),
            "names are asked of the host itself, 127.0.0.1",
            "make it readable for the user who starts hythe, or name resolvers by --dns",
        ),
    }
}

/// What came of asking each resolver.
fn ask_all(servers: &[SocketAddr]) -> Vec<(SocketAddr, io::Result<Duration>)> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = servers.iter().map(|server| (*server, scope.spawn(|| ask(*server)))).collect();
        asked
            .into_iter()
            .map(|(server, asked)| {
                (server, asked.join().unwrap_or_else(|_| Err(io::Error::other("it could not be asked"))))
            })
            .collect()
    })
}

fn ask(server: SocketAddr) -> io::Result<Duration> {
    let any: IpAddr =
        if server.is_ipv4() { [0, 0, 0, 0].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    let begun = Instant::now();
    socket.send(&QUESTION)?;
    let mut answer = [0; 512];
    loop {
        let left = PATIENCE.checked_sub(begun.elapsed()).filter(|left| !left.is_zero());
        socket.set_read_timeout(Some(left.ok_or(io::ErrorKind::TimedOut)?))?;
        // Whatever it says, it is there.
        if socket.recv(&mut answer)? >= 12 && answer[..2] == QUESTION[..2] {
            return Ok(begun.elapsed());
        }
    }
}

fn resolvers(answers: &[(SocketAddr, io::Result<Duration>)]) -> Vec<Finding> {
    let is_alone = answers.len() == 1;
    let finding = |(server, answer): &(SocketAddr, io::Result<Duration>)| match answer {
        Ok(took) => Finding::ok(
            "resolver",
            format!("{server} answers in {:.1} ms", took.as_secs_f64() * 1e3),
            "the guest's names are asked there",
        ),
        Err(error) => {
            let why = match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it keeps silent".to_string(),
                _ => error.to_string(),
            };
            let means = if is_alone {
                "the guest resolves no names but the link's and those of /etc/hosts"
            } else {
                "the guest's first query waits for it; later ones ask the others first"
            };
            Finding::warning(
                "resolver",
                format!("{server} does not answer ({why})"),
                means,
                "repair or remove it in /etc/resolv.conf, or name another by --dns",
            )
        }
    };
    answers.iter().map(finding).collect()
}

fn proxies<'n>(set: impl Iterator<Item = (&'n str, String)>) -> Finding {
    let set: Vec<(&str, String)> = set.filter(|(_, value)| !value.is_empty()).collect();
    // A proxy's address may have a password in it.
    let found = set.iter().map(|(name, value)| format!("{name}={}", without_user(value)));
    let found = found.collect::<Vec<_>>().join(", ");
    if set.is_empty() {
        return Finding::ok("proxy", "none in the environment", "the guest's programs connect by themselves");
    }
    if set.iter().any(|(_, value)| is_loopback(value)) {
        return Finding::warning(
            "proxy",
            found,
            "a proxy on the host's loopback is not there under that address in the guest, whose loopback is its own",
            "give the guest's programs host.docker.internal with the same port",
        );
    }
    Finding::ok(
        "proxy",
        found,
        "programs of hythe run have the same environment, and reach it as the host does",
    )
}

fn without_user(value: &str) -> String {
    let (scheme, rest) = value.split_once("://").map_or(("", value), |(scheme, rest)| (scheme, rest));
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    if scheme.is_empty() { rest.to_string() } else { format!("{scheme}://{rest}") }
}

fn is_loopback(value: &str) -> bool {
    let plain = without_user(value);
    let place = plain.split_once("://").map_or(plain.as_str(), |(_, place)| place);
    let place = place.split('/').next().unwrap_or_default();
    let host = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, _)) => host,
        None => place.rsplit_once(':').map_or(place, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

fn routes(network: Result<&HostNetwork, &io::Error>) -> Finding {
    const SUBJECT: &str = "routes";
    let network = match network {
        Ok(network) => network,
        Err(error) => {
            return Finding::problem(
                SUBJECT,
                format!("the kernel does not tell them ({error})"),
                "hythe cannot choose the guest's addresses",
                "allow rtnetlink (AF_NETLINK sockets) to the user who starts hythe",
            );
        }
    };
    match network.has_default {
        [true, true] => {
            Finding::ok(SUBJECT, "there are default routes of IPv4 and IPv6", "the guest reaches both")
        }
        [true, false] => Finding::ok(
            SUBJECT,
            "there is a default route of IPv4, and none of IPv6",
            "the guest has no default route of IPv6 either, and prefers IPv4",
        ),
        [false, true] => Finding::ok(
            SUBJECT,
            "there is a default route of IPv6, and none of IPv4",
            "the guest reaches IPv6 alone",
        ),
        [false, false] => Finding::warning(
            SUBJECT,
            "there is no default route",
            "the guest reaches the host and its networks, and nothing behind them",
            "connect the host; a guest that runs meanwhile has what the host has at once",
        ),
    }
}

fn subnets(config: Result<Config, ConfigError>) -> Finding {
    const SUBJECT: &str = "subnets";
    match config {
        Ok(config) if config.notes.is_empty() => {
            let subnets: Vec<String> =
                config.addresses.families().map(|family| family.subnet.to_string()).collect();
            Finding::ok(SUBJECT, format!("{} are free", subnets.join(" and ")), "they are the guest's")
        }
        Ok(config) => Finding::warning(
            SUBJECT,
            config.notes.join("; "),
            "the guest has other addresses than on most hosts",
            "choose by --subnet and --subnet6, where the addresses matter",
        ),
        Err(error) => Finding::problem(
            SUBJECT,
            error.to_string(),
            "there are no addresses for the guest",
            "choose by --subnet and --subnet6 what no route of the host covers",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Standing;
    use super::*;
    use crate::policy::addresses::{OTHER_SUBNETS, SUBNET};

    #[test]
    fn a_proxy_on_the_loopback_is_not_the_guests() {
        let found = |value: &str| proxies([("http_proxy", value.to_string())].into_iter());
        for value in ["http://127.0.0.1:3128", "localhost:3128", "http://a:b@[::1]:8080/", "127.1.2.3"] {
            assert_eq!(found(value).standing, Standing::Warning, "{value}");
        }
        for value in ["http://proxy.corp.example:3128", "10.0.0.1:80", "http://[fd00::1]:80", ""] {
            assert_eq!(found(value).standing, Standing::Ok, "{value}");
        }
        let secret = found("http://anna:secret@proxy.test:3128");
        assert_eq!(secret.found, "http_proxy=http://proxy.test:3128");
    }

    #[test]
    fn a_resolver_that_keeps_silent_is_a_warning_and_says_what_it_costs() {
        let server: SocketAddr = "10.0.0.1:53".parse().unwrap();
        let silent = || (server, Err(io::ErrorKind::TimedOut.into()));
        let answers = [(server, Ok(Duration::from_millis(2))), silent()];
        let both = resolvers(&answers);
        assert_eq!(
            both.iter().map(|one| one.standing).collect::<Vec<_>>(),
            [Standing::Ok, Standing::Warning]
        );
        assert!(both[1].found.contains("keeps silent") && both[1].means.contains("ask the others"));
        assert!(resolvers(&[silent()])[0].means.contains("no names"));
        let unreadable = resolv_conf(&Err(io::ErrorKind::PermissionDenied.into()), &[]);
        assert_eq!(unreadable.standing, Standing::Warning);
    }

    #[test]
    fn one_who_answers_is_heard_and_one_who_is_not_there_is_not() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let answering = std::thread::spawn(move || {
            let mut query = [0; 512];
            let (len, from) = server.recv_from(&mut query).unwrap();
            assert_eq!(query[..len], QUESTION);
            // What answers no question, first.
            server.send_to(&[0; 20], from).unwrap();
            server.send_to(&query[..len], from).unwrap();
        });
        assert!(ask(address).unwrap() < PATIENCE);
        answering.join().unwrap();
        assert_eq!(ask(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn subnets_give_way_until_there_is_none() {
        let of = |networks| {
            let network = HostNetwork { networks, ..HostNetwork::default() };
            subnets(Config::new(Options::default(), &network)).standing
        };
        assert_eq!(of(vec![]), Standing::Ok);
        assert_eq!(of(vec![SUBNET.into()]), Standing::Warning);
        let all = OTHER_SUBNETS.iter().chain([&SUBNET]).map(|net| (*net).into()).collect();
        assert_eq!(of(all), Standing::Problem);
        for (has_default, standing) in [([true, false], Standing::Ok), ([false, false], Standing::Warning)] {
            let network = HostNetwork { has_default, ..HostNetwork::default() };
            assert_eq!(routes(Ok(&network)).standing, standing);
        }
        assert_eq!(routes(Err(&io::Error::other("no"))).standing, Standing::Problem);
    }
}
