//! A server that others wrote, nsd(8), with a signed zone that has a record of every common type and some odd ones.

use std::net::IpAddr;

use super::directory::Directory;
use super::netns::Netns;
use super::program::Program;
use super::wait::wait_until;

/// The zone, before it is signed. Where a test speaks of a name of `signed.test`, it is here.
const ZONE: &str = r#"
$ORIGIN signed.test.
$TTL 3600
@ SOA ns hostmaster 1 3600 600 86400 3600
@ NS ns
@ A 203.0.113.1
@ MX 10 mail
@ MX 20 mail2
@ TXT "v=spf1 -all"
@ CAA 0 issue "ca.test"
ns A 198.51.100.1
ns AAAA 2001:db8::1
mail A 203.0.113.25
mail2 AAAA 2001:db8::25
www CNAME web
web A 203.0.113.80
web A 203.0.113.81
web AAAA 2001:db8::80
dangling CNAME nowhere
chain1 CNAME chain2
chain2 CNAME web
_http._tcp SRV 1 2 8080 web
sip NAPTR 100 10 "S" "SIP+D2T" "" _sip._tcp
ssh SSHFP 4 2 123456789abcdef67890123456789abcdef67890123456789abcdef123456789
_443._tcp.web TLSA 3 1 1 92003ba34942dc74152e2f2c408d29eca5a520e7f2e06bb944f4dca346baf63c
svc HTTPS 1 . alpn=h2,h3 ipv4hint=203.0.113.80
svc SVCB 0 web
here LOC 52 22 23.000 N 4 53 32.000 E -2.00m 0.00m 10000m 10m
uri URI 10 1 "https://web.signed.test/"
info HINFO "PC" "Linux"
rp RP hostmaster web
key OPENPGPKEY AQIDBAUGBwgJ
odd TYPE65400 \# 4 0a0b0c0d
*.wild A 203.0.113.99
a.b.deep A 203.0.113.7
tree DNAME elsewhere.test.
child NS ns.child
ns.child A 203.0.113.53
secure NS ns.secure
secure DS 33850 13 2 9dcda9d077474a126470f1f0de2782088835ca08e03cbccaa67ee9e2b190a79f
ns.secure A 203.0.113.54
"#;
/// Addresses of `many.signed.test`: more than 512 bytes.
const MANY: usize = 40;

/// A running server.
pub struct Nsd {
    _program: Program,
    directory: Directory,
}

impl Nsd {
    /// Serves at port 53 of an address.
    pub fn start(netns: &Netns, address: IpAddr) -> Self {
        let directory = Directory::new();
        let path = directory.path().display().to_string();
        let many = (0..MANY).map(|last| format!("many A 203.0.113.{}\n", 100 + last));
        directory.file("zone", &(ZONE.to_string() + &many.collect::<String>()));
        let sign = "key=$(ldns-keygen -a ECDSAP256SHA256 -k signed.test)
                    ldns-signzone -n -f signed zone $key
                    cut -d ' ' -f 4 $key.key | tr -d '\\n' >public";
        netns.command(&["sh", "-e", "-c", &format!("cd {path}; {sign}")]);
        let config = format!(
            "server:
    ip-address: {address}
    username: \"\"
    chroot: \"\"
    zonesdir: \"{path}\"
    database: \"\"
    pidfile: \"\"
    xfrdfile: \"\"
    zonelistfile: \"{path}/zone.list\"
    rrl-ratelimit: 0
    server-count: 1
remote-control:
    control-enable: no
zone:
    name: \"signed.test\"
    zonefile: \"signed\"
"
        );
        let file = directory.file("nsd.conf", &config);
        let program = Program::start(netns, &["nsd", "-d", "-c", &file.to_string_lossy()]);
        wait_until("nsd to serve", || netns.connect((address, 53)).is_ok());
        Self { _program: program, directory }
    }

    /// The zone's key, as a file that delv(1) trusts.
    pub fn anchor(&self) -> String {
        let key = std::fs::read_to_string(self.directory.path().join("public")).unwrap();
        let key = key.split_whitespace().next_back().unwrap().to_string();
        let text = format!("trust-anchors {{ signed.test. static-key 257 3 13 \"{key}\"; }};\n");
        self.directory.file("anchor", &text).to_string_lossy().into_owned()
    }
}
