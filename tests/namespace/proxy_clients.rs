//! Programs that people use, in a guest that knows of no proxy. They speak to origins that are reached through squid alone, which writes
//! down for whom it was asked.

use crate::rig::cell::{ANY, Cell, Engine};
use crate::rig::company::proxies::{Asks, BY_PROXY, Proxy};
use crate::rig::company::{Company, Origins, PYTHON, in_guest};
use crate::rig::hythe::Hythe;

struct World {
    company: Company,
    origins: Origins,
    squid: Proxy,
    hythe: Hythe,
}

/// `files` is what the origins have ([`Company::origins`]).
fn world(cell: Cell, files: &str) -> World {
    let company = Company::new();
    let origins = company.origins(files);
    let squid = Proxy::squid(&company, Asks::Nothing);
    let hythe = company.hythe(cell).options(BY_PROXY).run();
    World { company, origins, squid, hythe }
}

impl World {
    fn guest(&self, script: &str) -> String {
        let ca = self.company.certificates().join("ca.pem").display().to_string();
        in_guest(&self.hythe, &format!("ca={ca}; {script}"))
    }

    fn python(&self, program: &str) -> String {
        let file = self.company.directory.file("program.py", program);
        self.guest(&format!("{PYTHON} {} $ca", file.display()))
    }

    /// Each name was asked for as such.
    fn end(self, lines: &[&str]) {
        self.hythe.stop().assert_clean(0);
        for line in lines {
            self.squid.wait_for_line(&[line]);
        }
        self.squid.assert_names_alone();
    }
}

#[test]
fn curl_and_wget() {
    let world = world(ANY, "head -c 3000000 /dev/urandom >files/large; cp files/large /dev/null");
    for scheme in ["http", "https"] {
        let at = format!("{scheme}://web.origin.test");
        assert_eq!(world.guest(&format!("curl -sSf --cacert $ca {at}/")), "hello from web.origin.test\n");
        assert_eq!(
            world.guest(&format!("wget -q -O - --ca-certificate=$ca {at}/")),
            "hello from web.origin.test\n"
        );
        // Two on one connection; a body that is sent in chunks and comes back; a body of chunks; a part; a head.
        let said = world.guest(&format!("curl -sSf --cacert $ca {at}/ {at}/ -w '%{{num_connects}} '"));
        assert_eq!(said, "hello from web.origin.test\n1 hello from web.origin.test\n0 ");
        let sums = world.guest(&format!(
            "cd $(mktemp -d); curl -sSf --cacert $ca -o one {at}/large; wget -q -O two --ca-certificate=$ca {at}/large
             head -c 1000000 one >start; curl -sSf --cacert $ca -C - -o start {at}/large
             curl -sSf --cacert $ca -o back -T - {at}/echo <one; cat one two start back | md5sum
             cat one one one one | md5sum; wc -c <one; rm -r $PWD"
        ));
        let lines: Vec<&str> = sums.lines().collect();
        assert_eq!((lines[0], lines[2]), (lines[1], "3000000"), "{sums}");
        assert_eq!(world.guest(&format!("curl -sSf --cacert $ca {at}/chunks | wc -c")).trim(), "5000");
        assert!(
            world.guest(&format!("curl -sSfI --cacert $ca {at}/large")).contains("Content-Length: 3000000")
        );
    }
    for version in ["1.2", "1.3"] {
        let max =
            format!("curl -sSf --cacert $ca --tlsv{version} --tls-max {version} https://web.origin.test/");
        assert_eq!(world.guest(&max), "hello from web.origin.test\n");
        let tls = format!("TLSv{version}");
        assert_eq!(world.origins.requests().last().unwrap().tls, tls);
        let option = format!("-tls{}", version.replace('.', "_"));
        let said = world.guest(&format!("openssl s_client -connect other.origin.test:443 -servername other.origin.test -verify_return_error -CAfile $ca {option} </dev/null 2>&1"));
        assert!(said.contains("Verify return code: 0 (ok)") && said.contains(&tls), "{said}");
    }
    // No SNI: the proxy is told what there is.
    let said = world.guest("curl -sSf --cacert $ca https://198.18.9.1/");
    assert_eq!(said, "hello from 198.18.9.1\n");
    world.hythe.stop().assert_clean(0);
    for line in [
        "GET http://web.origin.test/large",
        "PUT http://web.origin.test/echo",
        "HEAD http://web.origin.test/large",
        "CONNECT web.origin.test:443",
        "CONNECT other.origin.test:443",
        "CONNECT 198.18.9.1:443",
    ] {
        world.squid.wait_for_line(&[line]);
    }
}

#[test]
fn pythons_requests_and_urllib() {
    for cell in [Cell::new(Engine::IoUring, 2), Cell::new(Engine::Epoll, 2)] {
        let world = world(cell, "");
        let said = world.python(
            r#"
import json, ssl, sys, urllib.request
import requests
ca = sys.argv[1]
context = ssl.create_default_context(cafile=ca)
for scheme in "http", "https":
    at = f"{scheme}://python.origin.test"
    with requests.Session() as session:
        session.verify = ca
        for _ in range(3):
            assert session.get(at + "/").text == "hello from python.origin.test\n"
        pieces = [b"piece %d " % number for number in range(5000)]
        assert session.post(at + "/echo", data=iter(pieces)).content == b"".join(pieces)
        assert session.post(at + "/echo", data=b"x" * 1_000_000).content == b"x" * 1_000_000
        assert session.get(at + "/absent").status_code == 404
        assert len(session.get(at + "/chunks").content) == 5000
        assert session.head(at + "/").headers["content-length"] == "30"
    with urllib.request.urlopen(at + "/", context=context) as answer:
        assert answer.read() == b"hello from python.origin.test\n"
    body = urllib.request.Request(at + "/echo", data=b"urllib", method="PUT")
    with urllib.request.urlopen(body, context=context) as answer:
        assert answer.read() == b"urllib"
print("done")
"#,
        );
        assert_eq!(said, "done\n");
        world.end(&["POST http://python.origin.test/echo", "CONNECT python.origin.test:443"]);
    }
}

#[test]
fn git_clones_and_pushes() {
    let repository = "
        git=/usr/bin/git; export HOME=$PWD GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
        $git init -q --bare git/tree.git; $git -C git/tree.git config http.receivepack true
        $git init -q work; cd work; head -c 400000 /dev/urandom >blob; $git add .; $git commit -qm first
        $git push -q ../git/tree.git HEAD:refs/heads/trunk; $git -C ../git/tree.git symbolic-ref HEAD refs/heads/trunk";
    let world = world(ANY, repository);
    for scheme in ["http", "https"] {
        let said = world.guest(&format!(
            "export HOME=$(mktemp -d) GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
             git=\"/usr/bin/git -c http.sslCAInfo=$ca\"; cd $HOME; at={scheme}://git.origin.test/git/tree.git
             $git clone -q $at tree; cd tree; head -c 3000000 /dev/urandom >{scheme}; $git add .; $git commit -qm {scheme}
             $git push -q origin HEAD:trunk; $git ls-remote -q $at HEAD | cut -f 1; $git rev-parse HEAD; rm -r $HOME"
        ));
        let lines: Vec<&str> = said.lines().collect();
        assert!(lines.len() == 2 && lines[0] == lines[1], "{said}");
    }
    world.end(&["POST http://git.origin.test/git/tree.git/git-receive-pack", "CONNECT git.origin.test:443"]);
}

#[test]
fn apt_updates_and_downloads() {
    let repository = "
        mkdir -p package/DEBIAN package/usr; head -c 1000000 /dev/urandom >package/usr/blob
        printf 'Package: small\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b>\nDescription: small\n' >package/DEBIAN/control
        mkdir -p files/apt; dpkg-deb -b package files/apt/small.deb >/dev/null; cd files/apt
        { cat ../../package/DEBIAN/control; printf 'Filename: ./small.deb\nSize: %s\nSHA256: %s\n' \
            $(wc -c <small.deb) $(sha256sum small.deb | cut -d ' ' -f 1); } >Packages
        printf 'Suite: x\nSHA256:\n %s %s Packages\n' $(sha256sum Packages | cut -d ' ' -f 1) $(wc -c <Packages) >Release";
    let world = world(ANY, repository);
    for scheme in ["http", "https"] {
        let said = world.guest(&format!(
            "cd $(mktemp -d); mkdir -p lists/partial cache/archives/partial parts; : >status
             echo 'deb [trusted=yes] {scheme}://apt.origin.test/apt ./' >list
             cat >conf <<END
Dir::State \"$PWD\"; Dir::State::status \"$PWD/status\"; Dir::Cache \"$PWD/cache\"; Dir::Etc::SourceList \"$PWD/list\";
Dir::Etc::SourceParts \"$PWD/parts\"; Dir::Etc::Parts \"$PWD/parts\"; Dir::Etc::main \"/dev/null\"; APT::Sandbox::User \"root\";
Acquire::https::CAInfo \"$ca\"; Acquire::Retries \"0\"; Acquire::Languages \"none\";
END
             export APT_CONFIG=$PWD/conf; apt-get -qq update; apt-get -qq download small >/dev/null; dpkg-deb -f small_1.0_all.deb Package; rm -r $PWD"
        ));
        assert_eq!(said.lines().last(), Some("small"), "{said}");
    }
    world.end(&["GET http://apt.origin.test/apt/./small.deb", "CONNECT apt.origin.test:443"]);
}

#[test]
fn a_puller_of_images() {
    let world = world(ANY, "");
    let script = r#"
        cd $(mktemp -d); at=https://registry.origin.test; curl="curl -sS --cacert $ca"
        $curl -D head -o /dev/null $at/v2/; grep -q '401' head
        realm=$(sed -n 's/.*realm="\([^"]*\)".*/\1/p' head)
        token=$($curl -f $realm | sed 's/.*"token": "\([^"]*\)".*/\1/')
        with="$curl -f -H Authorization:\ Bearer\ $token"
        eval $with -o manifest $at/v2/image/manifests/latest
        digest=$(sed 's/.*"digest": "\([^"]*\)".*/\1/' manifest)
        # The layer lies somewhere else, and comes in two parts.
        eval $with -L -o layer -r 0-399999 $at/v2/image/blobs/$digest || true; head -c 400000 layer >part; mv part layer
        eval $with -L -C - -o layer $at/v2/image/blobs/$digest
        echo sha256:$(sha256sum layer | cut -d ' ' -f 1); echo $digest; rm -r $PWD
    "#;
    let said = world.guest(script);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 2 && lines[0] == lines[1] && lines[0].len() == 71, "{said}");
    world.end(&["CONNECT registry.origin.test:443", "CONNECT blobs.origin.test:443"]);
}

#[test]
fn a_client_of_websockets() {
    let world = world(ANY, "");
    let said = world.python(
        r#"
import asyncio, ssl, sys
import websockets

async def talk(url, **more):
    async with websockets.connect(url, max_size=None, **more) as socket:
        for size in 0, 1, 125, 126, 65536, 3_000_000:
            for message in "x" * size, b"y" * size:
                await socket.send(message)
                assert await socket.recv() == message
        await asyncio.gather(*[socket.send(str(number)) for number in range(100)])
        assert [await socket.recv() for _ in range(100)] == [str(number) for number in range(100)]
        await asyncio.wait_for(await socket.ping(), 20)

async def both():
    context = ssl.create_default_context(cafile=sys.argv[1])
    await talk("ws://websocket.origin.test/")
    await talk("wss://websocket.origin.test/", ssl=context)
    print("done")

asyncio.run(both())
"#,
    );
    assert_eq!(said, "done\n");
    world.end(&["GET http://websocket.origin.test/", "CONNECT websocket.origin.test:443"]);
}
