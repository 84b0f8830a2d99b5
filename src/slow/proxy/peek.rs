//! What a client's first bytes say: TLS and for whom, HTTP, or neither.
//!
//! Pure: bytes in, a verdict out. The bytes stay where they are, whoever goes on with the connection reads them again. Each
//! call begins anew, since bytes come in any pieces; it costs what is there, [`PEEK_MAX`] at the most.
//!
//! * TLS (RFC 8446, 5.1 and 4.1.2; RFC 6066, 3): the name is taken out of the ClientHello's server_name extension, as soon as that
//!   is there. The hello may lie in many records; what stands in the rest of it (GREASE, an encrypted inner hello) is stepped
//!   over. Of an encrypted hello (ECH) the outer name counts: it is where the connection goes, and the other is nobody's to know.
//! * HTTP/1 (RFC 9112, 3): a method and a request target, and the version behind them where these two alone could be words of
//!   another protocol.
//! * HTTP/2 with prior knowledge (RFC 9113, 3.4): its preface.

use crate::policy::target::host_name;

/// The first bytes that are looked at. Once there are as many, the answer is never [`Peeked::More`].
pub const PEEK_MAX: usize = 36 * 1024;

/// The longest ClientHello that is read to its end: more than twice what post-quantum key shares take today, twice a record.
const HELLO_MAX: usize = 32 * 1024;
/// The longest method that is waited for. The longest registered one has 17 letters.
const METHOD_MAX: usize = 24;
/// The longest line that is waited for, to see the version at its end.
const LINE_MAX: usize = 16 * 1024;

/// TLS: a record of the handshake, its header's length and its longest content (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;
const RECORD_HEADER: usize = 5;
const RECORD_MAX: usize = 1 << 14;
/// TLS: the first message of a client, its header's length (RFC 8446, 4).
const CLIENT_HELLO: u8 = 1;
const MESSAGE_HEADER: usize = 4;
/// TLS: the extension that names the server, and the kind of name that there is (RFC 6066, 3).
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// HTTP/2: how a connection begins, as far as it takes to know it.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n";

/// Methods that make HTTP of what they begin, if a path or a URL follows.
const METHODS: [&[u8]; 8] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE"];

/// What the first bytes say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peeked {
    /// Not enough yet.
    More,
    /// TLS.
    Tls {
        /// For whom, in small letters, if it says so by a host's name.
        name: Option<String>,
    },
    /// HTTP/1.
    Http,
    /// HTTP/2 without TLS.
    Http2,
    /// Something else.
    Other,
}

/// What a client's bytes from the first on say. `ended`: there will be no more of them, or nobody waits for them any longer;
/// then the answer is never [`Peeked::More`].
pub fn peek(bytes: &[u8], ended: bool) -> Peeked {
    let is_all = ended || bytes.len() >= PEEK_MAX;
    let bytes = &bytes[..bytes.len().min(PEEK_MAX)];
    let seen = match bytes.first() {
        None => Seen::Short(None),
        Some(&HANDSHAKE) => tls(bytes),
        Some(_) => http(bytes),
    };
    match seen {
        Seen::Is(peeked) => peeked,
        Seen::Short(_) if !is_all => Peeked::More,
        Seen::Short(likely) => likely.unwrap_or(Peeked::Other),
    }
}

/// What is seen in what is there.
enum Seen {
    Is(Peeked),
    /// It is too short to know; what it is likely to become, if that can be said.
    Short(Option<Peeked>),
}

const OTHER: Seen = Seen::Is(Peeked::Other);

/// Why there is no name.
enum Stop {
    /// It may come.
    Short,
    /// There is none.
    Nameless,
    /// This is no ClientHello.
    Malformed,
}

fn tls(bytes: &[u8]) -> Seen {
    let (hello, end) = handshake_bytes(bytes);
    match server_name(&hello) {
        Ok(name) => Seen::Is(Peeked::Tls { name: host_name(name) }),
        Err(Stop::Nameless) => Seen::Is(Peeked::Tls { name: None }),
        Err(Stop::Malformed) => OTHER,
        Err(Stop::Short) => match end {
            End::Foreign => OTHER,
            // It has begun as TLS does. Whether it is can be left to whom it is for.
            End::Short => {
                Seen::Short((hello.first() == Some(&CLIENT_HELLO)).then_some(Peeked::Tls { name: None }))
            }
        },
    }
}

/// How the records end.
enum End {
    /// For want of bytes.
    Short,
    /// By something that is no record of a handshake.
    Foreign,
}

/// The bytes of the handshake, out of as many records as are there.
fn handshake_bytes(mut bytes: &[u8]) -> (Vec<u8>, End) {
    let mut hello = Vec::with_capacity(bytes.len());
    loop {
        // A header that has begun wrong is none, however little of it is there.
        let is_header = bytes.iter().zip([HANDSHAKE, 3]).all(|(byte, expected)| *byte == expected);
        if !is_header {
            return (hello, End::Foreign);
        }
        let Some((header, rest)) = bytes.split_at_checked(RECORD_HEADER) else { return (hello, End::Short) };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if length == 0 || length > RECORD_MAX {
            return (hello, End::Foreign);
        }
        hello.extend_from_slice(&rest[..length.min(rest.len())]);
        let Some(rest) = rest.get(length..) else { return (hello, End::Short) };
        bytes = rest;
    }
}

/// The name in a ClientHello's server_name extension.
fn server_name(handshake: &[u8]) -> Result<&str, Stop> {
    let mut message = Reader(handshake);
    if message.u8()? != CLIENT_HELLO {
        return Err(Stop::Malformed);
    }
    let length = message.u24()?;
    if length > HELLO_MAX {
        return Err(Stop::Nameless);
    }
    // Fields may not reach beyond the message; until it is whole, they may reach beyond what is there.
    let is_whole = handshake.len() >= MESSAGE_HEADER + length;
    let body = &message.0[..length.min(message.0.len())];
    named(&mut Reader(body)).map_err(|stop| match stop {
        Stop::Short if is_whole => Stop::Malformed,
        other => other,
    })
}

fn named<'m>(hello: &mut Reader<'m>) -> Result<&'m str, Stop> {
    // legacy_version and random.
    if hello.take(2 + 32)?[0] != 3 {
        return Err(Stop::Malformed);
    }
    let session_id = usize::from(hello.u8()?);
    hello.take(session_id)?;
    let cipher_suites = usize::from(hello.u16()?);
    hello.take(cipher_suites)?;
    let compression_methods = usize::from(hello.u8()?);
    hello.take(compression_methods)?;
    if hello.0.is_empty() {
        // TLS 1.2 without extensions ends here; what is cut off here may go on.
        return Err(Stop::Short);
    }
    let length = usize::from(hello.u16()?);
    let mut extensions = Reader(&hello.0[..length.min(hello.0.len())]);
    let is_whole = hello.0.len() >= length;
    loop {
        if extensions.0.is_empty() && is_whole {
            return Err(Stop::Nameless);
        }
        let kind = extensions.u16()?;
        let length = usize::from(extensions.u16()?);
        let extension = extensions.take(length)?;
        if kind == SERVER_NAME {
            // Here every byte is there: what is too short is wrong.
            return match listed_name(&mut Reader(extension)) {
                Err(Stop::Short) => Err(Stop::Malformed),
                other => other,
            };
        }
    }
}

/// The host's name in a list of names.
fn listed_name<'m>(extension: &mut Reader<'m>) -> Result<&'m str, Stop> {
    let length = usize::from(extension.u16()?);
    let mut list = Reader(extension.take(length)?);
    while !list.0.is_empty() {
        let kind = list.u8()?;
        let length = usize::from(list.u16()?);
        let name = list.take(length)?;
        if kind == HOST_NAME {
            return str::from_utf8(name).map_err(|_| Stop::Nameless);
        }
    }
    Err(Stop::Nameless)
}

/// Numbers and pieces, from the front.
struct Reader<'m>(&'m [u8]);

impl<'m> Reader<'m> {
    fn take(&mut self, length: usize) -> Result<&'m [u8], Stop> {
        let (piece, rest) = self.0.split_at_checked(length).ok_or(Stop::Short)?;
        self.0 = rest;
        Ok(piece)
    }

    fn u8(&mut self) -> Result<u8, Stop> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, Stop> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u24(&mut self) -> Result<usize, Stop> {
        let bytes = self.take(3)?;
        Ok(usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]))
    }
}

fn http(bytes: &[u8]) -> Seen {
    if bytes.starts_with(PREFACE) {
        return Seen::Is(Peeked::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return Seen::Short(None);
    }
    // RFC 9112, 2.2: empty lines before a request are passed over.
    let line = bytes.trim_ascii_start();
    let skipped = &bytes[..bytes.len() - line.len()];
    if skipped.len() > 4 || skipped.iter().any(|byte| !matches!(byte, b'\r' | b'\n')) {
        return OTHER;
    }
    let end = line.iter().position(|byte| !is_token(*byte)).unwrap_or(line.len());
    let (method, rest) = line.split_at(end);
    if method.len() > METHOD_MAX {
        return OTHER;
    }
    match rest.first() {
        None => Seen::Short(None),
        Some(b' ') if !method.is_empty() => request(method, &rest[1..]),
        Some(_) => OTHER,
    }
}

/// What follows a method: a target, the version, the line's end.
fn request(method: &[u8], rest: &[u8]) -> Seen {
    if METHODS.contains(&method) {
        let has_scheme =
            |scheme: &[u8]| rest.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
        if rest.starts_with(b"/") || has_scheme(b"http://") || has_scheme(b"https://") {
            return Seen::Is(Peeked::Http);
        }
    }
    let Some(end) = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
        let is_line = rest.len() <= LINE_MAX && rest.iter().all(|byte| (0x20..0x7f).contains(byte));
        return if is_line { Seen::Short(None) } else { OTHER };
    };
    let mut words = rest[..end].split(|byte| *byte == b' ');
    let (target, version) = (words.next(), words.next());
    let has_target =
        target.is_some_and(|target| !target.is_empty() && target.iter().all(u8::is_ascii_graphic));
    let has_version = matches!(version, Some(b"HTTP/1.1" | b"HTTP/1.0"));
    if has_target && has_version && words.next().is_none() { Seen::Is(Peeked::Http) } else { OTHER }
}

/// RFC 9110, 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An extension: its kind and its content behind their lengths.
    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(content.len() as u16).to_be_bytes(), content].concat()
    }

    /// The server_name extension (RFC 6066, 3).
    fn sni(name: &[u8]) -> Vec<u8> {
        let entry = [&[HOST_NAME][..], &(name.len() as u16).to_be_bytes(), name].concat();
        extension(SERVER_NAME, &[&(entry.len() as u16).to_be_bytes()[..], &entry].concat())
    }

    /// A ClientHello's message, with these extensions.
    fn hello(extensions: &[Vec<u8>]) -> Vec<u8> {
        let extensions = extensions.concat();
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(32);
        body.extend([9; 32]);
        // GREASE (RFC 8701), then two of TLS 1.3.
        body.extend([0, 6, 0x1a, 0x1a, 0x13, 0x01, 0x13, 0x02]);
        body.extend([1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let length = (body.len() as u32).to_be_bytes();
        [&[CLIENT_HELLO, length[1], length[2], length[3]][..], &body].concat()
    }

    /// A message in records of this many bytes.
    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let record =
            |piece: &[u8]| [&[HANDSHAKE, 3, 1][..], &(piece.len() as u16).to_be_bytes(), piece].concat();
        message.chunks(size).flat_map(record).collect()
    }

    fn named(name: &str) -> Peeked {
        Peeked::Tls { name: Some(name.to_string()) }
    }

    const NAMELESS: Peeked = Peeked::Tls { name: None };
    /// Extensions that no one knows (RFC 8701), of each length that they have.
    fn grease() -> [Vec<u8>; 2] {
        [extension(0x0a0a, &[]), extension(0xfafa, &[0])]
    }

    /// Whatever part of the bytes is there, the answer is "more" or the last one, and once that, for ever.
    fn comes_to(bytes: &[u8], expected: &Peeked) {
        let mut known = false;
        for end in 0..=bytes.len() {
            let peeked = peek(&bytes[..end], false);
            assert!(peeked == *expected || (!known && peeked == Peeked::More), "{peeked:?} at {end}");
            known = peeked == *expected;
            assert_ne!(peek(&bytes[..end], true), Peeked::More);
        }
        assert!(known, "{expected:?} was not seen");
    }

    /// What `openssl s_client -tls1_2 -servername www.example.com` of OpenSSL 3.0.19 says first.
    const OPENSSL_TLS_1_2: &str = "16030100cf010000cb03037af4a3fe3bb2af4387bf5adfc7d24e57c1c4ba808188f529d83a3040725779ed0000 \
        38c02cc030009fcca9cca8ccaac02bc02f009ec024c028006bc023c0270067c00ac0140039c009c0130033009d \
        009c003d003c0035002f00ff0100006a00000014001200000f7777772e6578616d706c652e636f6d000b000403 \
        000102000a000c000a001d0017001e00190018002300000016000000170000000d002a00280403050306030807 \
        08080809080a080b080408050806040105010601030303010302040205020602";
    /// The same with `-tls1_3 -groups X25519`.
    const OPENSSL_TLS_1_3: &str = "16030100e2010000de030301fb4e9adfd7d122a7283dec1b32c6fe5ef5b71c5c17b69dcaa4408c39932b082077 \
        6701d23b7913fcbb8fc193a176d733f901b331a769ef8b844c5fcc2fa724be000813021303130100ff0100008d \
        00000014001200000f7777772e6578616d706c652e636f6d000b000403000102000a00040002001d0023000000 \
        16000000170000000d001e001c040305030603080708080809080a080b080408050806040105010601002b0003 \
        020304002d00020101003300260024001d0020aa979707c4ce0dd98c4994216620ba75de6caf3ed68e7efcd098 \
        f9cfb86f7218";
    /// The same with `-tls1_3 -noservername`.
    const OPENSSL_NAMELESS: &str = "16030100dc010000d80303ee2ca2064df086ad0f2698b2f2773666a6d12d0dfbd6ec38e9dfce19671b5f912079 \
        a3231e46b99ab01175c65ca8b2616a400cf52bd7ffe84cb09450f90d5202ef000813021303130100ff01000087 \
        000b000403000102000a00160014001d0017001e00190018010001010102010301040023000000160000001700 \
        00000d001e001c040305030603080708080809080a080b080408050806040105010601002b0003020304002d00 \
        020101003300260024001d00203efe7e8ac5d87feeb9252e19e545e23d2fb2ed482a537da672672100df0f0e53";

    fn bytes_of(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> =
            hex.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    #[test]
    fn the_hellos_of_openssl_are_understood_wherever_they_are_cut() {
        for (hex, expected) in [
            (OPENSSL_TLS_1_2, named("www.example.com")),
            (OPENSSL_TLS_1_3, named("www.example.com")),
            (OPENSSL_NAMELESS, NAMELESS),
        ] {
            let bytes = bytes_of(hex);
            comes_to(&bytes, &expected);
            for size in [1, 50] {
                comes_to(&records(&bytes[RECORD_HEADER..], size), &expected);
            }
        }
    }

    #[test]
    fn the_name_is_found_however_the_hello_is_cut() {
        let [a, b] = grease();
        let message =
            hello(&[a, extension(43, &[2, 3, 4]), sni(b"www.Example.com"), extension(51, &[5; 1216]), b]);
        for size in [1, 3, 7, 100, 16384] {
            comes_to(&records(&message, size), &named("www.example.com"));
        }
    }

    #[test]
    fn the_name_may_come_last_in_16_kib_and_more() {
        for padding in [16_000, 16_384, 25_000, 32_000] {
            let message = hello(&[extension(21, &vec![0; padding]), sni(b"a.test")]);
            let bytes = records(&message, RECORD_MAX);
            assert_eq!(peek(&bytes, false), named("a.test"));
            assert_eq!(peek(&bytes[..bytes.len() - 1], false), Peeked::More);
            assert_eq!(peek(&records(&message, 1000), false), named("a.test"));
        }
        let endless = hello(&[extension(21, &vec![0; 33_000]), sni(b"a.test")]);
        assert_eq!(peek(&records(&endless, RECORD_MAX)[..100], false), NAMELESS);
        // One byte a record: six times as long, and no longer waited for.
        let message = hello(&[extension(21, &vec![0; 16_000]), sni(b"a.test")]);
        assert_eq!(peek(&records(&message, 1), false), NAMELESS);
    }

    #[test]
    fn of_an_encrypted_hello_the_outer_name_counts() {
        // The outer kind, HKDF-SHA256 and AES-128-GCM, a configuration's number, a key of 32 bytes, a payload.
        let inner = sni(b"inner.test");
        let ech =
            [&[0, 0, 1, 0, 1, 9, 0, 32][..], &[4; 32], &(inner.len() as u16).to_be_bytes(), &inner].concat();
        let message = hello(&[extension(0xfe0d, &ech), sni(b"outer.test")]);
        comes_to(&records(&message, 50), &named("outer.test"));
    }

    #[test]
    fn a_hello_without_a_hosts_name_is_nameless() {
        let long = [b'a'; 300];
        let entry_of_other_kind = extension(SERVER_NAME, &[0, 4, 7, 0, 1, b'x']);
        for extensions in [
            vec![],
            grease().to_vec(),
            vec![sni(b"192.0.2.1")],
            vec![sni(b"2001:db8::1")],
            vec![sni(b"[::1]")],
            vec![sni(b"")],
            vec![sni(b"a b")],
            vec![sni(b"a\0b")],
            vec![sni(b"a/../b")],
            vec![sni(b"a\r\nHost: b")],
            vec![sni(b"\xff\xfe")],
            vec![sni("ä.test".as_bytes())],
            vec![sni(&long)],
            vec![entry_of_other_kind],
            vec![extension(SERVER_NAME, &[0, 0])],
        ] {
            comes_to(&records(&hello(&extensions), 60), &NAMELESS);
        }
    }

    #[test]
    fn what_is_no_hello_is_something_else() {
        let good = hello(&[sni(b"a.test")]);
        let with = |at: usize, byte: u8| {
            let mut bytes = records(&good, RECORD_MAX);
            bytes[at] = byte;
            bytes
        };
        let short_name = extension(SERVER_NAME, &[0, 9, 0, 0, 1, b'x']);
        for bytes in [
            with(1, 2),
            with(3, 0xff),
            with(5, 2),
            with(9, 2),
            records(&hello(&[short_name]), 99),
            vec![22, 3, 1, 0, 0],
            b"\x16hello".to_vec(),
        ] {
            assert_eq!(peek(&bytes, false), Peeked::Other, "{bytes:?}");
        }
        // An alert in the middle of the hello.
        let cut = [&records(&good[..20], 99)[..], &[21, 3, 1, 0, 2, 1, 0]].concat();
        assert_eq!(peek(&cut, false), Peeked::Other);
        // A message that ends within its fields.
        let mut ends = good.clone();
        ends[3] = 60;
        assert_eq!(peek(&records(&ends, RECORD_MAX), false), Peeked::Other);
    }

    #[test]
    fn a_hello_that_stops_is_still_tls() {
        let bytes = records(&hello(&[extension(21, &[0; 100]), sni(b"a.test")]), RECORD_MAX);
        assert_eq!(peek(&bytes[..3], true), Peeked::Other);
        assert_eq!(peek(&bytes[..80], true), NAMELESS);
    }

    #[test]
    fn requests_of_http_are_known() {
        for request in [
            "GET / HTTP/1.1\r\n",
            "GET /index.html?a=b HTTP/1.0\r\nHost: x\r\n\r\n",
            "\r\nPOST /x HTTP/1.1\r\n",
            "OPTIONS * HTTP/1.1\r\n",
            "GET http://example.com/ HTTP/1.1\r\n",
            "PROPFIND /dav HTTP/1.1\r\n",
            "CONNECT example.com:443 HTTP/1.1\r\n",
            "M-SEARCH * HTTP/1.1\r\n",
            "PRINT / HTTP/1.1\n",
            "P / HTTP/1.1\r\n",
            "GET /\r\n",
        ] {
            comes_to(request.as_bytes(), &Peeked::Http);
        }
        let long = format!("GET /{}", "a".repeat(100_000));
        assert_eq!(peek(long.as_bytes(), false), Peeked::Http, "whoever serves it says that it is too long");
        assert_eq!(peek(b"GET /slow", true), Peeked::Http);
    }

    #[test]
    fn http_2_is_known_by_its_preface() {
        comes_to(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &Peeked::Http2);
        assert_eq!(peek(b"PRI * HTTP/2.0", true), Peeked::Other);
        comes_to(b"PRI * HTTP/2.1\r\n", &Peeked::Other);
    }

    #[test]
    fn other_protocols_are_something_else() {
        for bytes in [
            &b"SSH-2.0-OpenSSH_9.6 Debian\r\n"[..],
            b"EHLO mail.example\r\n",
            b"GET key\r\n",
            b"set foo 0 0 3\r\n",
            b"PING\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"USER anonymous\r\n",
            b"GET a b HTTP/1.1\r\n",
            b"FOO bar HTTP/2.0\r\n",
            b"FOO bar HTTP/1.1 x\r\n",
            b" GET / HTTP/1.1\r\n",
            b"\r\n\r\n\r\n",
            b"\0\0\0\x08\x04\xd2\x16/",
            b"\x80\x2e\x01\0\x02",
            b"\x10\x10\0\x04MQTT",
            b"g\xc3\xa9t / HTTP/1.1\r\n",
            b"abcdefghijklmnopqrstuvwxyz / HTTP/1.1\r\n",
        ] {
            comes_to(bytes, &Peeked::Other);
        }
        assert_eq!(peek(b"", true), Peeked::Other);
        assert_eq!(peek(b"GE", true), Peeked::Other);
        assert_eq!(peek(&[b"FOO "[..].to_vec(), vec![b'a'; LINE_MAX + 1]].concat(), false), Peeked::Other);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), shape in 0u8..3) {
            let bytes = match shape {
                0 => bytes,
                1 => records(&bytes, 70),
                _ => records(&[&[CLIENT_HELLO, 0, 0, bytes.len() as u8, 3][..], &bytes].concat(), 70),
            };
            peek(&bytes, false);
            prop_assert_ne!(peek(&bytes, true), Peeked::More);
        }

        /// One byte of a good hello is another: any answer will do, but what comes first is never taken back.
        #[test]
        fn an_answer_is_never_taken_back(at: proptest::sample::Index, byte: u8, size in 1usize..200) {
            let [a, b] = grease();
            let message = hello(&[a, extension(43, &[2, 3, 4]), sni(b"www.example.com"), b]);
            let mut bytes = records(&message, size);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let answers: Vec<_> = (0..=bytes.len()).map(|end| peek(&bytes[..end], false)).collect();
            let first = answers.iter().position(|answer| *answer != Peeked::More).unwrap_or(bytes.len());
            for answer in &answers[first..] {
                prop_assert_eq!(answer, &answers[first]);
            }
        }

        #[test]
        fn nor_by_lines(text in "(GET|PRI|FOO|\r\n| ){0,2}[ /*a-c.]{0,9}(HTTP/[12].[01])?[\r\n]{0,3}") {
            let answers: Vec<_> = (0..=text.len()).map(|end| peek(&text.as_bytes()[..end], false)).collect();
            let first = answers.iter().position(|answer| *answer != Peeked::More).unwrap_or(text.len());
            for answer in &answers[first..] {
                prop_assert_eq!(answer, &answers[first]);
            }
        }
    }
}
