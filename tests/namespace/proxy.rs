//! The company's proxies: which of them leads where, who they are told that hythe is, and what changes while hythe runs.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use crate::publishing::{Control, printed};
use crate::rig::bytes::{expect_echo, transfer};
use crate::rig::cell::{ANY, on_every_cell};
use crate::rig::company::proxies::{
    Asks, BY_PROXY, IN_URL, PASSWORD, PORT, Proxy, SOCKS_PORT, TLS_PORT, USER,
};
use crate::rig::company::{Company, in_guest, try_in_guest};
use crate::rig::directory::Directory;
use crate::rig::http::{Head, Server, Talk, Then, answer};
use crate::rig::hythe::{Hythe, PROGRAM};
use crate::rig::netns::Netns;
use crate::rig::process;
use crate::rig::site::{FAMILIES, Family};
use crate::rig::wait::{pause, wait_until};

#[test]
fn origins_are_reached_through_each_proxy_by_its_users_and_by_nobody_else() {
    let company = Company::new();
    let _origins = company.origins("");
    let curl = |words: &str| {
        let ca = company.certificates().join("ca.pem");
        let script = format!("curl -sS -m 20 --cacert {} {words} 2>&1", ca.display());
        let output = company.site.host.output(&["sh", "-c", &script]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let unreachable = curl("--resolve web.origin.test:80:198.18.9.1 http://web.origin.test/");
    assert!(unreachable.contains("connect"), "{unreachable}");

    let both = |proxy: &str| {
        for scheme in ["http", "https"] {
            let said = curl(&format!("-x {proxy} {scheme}://web.origin.test/"));
            assert_eq!(said, "hello from web.origin.test\n", "{proxy}");
        }
    };
    let address = Family::V4.far();
    let status = |words: &str| curl(&format!("-x {address}:{PORT} {words} -o /dev/null -w '%{{http_code}}'"));
    {
        let squid = Proxy::squid(&company, Asks::Nothing);
        both(&format!("http://{address}:{PORT}"));
        both(&format!("https://{address}:{TLS_PORT} --proxy-insecure"));
        let denied = curl(&format!("-x {address}:{PORT} -p -w '%{{http_connect}}' http://web.origin.test/"));
        assert!(denied.contains("403"), "{denied}");
        assert_eq!(status("http://forbidden.origin.test/"), "403");
        squid.wait_for_line(&["GET http://web.origin.test/"]);
        squid.wait_for_line(&["CONNECT web.origin.test:443"]);
        squid.assert_names_alone();
    }
    for asks in [Asks::Basic, Asks::Digest] {
        let _squid = Proxy::squid(&company, asks);
        both(&format!("http://{IN_URL}@{address}:{PORT} --proxy-anyauth"));
        assert_eq!(status("http://web.origin.test/"), "407");
    }
    for (asks, user) in [(Asks::Nothing, ""), (Asks::Basic, "ann:company@")] {
        let tinyproxy = Proxy::tinyproxy(&company, asks);
        both(&format!("http://{user}{address}:{PORT}"));
        tinyproxy.wait_for_line(&["Request", "GET http://web.origin.test/"]);
        tinyproxy.wait_for_line(&["Request", "CONNECT web.origin.test:443"]);
    }
    for (asks, user) in [(Asks::Nothing, String::new()), (Asks::Basic, format!("{IN_URL}@"))] {
        let microsocks = Proxy::microsocks(&company, asks);
        both(&format!("socks5h://{user}{address}:{SOCKS_PORT}"));
        microsocks.wait_for_line(&["connected to web.origin.test:80"]);
    }
}

/// A file of credentials that nobody else may read, and the option.
fn credentials(text: &str) -> (Directory, String) {
    let directory = Directory::new();
    let file = directory.file("credentials", text);
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    (directory, format!("--proxy-credentials-file {}", file.display()))
}

fn options_of(scheme: &str, port: u16) -> String {
    let url = format!("{scheme}://proxy.test:{port}");
    format!("--proxy-http {url} --proxy-https {url}")
}

/// What a guest that knows of no proxy gets of both schemes.
fn expect_hello(company: &Company, hythe: &Hythe) {
    let ca = company.certificates().join("ca.pem");
    for words in [
        "http://web.origin.test/",
        "https://web.origin.test/",
        "-4 https://web.origin.test/",
        "-6 http://web.origin.test/",
    ] {
        let said = in_guest(hythe, &format!("curl -sS -m 30 --cacert {} {words}", ca.display()));
        assert_eq!(said, "hello from web.origin.test\n", "{words}");
    }
}

#[test]
fn guests_that_know_of_no_proxy_go_through_each_of_them() {
    let company = Company::new();
    let origins = company.origins("");
    let own = format!("{USER}:{PASSWORD}\n");
    let simple = "proxy.test:3128 ann:company\n".to_string();
    // Nothing leads there without.
    {
        let hythe = company.hythe(ANY).options("--proxy none").run();
        let output = try_in_guest(&hythe, "curl -sS -m 20 http://web.origin.test/");
        assert!(!output.status.success());
        hythe.stop().assert_clean(0);
    }
    let ca = company.certificates().join("ca.pem").display().to_string();
    let through = |name: &str, proxy: Proxy, options: String, known: &str, lines: [&str; 2]| {
        let (_directory, file) = credentials(known);
        let mut start = company.hythe(ANY).options(&options).variable("SSL_CERT_FILE", &ca);
        if !known.is_empty() {
            start = start.options(&file);
        }
        let hythe = start.run();
        expect_hello(&company, &hythe);
        hythe.stop().assert_clean(0);
        for line in lines {
            proxy.wait_for_line(&[line]);
        }
        if name != "tinyproxy" {
            // It writes the addresses of what it has looked up, too.
            proxy.assert_names_alone();
        }
    };
    let http = options_of("http", PORT);
    let lines = ["GET http://web.origin.test/", "CONNECT web.origin.test:443"];
    through("squid", Proxy::squid(&company, Asks::Nothing), http.clone(), "", lines);
    through("squid, Basic", Proxy::squid(&company, Asks::Basic), http.clone(), &own, lines);
    through("squid, Digest", Proxy::squid(&company, Asks::Digest), http.clone(), &own, lines);
    through("squid, TLS", Proxy::squid(&company, Asks::Nothing), options_of("https", TLS_PORT), "", lines);
    through(
        "squid, TLS and Basic",
        Proxy::squid(&company, Asks::Basic),
        options_of("https", TLS_PORT),
        &own,
        lines,
    );
    through("tinyproxy", Proxy::tinyproxy(&company, Asks::Nothing), http.clone(), "", lines);
    through("tinyproxy", Proxy::tinyproxy(&company, Asks::Basic), http, &simple, lines);
    let socks = options_of("socks5h", SOCKS_PORT);
    let lines = ["connected to web.origin.test:80", "connected to web.origin.test:443"];
    through("microsocks", Proxy::microsocks(&company, Asks::Nothing), socks.clone(), "", lines);
    through("microsocks, a password", Proxy::microsocks(&company, Asks::Basic), socks, &own, lines);

    let requests = origins.requests();
    assert!(requests.len() >= 36, "{}", requests.len());
    for request in requests {
        assert_eq!(request.line, "GET / HTTP/1.1");
        assert_eq!(request.header("proxy-authorization"), None, "{request:?}");
        assert_eq!(request.header("authorization"), None, "{request:?}");
    }
}

#[test]
fn socks5_without_h_is_told_addresses() {
    let company = Company::new();
    let _origins = company.origins("");
    let microsocks = Proxy::microsocks(&company, Asks::Nothing);
    let hythe = company.hythe(ANY).options(&options_of("socks5", SOCKS_PORT)).run();
    expect_hello(&company, &hythe);
    microsocks.wait_for_line(&["connected to 198.18.9.1:80"]);
    microsocks.wait_for_line(&["connected to 198.18.9.1:443"]);
    hythe.stop().assert_clean(0);
}

#[test]
fn the_environment_says_which_proxy_there_is_unless_hythe_is_told_not_to_ask() {
    let company = Company::new();
    let proxy = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let direct = Server::mirror(&company.site.far, Family::V4.far(), 80, "direct");
    let url = format!("http://{}:{PORT}", Family::V4.far());
    let ask = |start: crate::rig::hythe::Start<'_>, host: &str| {
        let hythe = start.run();
        let (_, said) = Talk::to(&hythe.guest, Family::V4.far(), 80)
            .ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        hythe.stop().assert_clean(0);
        said.split(':').next().unwrap().to_string()
    };
    for variable in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
        assert_eq!(ask(company.hythe(ANY).variable(variable, &url), "direct.test"), "proxy", "{variable}");
    }
    for variable in ["NO_PROXY", "no_proxy"] {
        let start =
            company.hythe(ANY).variable("http_proxy", &url).variable(variable, ".direct.test, direct.test");
        assert_eq!(ask(start, "direct.test"), "direct", "{variable}");
    }
    assert_eq!(
        ask(company.hythe(ANY).variable("HTTPS_PROXY", &url), "direct.test"),
        "direct",
        "it is for TLS"
    );
    assert_eq!(
        ask(company.hythe(ANY).variable("HTTP_PROXY", &url).options("--proxy none"), "direct.test"),
        "direct"
    );
    // What is named counts more.
    let named = company
        .hythe(ANY)
        .variable("HTTP_PROXY", "http://198.51.100.1:9")
        .options(&format!("--proxy-http {url}"));
    assert_eq!(ask(named, "direct.test"), "proxy");
    assert!(
        proxy.lines().iter().all(|line| line == "GET http://direct.test/ HTTP/1.1"),
        "{:?}",
        proxy.lines()
    );
    assert!(direct.lines().iter().all(|line| line == "GET / HTTP/1.1"), "{:?}", direct.lines());
}

/// What an answer of [`Server::mirror`] says of where it came from.
fn way(netns: &Netns, to: std::net::IpAddr, port: u16, host: &str) -> String {
    let (_, said) = Talk::to(netns, to, port).ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    said.split(':').next().unwrap().to_string()
}

#[test]
fn what_bypasses_the_proxy_is_named_by_name_suffix_address_network_and_port() {
    let company = Company::new();
    let _proxy = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let _direct: Vec<Server> = FAMILIES
        .iter()
        .flat_map(|family| {
            [80, 8080].map(|port| Server::mirror(&company.site.far, family.far(), port, "direct"))
        })
        .collect();
    let control = Control::new();
    let hythe = company
        .hythe(ANY)
        .options(BY_PROXY)
        .options("--transparent-ports 80,8080")
        .options(&control.option())
        .run();
    for (list, host, family, port, expected) in [
        ("", "direct.test", Family::V4, 80, "proxy"),
        ("direct.test", "direct.test", Family::V4, 80, "direct"),
        ("direct.test", "DIRECT.test", Family::V6, 80, "direct"),
        ("direct.test", "a.direct.test", Family::V4, 80, "direct"),
        ("direct.test", "indirect.test", Family::V4, 80, "proxy"),
        (".direct.test", "a.direct.test", Family::V4, 80, "direct"),
        ("*.direct.test", "a.b.direct.test", Family::V4, 80, "direct"),
        ("other.test,direct.test", "direct.test", Family::V4, 80, "direct"),
        ("other.test direct.test", "direct.test", Family::V4, 80, "direct"),
        ("*", "direct.test", Family::V4, 80, "direct"),
        ("direct.test:8080", "direct.test", Family::V4, 80, "proxy"),
        ("direct.test:8080", "direct.test", Family::V4, 8080, "direct"),
        ("198.51.100.1", "direct.test", Family::V4, 80, "direct"),
        ("198.51.100.0/24", "direct.test", Family::V4, 80, "direct"),
        ("198.51.100.0/24", "198.51.100.1", Family::V4, 80, "direct"),
        ("198.51.100.0/24", "direct.test", Family::V6, 80, "proxy"),
        ("2001:db8::/64", "direct.test", Family::V6, 80, "direct"),
        ("2001:db8::1", "[2001:db8::1]", Family::V6, 8080, "direct"),
        ("192.0.2.0/24", "direct.test", Family::V4, 80, "proxy"),
    ] {
        let words = ["--http", "http://198.51.100.1:3128", "--bypass", list];
        printed(&ask(&control, &company.site.host, "set", &words));
        assert_eq!(way(&hythe.guest, family.far(), port, host), expected, "{list:?} and {host}");
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn names_of_the_link_and_the_guests_own_subnet_know_no_proxy() {
    let company = Company::new();
    let proxy = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let _host = Server::mirror(&company.site.host, Family::V4.loopback(), 80, "host");
    let hythe = company.hythe(ANY).options(BY_PROXY).options("--guest-api status").run();
    for host in ["host.docker.internal", "host.containers.internal", "192.168.65.254"] {
        assert_eq!(way(&hythe.guest, Family::V4.host_internal(), 80, host), "host");
    }
    let said = in_guest(&hythe, "curl -sS -m 20 http://gateway.docker.internal/v1/status");
    assert!(said.contains("engine"), "{said}");
    assert_eq!(
        in_guest(&hythe, "curl -sS -m 20 -x http.docker.internal:3128 http://host.docker.internal/"),
        "host: GET / HTTP/1.1 \n"
    );
    assert_eq!(proxy.connections(), 0);
    hythe.stop().assert_clean(0);
}

#[test]
fn tools_that_want_a_proxy_find_one_that_obeys_the_same_rules() {
    let company = Company::new();
    let origins = company.origins("");
    let squid = Proxy::squid(&company, Asks::Basic);
    let direct = Server::mirror(&company.site.far, Family::V4.far(), 80, "direct");
    let (_directory, file) = credentials(&format!("{USER}:{PASSWORD}\n"));
    let hythe = company
        .hythe(ANY)
        .options(&options_of("http", PORT))
        .options(&file)
        .options("--proxy-bypass .direct.test")
        .words(&["--egress", "deny secret.origin.test text=not for guests"])
        .run();
    let ca = company.certificates().join("ca.pem").display().to_string();
    let curl = |words: &str| {
        let output = try_in_guest(
            &hythe,
            &format!("curl -sS -m 30 --cacert {ca} -x http.docker.internal:3128 {words} 2>&1"),
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for url in ["http://web.origin.test/", "https://web.origin.test/"] {
        assert_eq!(curl(url), "hello from web.origin.test\n");
    }
    assert_eq!(curl("http://a.direct.test/x"), "direct: GET /x HTTP/1.1 \n");
    assert_eq!(curl("-p http://a.direct.test/tunnel"), "direct: GET /tunnel HTTP/1.1 \n");
    assert_eq!(direct.heads()[0].field("proxy-authorization"), None);
    let refused = curl("-w %{http_code} http://secret.origin.test/");
    assert!(refused.contains("not for guests") && refused.ends_with("403"), "{refused}");
    assert_eq!(
        curl("-o /dev/null -w %{http_connect} https://secret.origin.test/").split_whitespace().last(),
        Some("403")
    );
    // What the proxy refuses is told in its own words.
    let refused = curl("-w %{http_code} http://forbidden.origin.test/");
    assert!(refused.contains("squid") && refused.ends_with("403"), "{refused}");
    squid.wait_for_line(&["CONNECT web.origin.test:443"]);
    squid.assert_names_alone();
    assert!(!squid.log().contains("direct.test") && !squid.log().contains("secret"), "{}", squid.log());
    for request in origins.requests() {
        assert_eq!(request.header("proxy-authorization"), None, "{request:?}");
        assert_eq!(request.header("proxy-connection"), None, "{request:?}");
    }
    hythe.stop().assert_clean(0);
}

#[test]
fn a_proxy_that_asks_is_answered_once_and_its_refusal_is_shown() {
    let company = Company::new();
    let challenge = "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\nX-Own: words\r\nContent-Length: 5\r\n\r\nasked";
    let server = Server::start(&company.site.far, Family::V4.far(), PORT, move |talk, head| {
        talk.body(head);
        talk.try_send(challenge)?;
        Ok(Then::Next)
    });
    let request = "POST / HTTP/1.1\r\nHost: web.origin.test\r\nContent-Length: 4\r\n\r\nbody";
    let authorizations = |heads: &[Head]| {
        heads.iter().map(|head| head.field("proxy-authorization").map(str::to_string)).collect::<Vec<_>>()
    };
    // Nobody knows an answer.
    let hythe = company.hythe(ANY).options(BY_PROXY).run();
    let (head, body) = Talk::to(&hythe.guest, Company::origin(Family::V4), 80).ask(request);
    assert_eq!((head.status(), body.as_str(), head.field("x-own")), (407, "asked", Some("words")));
    assert_eq!(head.field("proxy-authenticate"), Some("Basic realm=\"x\""));
    assert_eq!(authorizations(&server.heads()), [None]);
    // The guest knows one itself, and says it to a proxy that it knows of.
    let mut guest = Talk::to(&hythe.guest, Family::V4.gateway(), PORT);
    guest.ask("GET http://web.origin.test/ HTTP/1.1\r\nHost: web.origin.test\r\nProxy-Authorization: Basic Z3Vlc3Q6b3du\r\n\r\n");
    assert_eq!(server.heads().last().unwrap().field("proxy-authorization"), Some("Basic Z3Vlc3Q6b3du"));
    let mut guest = Talk::to(&hythe.guest, Family::V4.gateway(), PORT);
    let (head, _) = guest.ask("CONNECT web.origin.test:443 HTTP/1.1\r\nHost: web.origin.test:443\r\n\r\n");
    assert_eq!(head.status(), 407);
    hythe.stop().assert_clean(0);
    // hythe knows one, which is not right.
    let before = server.heads().len();
    let (_directory, file) = credentials("ann:wrong\n");
    let hythe = company.hythe(ANY).options(BY_PROXY).options(&file).run();
    let (head, body) = Talk::to(&hythe.guest, Company::origin(Family::V4), 80).ask(request);
    assert_eq!((head.status(), body.as_str()), (407, "asked"));
    assert_eq!(authorizations(&server.heads()[before..]), [None, Some("Basic YW5uOndyb25n".into())]);
    hythe.stop().assert_clean(0);
}

#[test]
fn a_nonce_that_has_grown_old_is_no_refusal() {
    let company = Company::new();
    let server = Server::start(&company.site.far, Family::V4.far(), PORT, |talk, head| {
        let body = talk.body(head);
        let said = head.field("proxy-authorization").unwrap_or_default();
        // Each nonce is good for two requests; the path says which one is right.
        let nonce = head.line.split(' ').nth(1).unwrap().rsplit('/').next().unwrap();
        if said.starts_with("Digest") && said.contains(&format!("nonce=\"{nonce}\"")) {
            talk.try_send(answer("200 OK", &String::from_utf8_lossy(&body)))?;
        } else {
            talk.try_send(format!(
                "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Digest realm=\"r\", nonce=\"{nonce}\", qop=\"auth\", algorithm=SHA-256, stale=true\r\nContent-Length: 0\r\n\r\n"
            ))?;
        }
        Ok(Then::Next)
    });
    let (_directory, file) = credentials(&format!("{USER}:{PASSWORD}\n"));
    let hythe = company.hythe(ANY).options(BY_PROXY).options(&file).run();
    let mut guest = Talk::to(&hythe.guest, Company::origin(Family::V4), 80);
    let mut counts = Vec::new();
    for nonce in ["one", "one", "two", "two"] {
        let (head, body) = guest
            .ask(format!("POST /{nonce} HTTP/1.1\r\nHost: web.origin.test\r\nContent-Length: 4\r\n\r\nbody"));
        assert_eq!((head.status(), body.as_str()), (200, "body"));
        counts.push(server.heads().len());
    }
    assert_eq!(counts, [2, 3, 5, 6], "what is known is said at once");
    let said: Vec<Head> = server.heads();
    let with_count = |count: &str| {
        said.iter()
            .filter(|head| head.field("proxy-authorization").is_some_and(|value| value.contains(count)))
            .count()
    };
    assert!(with_count("nc=00000001") >= 2 && with_count("nc=00000002") >= 2, "{said:?}");
    hythe.stop().assert_clean(0);
}

/// `hythe proxy` on the command line.
fn ask(control: &Control, netns: &Netns, what: &str, words: &[&str]) -> Output {
    let path = control.path.display().to_string();
    netns.output(&[&[PROGRAM, "proxy", what, "--api", &path], words].concat())
}

on_every_cell! {
    another_proxy_is_for_new_connections_and_old_ones_go_on(cell) {
        let company = Company::new();
        let tunnel = |name: &'static str| {
            move |talk: &mut Talk, head: &Head| {
                if head.line.starts_with("CONNECT") {
                    talk.try_send("HTTP/1.1 200 OK\r\n\r\n")?;
                    let mut talk = Talk::new(talk.stream().try_clone()?);
                    // An echo, a piece at a time.
                    while let Ok(bytes) = talk.try_some() {
                        if bytes.is_empty() {
                            break;
                        }
                        talk.try_send(&bytes)?;
                    }
                    return Ok(Then::Close);
                }
                talk.try_send(answer("200 OK", &format!("{name}: {}", head.line)))?;
                Ok(Then::Next)
            }
        };
        let first = Server::start(&company.site.far, Family::V4.far(), 3001, tunnel("first"));
        let second = Server::start(&company.site.far, Family::V4.far(), 3002, tunnel("second"));
        let _direct = Server::mirror(&company.site.far, Family::V4.far(), 80, "direct");
        let control = Control::new();
        let hythe = company.hythe(cell).options(&control.option()).options("--proxy none").run();
        let host = &company.site.host;
        let asked = || way(&hythe.guest, Family::V4.far(), 80, "direct.test");
        assert_eq!(asked(), "direct");

        printed(&ask(&control, host, "set", &["--http", "http://198.51.100.1:3001", "--https", "http://198.51.100.1:3001"]));
        assert_eq!(asked(), "first");
        let shown = printed(&ask(&control, host, "show", &[]));
        assert!(shown.contains("http://198.51.100.1:3001"), "{shown}");
        let old = hythe.guest.connect((Company::origin(Family::V4), 443)).unwrap();
        expect_echo(&old, b"not TLS, and through the first");
        assert_eq!(first.lines().last().unwrap(), "CONNECT 198.18.9.1:443 HTTP/1.1");

        printed(&ask(&control, host, "set", &["--http", "http://198.51.100.1:3002", "--https", "http://198.51.100.1:3002"]));
        assert_eq!(asked(), "second");
        expect_echo(&old, b"still there");
        let new = hythe.guest.connect((Company::origin(Family::V4), 443)).unwrap();
        expect_echo(&new, b"through the second");
        assert_eq!(second.lines().last().unwrap(), "CONNECT 198.18.9.1:443 HTTP/1.1");

        printed(&ask(&control, host, "off", &[]));
        assert_eq!(asked(), "direct");
        expect_echo(&old, b"and still");
        expect_echo(&new, b"this one too");
        // The same by HTTP and JSON.
        let socket = control.path.display().to_string();
        let body = r#"{"http": "http://198.51.100.1:3001"}"#;
        let words = ["curl", "-sSf", "--unix-socket", &socket, "-X", "PUT", "http://hythe/v1/proxy", "-H", "content-type: application/json", "-d", body];
        host.command(&words);
        assert_eq!(asked(), "first");
        let shown = host.command(&["curl", "-sSf", "--unix-socket", &socket, "http://hythe/v1/proxy"]);
        assert!(shown.contains("http://198.51.100.1:3001"), "{shown}");
        host.command(&["curl", "-sSf", "--unix-socket", &socket, "-X", "DELETE", "http://hythe/v1/proxy"]);
        assert_eq!(asked(), "direct");
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn what_proxies_are_told_is_told_to_nobody_else() {
    let company = Company::new();
    let origins = company.origins("");
    let _squid = Proxy::squid(&company, Asks::Basic);
    let control = Control::new();
    let (directory, file) = credentials(&format!("{USER}:{PASSWORD}\n"));
    let hythe = company
        .hythe(ANY)
        .options(&options_of("http", PORT))
        .options(&file)
        .options(&control.option())
        .options("-vv")
        .run();
    expect_hello(&company, &hythe);
    let host = &company.site.host;
    let socket = control.path.display().to_string();
    let get = |path: &str| {
        host.command(&["curl", "-sSf", "--unix-socket", &socket, &format!("http://hythe{path}")])
    };
    let mut told = vec![get("/v1/status"), get("/v1/proxy"), printed(&ask(&control, host, "show", &[]))];
    // A change, with another password.
    let other = directory.file("other", "ann:another-secret\n");
    std::fs::set_permissions(&other, PermissionsExt::from_mode(0o600)).unwrap();
    let words = ["--http", "http://198.51.100.1:3128", "--credentials-file", &other.display().to_string()];
    told.push(printed(&ask(&control, host, "set", &words)));
    told.extend([get("/v1/proxy"), printed(&ask(&control, host, "show", &[]))]);
    let (head, _) = Talk::to(&hythe.guest, Company::origin(Family::V4), 80)
        .ask("GET / HTTP/1.1\r\nHost: web.origin.test\r\n\r\n");
    assert_eq!(head.status(), 407, "the other password is not that of squid");
    for pid in std::iter::once(hythe.pid()).chain(process::children(hythe.pid())) {
        told.push(String::from_utf8_lossy(&process::arguments(pid)).into_owned());
    }
    hythe.counters();
    let ended = hythe.stop();
    ended.assert_clean(0);
    told.push(ended.stderr);
    let encoded = "YW5uQGNvbXBhbnk6cGFzczp3L3JkICUx";
    for said in &told {
        for secret in [PASSWORD, "pass%3Aw%2Frd", encoded, "another-secret"] {
            assert!(!said.contains(secret), "{secret} is told: {said}");
        }
    }
    for request in origins.requests() {
        assert_eq!(request.header("proxy-authorization"), None, "{request:?}");
    }

    // What others may read is no secret.
    for (options, words) in [
        (format!("--proxy-http http://ann:another-secret@198.51.100.1:{PORT}"), "command line"),
        (
            format!(
                "{} --proxy-credentials-file {}",
                options_of("http", PORT),
                directory.file("open", "ann:another-secret\n").display()
            ),
            "others may read it",
        ),
    ] {
        let ended = company.hythe(ANY).options(&options).to_the_end("run", &["--", "true"]);
        assert_eq!(ended.status.code(), Some(125), "{}", ended.stderr);
        assert!(ended.stderr.contains(words) && !ended.stderr.contains("another-secret"), "{}", ended.stderr);
    }
}

#[test]
fn other_ports_and_what_is_on_them_are_left_alone() {
    let company = Company::new();
    let proxy = Server::mirror(&company.site.far, Family::V4.far(), PORT, "proxy");
    let direct = Server::mirror(&company.site.far, Family::V4.far(), 8080, "direct");
    let hythe = company.hythe(ANY).options(BY_PROXY).run();
    assert_eq!(way(&hythe.guest, Family::V4.far(), 8080, "direct.test"), "direct");
    let listener = company.site.far.listen(Family::V4.far(), 22);
    let mut client = hythe.guest.connect((Family::V4.far(), 22)).unwrap();
    client.write_all(b"x").unwrap();
    let (far, _) = crate::rig::bytes::accept(&listener);
    let mut byte = [0];
    crate::rig::bytes::read(&far, &mut byte).unwrap();
    transfer(&client, &far, 1, 100_000);
    assert_eq!((proxy.connections(), direct.connections()), (0, 1));
    hythe.stop().assert_clean(0);

    let hythe = company.hythe(ANY).options(BY_PROXY).options("--transparent-ports 8080").run();
    assert_eq!(way(&hythe.guest, Family::V4.far(), 8080, "direct.test"), "proxy");
    assert_eq!(proxy.lines(), ["GET http://direct.test:8080/ HTTP/1.1"]);
    hythe.stop().assert_clean(0);
}

#[test]
fn streams_that_come_and_go_leave_nothing_in_hythe() {
    let company = Company::new();
    let _proxy = Server::start(&company.site.far, Family::V4.far(), PORT, |talk, head| {
        if head.line.starts_with("CONNECT") {
            talk.try_send("HTTP/1.1 200 OK\r\n\r\n")?;
            talk.wait_for_end();
            return Ok(Then::Close);
        }
        talk.try_send(answer("200 OK", "x"))?;
        Ok(Then::Next)
    });
    let hythe = company.hythe(ANY).options(BY_PROXY).run();
    let round = || {
        let talks: Vec<Talk> = (0..50)
            .map(|number| {
                let port = if number % 2 == 0 { 80 } else { 443 };
                let mut talk = Talk::to(&hythe.guest, Company::origin(Family::V4), port);
                match port {
                    80 => drop(talk.ask("GET / HTTP/1.1\r\nHost: web.origin.test\r\n\r\n")),
                    _ => talk.send("bytes that are neither TLS nor a request\r\n"),
                }
                talk
            })
            .collect();
        drop(talks);
    };
    round();
    let open =
        || process::descriptors(hythe.pid()).iter().filter(|target| target.starts_with("socket:")).count();
    wait_until("the first streams to be gone", || {
        let before = open();
        pause(std::time::Duration::from_millis(300));
        before == open()
    });
    let (sockets, memory) = (open(), process::resident_kib(hythe.pid()));
    for _ in 0..4 {
        round();
    }
    wait_until("sockets to be closed", || open() <= sockets);
    let grown = process::resident_kib(hythe.pid()).saturating_sub(memory);
    assert!(grown < 16 << 10, "{grown} KiB");
    hythe.stop().assert_clean(0);
}

#[test]
fn a_proxy_has_an_address_of_either_family_or_a_name_and_may_be_on_the_host() {
    let company = Company::new();
    let server = |netns: &Netns, address| Server::mirror(netns, address, PORT, "proxy");
    let _servers = [
        server(&company.site.far, Family::V4.far()),
        server(&company.site.far, Family::V6.far()),
        server(&company.site.host, Family::V4.loopback()),
    ];
    for host in ["198.51.100.1", "[2001:db8::1]", "proxy.test", "PROXY.test.", "127.0.0.1", "localhost"] {
        let url = format!("http://{host}:{PORT}");
        let hythe = company.hythe(ANY).options(&format!("--proxy-http {url} --proxy-https {url}")).run();
        for family in FAMILIES {
            assert_eq!(way(&hythe.guest, Company::origin(family), 80, "web.origin.test"), "proxy", "{host}");
        }
        // The host's loopback is not the guest's because a proxy is there.
        for name in ["localhost", "127.0.0.1", "[::1]", "0.0.0.0", "a.localhost"] {
            let mut guest = Talk::to(&hythe.guest, Family::V4.gateway(), PORT);
            let (head, said) = guest.ask(format!("GET http://{name}/ HTTP/1.1\r\nHost: {name}\r\n\r\n"));
            assert!(head.status() >= 400, "{name}: {said}");
            let mut guest = Talk::to(&hythe.guest, Family::V4.gateway(), PORT);
            let (head, _) =
                guest.ask(format!("CONNECT {name}:{PORT} HTTP/1.1\r\nHost: {name}:{PORT}\r\n\r\n"));
            assert!(head.status() >= 400, "{name}: {head:?}");
        }
        hythe.stop().assert_clean(0);
    }
}

#[test]
fn a_file_says_all_of_it_with_the_password_where_nobody_reads_it() {
    let company = Company::new();
    let server = Server::start(&company.site.far, Family::V4.far(), PORT, |talk, head| {
        let body = match head.field("proxy-authorization") {
            Some(_) => answer("200 OK", "known"),
            None => "HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n"
                .into(),
        };
        talk.try_send(body)?;
        Ok(Then::Next)
    });
    let directory = Directory::new();
    let file = directory.file(
        "hythe.toml",
        r#"
proxy = "manual"
proxy-http = "http://ann:file-secret@198.51.100.1:3128"
proxy-https = "http://ann:file-secret@198.51.100.1:3128"
proxy-bypass = ".direct.test"
transparent-ports = "80,443,8080"
egress = ["deny secret.origin.test text=from the file"]
"#,
    );
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let hythe = company.hythe(ANY).options(&format!("--config {} -vv", file.display())).run();
    let ask = |port: u16, host: &str| {
        let mut guest = Talk::to(&hythe.guest, Company::origin(Family::V4), port);
        guest.ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"))
    };
    assert_eq!(ask(8080, "web.origin.test").1, "known");
    let (head, said) = ask(80, "secret.origin.test");
    assert!(head.status() == 403 && said.contains("from the file"), "{said}");
    let known: Vec<Head> = server.heads();
    assert_eq!(known.last().unwrap().field("proxy-authorization"), Some("Basic YW5uOmZpbGUtc2VjcmV0"));
    let ended = hythe.stop();
    ended.assert_clean(0);
    assert!(!ended.stderr.contains("file-secret"), "{}", ended.stderr);
}
