//! What of a resolver's answer matters to who keeps it: where its times to live are, and for how long it holds.
//!
//! The records are stepped over, not decoded: each is seen once, whatever its length and its pointers say.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::rr::RecordType;

use super::message::{HEADER_LEN, NameEnd, skip_name};

/// RFC 9520, 3.2: a failure is remembered for at least a second, and here for hardly more: the network may just have come up.
const FAILURE_S: u32 = 2;
/// RFC 2308, 5, lets who keeps "no such name" forget it sooner than its zone says: a VPN that comes may know better.
const ABSENCE_MAX_S: u32 = 60;
/// As long is believed of anything.
const LIFETIME_MAX_S: u32 = 86_400;

/// RFC 1035, 4.1.1.
const NOERROR: u8 = 0;
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

/// How an answer can be kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Keeping {
    /// Where its times to live are, in bytes from its start.
    pub ttls: Box<[u16]>,
    /// For how long it holds.
    pub lifetime: Duration,
}

/// A record, as far as it is read.
struct RecordHead<'r> {
    kind: u16,
    ttl_at: usize,
    /// Of an OPT record: extended code, version, flags.
    ttl: u32,
    data: &'r [u8],
    end: usize,
}

impl<'r> RecordHead<'r> {
    fn read(reply: &'r [u8], at: usize) -> Option<Self> {
        let (fixed, _) = skip_name(reply, at)?;
        let &[k0, k1, _, _, t0, t1, t2, t3, l0, l1] = reply.get(fixed..fixed + 10)? else { return None };
        let end = fixed + 10 + usize::from(u16::from_be_bytes([l0, l1]));
        Some(Self {
            kind: u16::from_be_bytes([k0, k1]),
            ttl_at: fixed + 4,
            ttl: u32::from_be_bytes([t0, t1, t2, t3]),
            data: reply.get(fixed + 10..end)?,
            end,
        })
    }
}

/// How an answer can be kept that has the question that was asked; `None` where it cannot: it is cut short, a failure of a
/// kind that says nothing for later, signed for one transaction, malformed, or says itself that it does not last.
pub(super) fn keeping(reply: &[u8]) -> Option<Keeping> {
    let &[_, _, flags, flags_and_code, q0, q1, a0, a1, n0, n1, r0, r1] = reply.get(..HEADER_LEN)? else {
        return None;
    };
    let is_truncated = flags & 2 != 0;
    let code = flags_and_code & 15;
    let question = skip_name(reply, HEADER_LEN).filter(|(_, end)| *end == NameEnd::Root)?;
    if is_truncated || [q0, q1] != [0, 1] || ![NOERROR, SERVFAIL, NXDOMAIN].contains(&code) {
        return None;
    }
    let mut at = question.0 + 4;
    let mut ttls = Vec::new();
    let mut least = LIFETIME_MAX_S;
    let mut absence = None;
    let counts = [[a0, a1], [n0, n1], [r0, r1]].map(u16::from_be_bytes);
    for (section, count) in counts.into_iter().enumerate() {
        for _ in 0..count {
            let record = RecordHead::read(reply, at)?;
            at = record.end;
            match RecordType::from(record.kind) {
                // RFC 6891, 6.1.3: the upper bits of the code, and the version. A code that is not zero is not `code`.
                RecordType::OPT if record.ttl >> 16 == 0 => continue,
                RecordType::OPT | RecordType::TSIG | RecordType::SIG => return None,
                // RFC 2308, 3 and 5: the last number is for how long there is no such thing.
                RecordType::SOA if section == 1 => absence = record.data.last_chunk().copied(),
                _ => {}
            }
            // RFC 2181, 8: with the highest bit set, it is zero.
            least = least.min(if record.ttl >> 31 == 0 { record.ttl } else { 0 });
            ttls.push(u16::try_from(record.ttl_at).ok()?);
        }
    }
    if at != reply.len() {
        return None;
    }
    let lifetime_s = match (code, absence) {
        (SERVFAIL, _) => FAILURE_S,
        (_, Some(minimum)) => least.min(u32::from_be_bytes(minimum)).min(ABSENCE_MAX_S),
        // RFC 2308, 5: what is not there, and not for how long, is not kept.
        (NOERROR, None) if counts[0] > 0 => least,
        _ => return None,
    };
    let lifetime = Duration::from_secs(lifetime_s.into());
    (lifetime_s > 0).then_some(Keeping { ttls: ttls.into(), lifetime })
}

/// The addresses among the answers of a reply, as far as it can be read.
pub(super) fn addresses(reply: &[u8]) -> Vec<IpAddr> {
    let Some(&[_, _, _, _, _, _, a0, a1, ..]) = reply.get(..HEADER_LEN) else { return Vec::new() };
    let Some((end, _)) = skip_name(reply, HEADER_LEN) else { return Vec::new() };
    let mut at = end + 4;
    let mut addresses = Vec::new();
    for _ in 0..u16::from_be_bytes([a0, a1]) {
        let Some(record) = RecordHead::read(reply, at) else { break };
        at = record.end;
        addresses.extend(match RecordType::from(record.kind) {
            RecordType::A => <[u8; 4]>::try_from(record.data).ok().map(IpAddr::from),
            RecordType::AAAA => <[u8; 16]>::try_from(record.data).ok().map(IpAddr::from),
            _ => None,
        });
    }
    addresses
}

/// Lets so many seconds pass of the times to live at these places. What they were was longer, or is nothing.
pub(super) fn age(reply: &mut [u8], ttls: &[u16], seconds: u32) {
    for at in ttls {
        if let Some(place) = reply[usize::from(*at)..].first_chunk_mut::<4>() {
            *place = u32::from_be_bytes(*place).saturating_sub(seconds).to_be_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow::dns::fake_server::{query, reply_to, with_code, with_opt, with_record};
    use proptest::prelude::*;

    const A: u16 = 1;
    const SOA: u16 = 6;
    const TSIG: u16 = 250;

    fn reply() -> Vec<u8> {
        reply_to(&query("example.com.", RecordType::A, 1))
    }

    fn soa(minimum: u32) -> Vec<u8> {
        [&[0; 18][..], &minimum.to_be_bytes()].concat()
    }

    fn lifetime_s(reply: &[u8]) -> Option<u64> {
        keeping(reply).map(|keeping| keeping.lifetime.as_secs())
    }

    #[test]
    fn an_answer_holds_as_long_as_its_shortest_record() {
        let answer = with_record(reply(), 0, A, 300, &[1; 4]);
        assert_eq!(lifetime_s(&answer), Some(300));
        let answer = with_record(answer, 1, 2, 200, &[0]);
        let answer = with_record(answer, 2, A, 250, &[2; 4]);
        let kept = keeping(&with_opt(answer.clone(), 0, true, b"\x00\x0f\x00\x02ab")).unwrap();
        assert_eq!((kept.lifetime.as_secs(), kept.ttls.len()), (200, 3), "an OPT record has no time to live");
        let mut aged = answer.clone();
        age(&mut aged, &kept.ttls, 199);
        assert_eq!(lifetime_s(&aged), Some(1));
        assert_eq!(aged.len(), answer.len());
        assert_eq!(lifetime_s(&with_record(reply(), 0, A, 1 << 30, &[1; 4])), Some(86_400));
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_odd_to_be_looked_at(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(addresses(&bytes).len() <= bytes.len() / 15);
            keeping(&bytes);
        }
    }

    #[test]
    fn addresses_are_read_as_far_as_they_go() {
        let answer = with_record(reply(), 0, 5, 300, &[0]);
        let answer = with_record(answer, 0, A, 300, &[203, 0, 113, 1]);
        let answer = with_record(answer, 0, A, 300, &[1, 2, 3]);
        let answer = with_record(answer, 0, 28, 300, &[0x20; 16]);
        let read = addresses(&answer);
        assert_eq!(
            read,
            ["203.0.113.1", "2020:2020:2020:2020:2020:2020:2020:2020"]
                .map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        for len in 0..answer.len() {
            assert!(addresses(&answer[..len]).len() <= 1);
        }
    }

    #[test]
    fn what_is_not_there_is_remembered_as_its_zone_says_and_not_for_long() {
        for code in [NOERROR, NXDOMAIN] {
            let none = with_code(reply(), code);
            assert_eq!(lifetime_s(&none), None, "{code}: nobody says for how long");
            assert_eq!(lifetime_s(&with_record(none.clone(), 1, SOA, 40, &soa(30))), Some(30));
            assert_eq!(lifetime_s(&with_record(none.clone(), 1, SOA, 20, &soa(30))), Some(20));
            assert_eq!(lifetime_s(&with_record(none.clone(), 1, SOA, 9000, &soa(9000))), Some(60));
            assert_eq!(lifetime_s(&with_record(none, 1, SOA, 9000, &soa(0))), None);
        }
        // An alias that leads to a name without such records.
        let alias = with_record(reply(), 0, 5, 500, &[0]);
        assert_eq!(lifetime_s(&with_record(alias, 1, SOA, 40, &soa(30))), Some(30));
    }

    #[test]
    fn what_does_not_last_is_not_kept() {
        let answer = with_record(reply(), 0, A, 300, &[1; 4]);
        let edited = |at: usize, value: u8| {
            let mut bytes = answer.clone();
            bytes[at] = value;
            bytes
        };
        assert_eq!(lifetime_s(&edited(2, 0x83)), None, "cut short");
        assert_eq!(lifetime_s(&edited(5, 2)), None, "two questions");
        for code in [1, 4, 5, 6, 9, 15] {
            assert_eq!(lifetime_s(&with_code(answer.clone(), code)), None, "{code}");
        }
        assert_eq!(lifetime_s(&with_code(answer.clone(), SERVFAIL)), Some(u64::from(FAILURE_S)));
        for ttl in [0, 1 << 31, u32::MAX] {
            assert_eq!(lifetime_s(&with_record(answer.clone(), 0, A, ttl, &[1; 4])), None, "{ttl}");
        }
        assert_eq!(lifetime_s(&with_record(answer.clone(), 2, TSIG, 300, &[0; 20])), None, "signed for once");
        assert_eq!(lifetime_s(&with_opt(answer.clone(), 1, false, &[])), None, "an EDNS version to come");
        let mut bad = with_opt(answer.clone(), 0, false, &[]);
        let code = bad.len() - 6;
        bad[code] = 1;
        assert_eq!(lifetime_s(&bad), None, "BADVERS: its lower bits are NOERROR");
        assert_eq!(lifetime_s(&answer[..answer.len() - 1]), None, "cut off");
        assert_eq!(lifetime_s(&[&answer[..], b"behind"].concat()), None);
        assert_eq!(lifetime_s(&answer[..11]), None);
        assert_eq!(lifetime_s(&edited(7, 200)), None, "more records than there are");
    }
}
