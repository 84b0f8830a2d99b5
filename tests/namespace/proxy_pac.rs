//! Configuration scripts (PAC): what they say is done, and what becomes of those that fail.

use std::fmt::Write;
use std::time::Instant;

use crate::rig::cell::ANY;
use crate::rig::company::proxies::{Asks, Proxy};
use crate::rig::company::{Company, in_guest};
use crate::rig::directory::Directory;
use crate::rig::http::{Head, Server, Talk, Then};
use crate::rig::hythe::Hythe;
use crate::rig::process;
use crate::rig::site::Family;
use crate::rig::wait::{PATIENCE, wait_until};

fn way(hythe: &Hythe, host: &str) -> String {
    let (head, said) =
        Talk::to(&hythe.guest, Family::V4.far(), 80).ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    if head.status() == 200 { said.split(':').next().unwrap().to_string() } else { head.status().to_string() }
}

struct Servers(Vec<Server>);

/// Two proxies at ports 3001 and 3002, and what is direct.
fn servers(company: &Company) -> Servers {
    let names = [(3001, "first"), (3002, "second"), (80, "direct")];
    let mut servers: Vec<Server> =
        names.map(|(port, name)| Server::mirror(&company.site.far, Family::V4.far(), port, name)).into();
    // A proxy of SOCKS chooses the family.
    servers.push(Server::mirror(&company.site.far, Family::V6.far(), 80, "direct"));
    Servers(servers)
}

const SCRIPT: &str = r#"
function FindProxyForURL(url, host) {
    if (shExpMatch(host, "*.first.direct.test")) return "PROXY 198.51.100.1:3001";
    if (dnsDomainIs(host, ".second.direct.test")) return "HTTP 198.51.100.1:3002; DIRECT";
    if (host == "fall.direct.test") return "PROXY 198.51.100.1:9; PROXY 198.51.100.1:3002; DIRECT";
    if (host == "last.direct.test") return "PROXY 198.51.100.1:9; DIRECT";
    if (host == "none.direct.test") return "PROXY 198.51.100.1:9";
    if (host == "socks.direct.test") return "SOCKS5 198.51.100.1:1080";
    if (host == "old.direct.test") return "SOCKS 198.51.100.1:1080";
    if (isInNet(host, "198.51.100.0", "255.255.255.0") && host == "net.direct.test") return "PROXY 198.51.100.1:3001";
    if (url.substring(0, 6) == "https:") return "PROXY 198.51.100.1:3001";
    if (host == "url.direct.test") return url == "http://url.direct.test/" ? "PROXY 198.51.100.1:3002" : "DIRECT";
    return "DIRECT";
}
"#;

#[test]
fn a_script_says_the_way_for_each_name() {
    let company = Company::new();
    let mut servers = servers(&company);
    let socks = Proxy::microsocks(&company, Asks::Nothing);
    let directory = Directory::new();
    let file = directory.file("proxy.pac", SCRIPT);
    let path = file.display();
    servers.0.push(Server::start(&company.site.far, Family::V4.far(), 8000, |talk: &mut Talk, _: &Head| {
        talk.try_send(format!("HTTP/1.1 200 OK\r\nContent-Type: application/x-ns-proxy-autoconfig\r\nContent-Length: {}\r\n\r\n{SCRIPT}", SCRIPT.len()))?;
        Ok(Then::Close)
    }));
    for source in
        [format!("{path}"), format!("file://{path}"), "http://proxy.test:8000/proxy.pac".to_string()]
    {
        let hythe = company.hythe(ANY).options(&format!("--proxy-pac {source} --pac-failure block")).run();
        for (host, expected) in [
            ("a.first.direct.test", "first"),
            ("a.second.direct.test", "second"),
            ("fall.direct.test", "second"),
            ("last.direct.test", "direct"),
            ("none.direct.test", "502"),
            ("net.direct.test", "first"),
            ("url.direct.test", "second"),
            ("direct.test", "direct"),
        ] {
            assert_eq!(way(&hythe, host), expected, "{source}: {host}");
        }
        for host in ["socks.direct.test", "old.direct.test"] {
            let said =
                in_guest(&hythe, &format!("curl -sS -m 20 -o /dev/null -w '%{{http_code}}' http://{host}/"));
            assert_eq!(said, "200", "{host}");
            socks.wait_for_line(&["connected to"]);
        }
        // TLS has a URL of its own kind.
        let guest = hythe.guest.connect((Company::origin(Family::V4), 443)).unwrap();
        std::io::Write::write_all(&mut &guest, b"neither TLS nor a request\r\n").unwrap();
        let connects =
            || servers.0[0].lines().iter().filter(|line| line.starts_with("CONNECT 198.18.9.1:443")).count();
        wait_until("a tunnel by the first proxy", || connects() > 0);
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn what_bypasses_is_not_asked_of_the_script() {
    let company = Company::new();
    let _servers = servers(&company);
    let directory = Directory::new();
    let file = directory
        .file("proxy.pac", "function FindProxyForURL(url, host) { return 'PROXY 198.51.100.1:3001' }");
    let hythe = company
        .hythe(ANY)
        .options(&format!("--proxy-pac {} --proxy-bypass a.direct.test", file.display()))
        .run();
    assert_eq!(way(&hythe, "a.direct.test"), "direct");
    assert_eq!(way(&hythe, "b.direct.test"), "first");
    hythe.stop().assert_clean(0);
}

#[test]
fn a_script_that_fails_is_told_of_and_its_failure_leads_where_it_was_said() {
    let company = Company::new();
    let _servers = servers(&company);
    let directory = Directory::new();
    let mut deep = String::from("function FindProxyForURL(url, host) { return f(0) }\n");
    deep.push_str("function f(n) { return f(n + 1) + 1 }");
    for (number, (what, script)) in [
        ("throws", "function FindProxyForURL(url, host) { throw 'x' }"),
        ("does not end", "function FindProxyForURL(url, host) { while (true) {} }"),
        ("does not end before it begins", "while (true) {}"),
        (
            "takes all memory",
            "function FindProxyForURL(url, host) { var a = ['x']; while (true) { a.push(a.join('')); } }",
        ),
        ("is too deep", &deep),
        ("is no script", "this is not JavaScript"),
        ("has no such function", "var x = 1;"),
        ("returns a number", "function FindProxyForURL(url, host) { return 7 }"),
        ("returns nonsense", "function FindProxyForURL(url, host) { return 'GOPHER somewhere' }"),
    ]
    .into_iter()
    .enumerate()
    {
        let file = directory.file(&format!("{number}.pac"), script).display().to_string();
        for (failure, expected) in [("direct", "direct"), ("block", "502")] {
            let hythe =
                company.hythe(ANY).options(&format!("--proxy-pac {file} --pac-failure {failure}")).run();
            let began = Instant::now();
            assert_eq!(way(&hythe, "a.direct.test"), expected, "a script that {what}");
            assert!(began.elapsed() < PATIENCE / 2, "a script that {what}: {:?}", began.elapsed());
            assert!(hythe.counters().get("proxy_script_failed") >= 1, "a script that {what}");
            wait_until("a word about it", || hythe.log().contains("script"));
            for pid in std::iter::once(hythe.pid()).chain(process::children(hythe.pid())) {
                assert!(process::peak_resident_kib(pid) < 256 << 10, "a script that {what}");
            }
            hythe.stop().assert_clean(0);
        }
    }
}

#[test]
fn a_script_sees_nothing_of_the_host() {
    let company = Company::new();
    let _servers = servers(&company);
    let directory = Directory::new();
    let mut script = String::from("function FindProxyForURL(url, host) {\n");
    for name in [
        "require",
        "process",
        "fetch",
        "XMLHttpRequest",
        "Deno",
        "console",
        "load",
        "read",
        "print",
        "import_",
    ] {
        writeln!(script, "if (typeof {name} !== 'undefined') return 'PROXY 198.51.100.1:3002';").unwrap();
    }
    script.push_str("return 'PROXY 198.51.100.1:3001' }");
    let file = directory.file("proxy.pac", &script);
    let hythe = company.hythe(ANY).options(&format!("--proxy-pac {}", file.display())).run();
    assert_eq!(way(&hythe, "a.direct.test"), "first");
    hythe.stop().assert_clean(0);
}
