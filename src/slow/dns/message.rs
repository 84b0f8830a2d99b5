//! Messages, read as far as a forwarder must and no further, and the answers that hythe itself gives.
//!
//! Of a query the header, the question and the OPT record are understood; the other records are only stepped over, so
//! that whatever a guest puts there reaches the resolver. Names in those records are not decompressed: 65,535 bytes can
//! hold thousands of names that each chase thousands of pointers.

use hickory_proto::op::{self, Edns, Header, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{DNSClass, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::Transport;
use super::flights::Flight;
use super::names::Found;

/// The length of a header (RFC 1035, 4.1.1).
pub(super) const HEADER_LEN: usize = 12;

/// RFC 1035, 4.2.1: as long is an answer that anybody takes over UDP.
const PLAIN_UDP_MAX: usize = 512;
/// An OPT record without options: the root's name and what is fixed (RFC 6891, 6.1.2).
const BARE_OPT_LEN: usize = 11;

/// The longest message: TCP has 16 bits for its length (RFC 1035, 4.2.2), and UDP has less.
pub(super) const MESSAGE_MAX: usize = u16::MAX as usize;

/// The payload size that hythe announces in its own answers: what DNS flag day 2020 settled on. Nobody sends it a
/// datagram on that promise, since what it forwards carries the guest's.
const OWN_PAYLOAD: u16 = 1232;

/// A query from the guest.
pub(super) struct Query<'m> {
    bytes: &'m [u8],
    metadata: Metadata,
    question: op::Query,
    /// The name asked for, as it is in the message but for its letters, which are small.
    name: Box<[u8]>,
    question_end: usize,
    opt: Option<OptHead>,
}

/// What the fixed part of an OPT record says (RFC 6891, 6.1.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct OptHead {
    payload: u16,
    version: u8,
    dnssec_ok: bool,
}

/// Why a message is not a query that can be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unfit {
    /// It gets no answer: an answer to an answer could go round for ever.
    Silence,
    /// It gets this code alone.
    Code(ResponseCode),
}

/// What RFC 1035, 4.1.1, calls a format error.
const MALFORMED: Unfit = Unfit::Code(ResponseCode::FormErr);

/// An extended DNS error (RFC 8914): why there is no answer, for those who asked with EDNS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ExtendedError {
    code: u16,
    text: &'static str,
}

impl ExtendedError {
    /// "Other Error".
    pub const BUSY: Self = Self { code: 0, text: "hythe: too many queries are under way" };
    /// "Blocked".
    pub const DENIED: Self = Self { code: 15, text: "hythe: an egress rule" };
    /// "Filtered".
    pub const FILTERED: Self = Self { code: 17, text: "hythe: --dns-filter" };
    /// "No Reachable Authority".
    pub const NO_SERVERS: Self = Self { code: 22, text: "hythe: the host has no resolvers" };
    /// "No Reachable Authority".
    pub const SILENT: Self = Self { code: 22, text: "hythe: no resolver of the host answered in time" };
    /// "No Reachable Authority".
    pub const ZONE_SILENT: Self =
        Self { code: 22, text: "hythe: no server of this zone answered, and no other is asked" };
    /// "Network Error".
    pub const UNREACHABLE: Self = Self { code: 23, text: "hythe: no resolver of the host can be reached" };

    /// RFC 8914, 2: the option's code, the info code, the extra text.
    fn option(self) -> EdnsOption {
        EdnsOption::Unknown(15, [&self.code.to_be_bytes(), self.text.as_bytes()].concat())
    }
}

impl<'m> Query<'m> {
    /// Reads a message.
    pub fn parse(bytes: &'m [u8]) -> Result<Self, Unfit> {
        let mut decoder = BinDecoder::new(bytes);
        let header = Header::read(&mut decoder).map_err(|_| Unfit::Silence)?;
        if header.message_type == MessageType::Response || bytes.len() > MESSAGE_MAX {
            return Err(Unfit::Silence);
        }
        if header.op_code != OpCode::Query {
            return Err(Unfit::Code(ResponseCode::NotImp));
        }
        // RFC 9619: a query has one question. One without any (RFC 7873, 5.4: to learn a cookie) has no resolver
        // behind it whose cookie it could learn.
        if header.counts.queries != 1 {
            return Err(MALFORMED);
        }
        let question = op::Query::read(&mut decoder).map_err(|_| MALFORMED)?;
        let question_end = decoder.index();
        // Nothing but the header lies before the question: a pointer in it can name no name.
        if !matches!(skip_name(bytes, HEADER_LEN), Some((end, NameEnd::Root)) if end + 4 == question_end) {
            return Err(MALFORMED);
        }
        let counts = header.counts;
        let others = usize::from(counts.answers) + usize::from(counts.authorities);
        let opt = find_opt(bytes, question_end, others, counts.additionals.into())?;
        let name = bytes[HEADER_LEN..question_end - 4].to_ascii_lowercase().into();
        Ok(Self { bytes, metadata: header.metadata, question, name, question_end, opt })
    }

    /// What is asked.
    pub fn question(&self) -> &op::Query {
        &self.question
    }

    /// The name asked for, as messages have it, letters small.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// All of a query that another of the same kind has too: what is behind the ID, and what is behind the name. `None` for one
    /// with EDNS options, or with records other than OPT.
    pub fn without_name(&self) -> Option<[&'m [u8]; 2]> {
        let behind = self.bytes.len() - self.question_end;
        let is_bare = behind == if self.opt.is_some() { BARE_OPT_LEN } else { 0 };
        is_bare.then_some([&self.bytes[2..HEADER_LEN], &self.bytes[self.question_end - 4..]])
    }

    /// Whether a whole zone is asked for.
    pub fn is_transfer(&self) -> bool {
        matches!(self.question.query_type(), RecordType::AXFR | RecordType::IXFR)
    }

    /// What tells this query from others; those of a stream are told apart by their place in it.
    pub fn flight(&self, transport: Transport) -> Option<Flight> {
        let Transport::Udp(guest) = transport else { return None };
        Some(Flight { guest, id: self.metadata.id, question: self.question_bytes().into() })
    }

    fn question_bytes(&self) -> &'m [u8] {
        &self.bytes[HEADER_LEN..self.question_end]
    }

    /// The query under another ID, otherwise byte for byte.
    pub fn under_id(&self, id: u16) -> Vec<u8> {
        with_id(self.bytes.to_vec(), id)
    }

    /// The reply to [`Self::under_id`] under the guest's own ID, otherwise byte for byte.
    pub fn under_own_id(&self, reply: Vec<u8>) -> Vec<u8> {
        with_id(reply, self.metadata.id)
    }

    /// A reply to another query for the same, as a reply to this one: under its ID, and with its letters.
    pub fn under_own_id_and_letters(&self, reply: &[u8]) -> Vec<u8> {
        let mut reply = reply.to_vec();
        let ours = self.question_bytes();
        if let Some(place) = reply.get_mut(HEADER_LEN..HEADER_LEN + ours.len()) {
            place.copy_from_slice(ours);
        }
        with_id(reply, self.metadata.id)
    }

    /// Whether a message from the resolver answers this query, asked under `id`: ID, QR, opcode and question must match
    /// (RFC 5452, 4.2 and 9.1).
    pub fn is_answered_by(&self, reply: &[u8], id: u16) -> bool {
        let mut decoder = BinDecoder::new(reply);
        let Ok(header) = Header::read(&mut decoder) else { return false };
        if header.id != id
            || header.message_type != MessageType::Response
            || header.op_code != self.metadata.op_code
        {
            return false;
        }
        match header.counts.queries {
            1 => {
                let ours = self.question_bytes();
                let Some(theirs) = reply.get(HEADER_LEN..self.question_end) else { return false };
                // RFC 1035, 2.3.3: names are equal in any case. Lengths of labels are below any letter; type and class
                // are numbers, in which 65 is not 97.
                let (name, rest) = ours.split_at(ours.len() - 4);
                theirs[..name.len()].eq_ignore_ascii_case(name) && theirs[name.len()..] == *rest
            }
            // A server that does not know EDNS may say so without repeating the question (RFC 6891, 7: FORMERR), and
            // some fail so too. Neither can carry a forged record.
            0 => matches!(
                header.response_code,
                ResponseCode::FormErr | ResponseCode::ServFail | ResponseCode::NotImp | ResponseCode::Refused
            ),
            _ => false,
        }
    }

    /// The answer about a name that is known here. What is too long for the guest over UDP brings it back over TCP.
    pub fn answer_with(&self, found: Found, transport: Transport) -> Option<Vec<u8>> {
        // RFC 6891, 6.1.3: versions above 0 do not exist yet.
        if self.opt.is_some_and(|opt| opt.version > 0) {
            return self.fail(ResponseCode::BADVERS, None);
        }
        let mut message = self.response(found.code);
        message.metadata.authoritative = found.code != ResponseCode::Refused;
        message.answers = found.answers;
        message.authorities = found.authority.into_iter().collect();
        let whole = message.to_vec().ok()?;
        let longest = match transport {
            Transport::Tcp => MESSAGE_MAX,
            Transport::Udp(_) => self.opt.map_or(0, |opt| usize::from(opt.payload)).max(PLAIN_UDP_MAX),
        };
        if whole.len() <= longest {
            return Some(whole);
        }
        message.answers.clear();
        message.metadata.truncation = true;
        message.to_vec().ok()
    }

    /// An answer that has no records, only a code and, for those who understand it, a reason.
    pub fn fail(&self, code: ResponseCode, reason: Option<ExtendedError>) -> Option<Vec<u8>> {
        let mut message = self.response(code);
        if let (Some(opt), Some(reason)) = (&mut message.edns, reason) {
            opt.options_mut().insert(reason.option());
        }
        message.to_vec().ok()
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut message = Message::new(self.metadata.id, MessageType::Response, OpCode::Query);
        message.metadata = Metadata::response_from_request(&self.metadata);
        message.metadata.recursion_available = true;
        message.metadata.response_code = code;
        message.add_query(self.question.clone());
        // RFC 6891, 6.1.1: OPT is answered with OPT; RFC 3225, 3: DO is copied.
        if let Some(opt) = self.opt {
            let mut edns = Edns::new();
            edns.set_max_payload(OWN_PAYLOAD).set_dnssec_ok(opt.dnssec_ok);
            message.set_edns(edns);
        }
        message
    }
}

/// An answer to a message of which only the header can be trusted.
pub(super) fn bare(bytes: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    let header = Header::read(&mut BinDecoder::new(bytes)).ok()?;
    let mut message = Message::new(header.id, MessageType::Response, header.op_code);
    message.metadata = Metadata::response_from_request(&header.metadata);
    message.metadata.response_code = code;
    message.to_vec().ok()
}

/// The response code in the header of a reply; the upper bits, in its OPT record, do not matter to a forwarder.
pub(super) fn response_code(reply: &[u8]) -> ResponseCode {
    ResponseCode::from_low(reply.get(3).map_or(0, |flags| flags & 0x0f))
}

/// Whether records of this class are in the one namespace that everybody means. RFC 1035, 3.2.5: `*` is any class.
pub(super) fn is_internet(class: DNSClass) -> bool {
    matches!(class, DNSClass::IN | DNSClass::ANY)
}

fn with_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    if let Some(place) = message.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
    message
}

/// How a name ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NameEnd {
    /// With the root.
    Root,
    /// With a pointer to the rest.
    Pointer,
}

/// Where the name that begins at `at` ends, and how (RFC 1035, 4.1.4).
pub(super) fn skip_name(bytes: &[u8], mut at: usize) -> Option<(usize, NameEnd)> {
    loop {
        match *bytes.get(at)? {
            0 => return Some((at + 1, NameEnd::Root)),
            length @ 1..=0x3f => at += 1 + usize::from(length),
            0xc0.. => return Some((at + 2, NameEnd::Pointer)),
            _ => return None,
        }
    }
}

/// Steps over the records behind the question, `others` and then `additionals`; returns the OPT record if there is
/// one. Fails where the records are not what their counts and lengths say.
fn find_opt(
    bytes: &[u8],
    mut at: usize,
    others: usize,
    additionals: usize,
) -> Result<Option<OptHead>, Unfit> {
    let mut opt = None;
    for index in 0..others + additionals {
        let (fixed, end_of_name) = skip_name(bytes, at).ok_or(MALFORMED)?;
        // RFC 1035, 4.1.3, as RFC 6891, 6.1.3, reads it: type, payload size, extended code, version, flags, length.
        let Some(&[t0, t1, p0, p1, _, version, flags, _, l0, l1]) = bytes.get(fixed..fixed + 10) else {
            return Err(MALFORMED);
        };
        if index >= others && u16::from_be_bytes([t0, t1]) == u16::from(RecordType::OPT) {
            // RFC 6891, 6.1.1 and 6.1.2: one, under the root's name.
            if opt.is_some() || end_of_name != NameEnd::Root || fixed != at + 1 {
                return Err(MALFORMED);
            }
            let payload = u16::from_be_bytes([p0, p1]);
            opt = Some(OptHead { payload, version, dnssec_ok: flags & 0x80 != 0 });
        }
        at = fixed + 10 + usize::from(u16::from_be_bytes([l0, l1]));
        if at > bytes.len() {
            return Err(MALFORMED);
        }
    }
    Ok(opt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow::dns::fake_server::{query, with_opt};

    fn code_of(bytes: &[u8]) -> Unfit {
        Query::parse(bytes).err().unwrap()
    }

    #[test]
    fn what_is_no_query_gets_silence_and_what_is_malformed_gets_its_code() {
        let good = query("example.com.", RecordType::A, 7);
        assert!(Query::parse(&good).is_ok());
        let edited = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        assert_eq!(code_of(&good[..11]), Unfit::Silence);
        assert_eq!(code_of(&edited(2, 0x80)), Unfit::Silence);
        for opcode in [1, 2, 4, 5, 6, 15] {
            assert_eq!(code_of(&edited(2, opcode << 3)), Unfit::Code(ResponseCode::NotImp), "{opcode}");
        }
        for questions in [0, 2] {
            assert_eq!(code_of(&edited(5, questions)), MALFORMED, "{questions}");
        }
        assert_eq!(code_of(&good[..good.len() - 1]), MALFORMED);
        // More records than there are.
        assert_eq!(code_of(&edited(11, 1)), MALFORMED);
    }

    #[test]
    fn a_name_that_points_at_itself_or_into_the_header_is_malformed() {
        for pointer in [0xc0u8, 0xc1] {
            for target in [0u8, 4, 12] {
                let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, pointer, target];
                bytes.extend([0, 1, 0, 1]);
                assert_eq!(code_of(&bytes), MALFORMED, "{pointer} {target}");
            }
        }
    }

    #[test]
    fn records_behind_the_question_are_stepped_over_whatever_they_are() {
        // A TSIG-like record of an unknown type whose name points into the question.
        let mut bytes = query("example.com.", RecordType::Unknown(65_280), 7);
        bytes.extend([0xc0, 12, 0xff, 0x01, 0, 255, 0, 0, 0, 0, 0, 3, 1, 2, 3]);
        bytes[11] = 1;
        assert!(Query::parse(&bytes).unwrap().opt.is_none());
        let last = bytes.len() - 1;
        assert_eq!(code_of(&bytes[..last]), MALFORMED);
    }

    #[test]
    fn there_is_one_opt_and_its_name_is_the_root() {
        let good = with_opt(query("example.com.", RecordType::A, 7), 0, true, &[]);
        let opt = Query::parse(&good).unwrap().opt;
        assert_eq!(opt, Some(OptHead { payload: 4096, version: 0, dnssec_ok: true }));
        assert_eq!(code_of(&with_opt(good.clone(), 0, false, &[])), MALFORMED);
        let mut named = query("example.com.", RecordType::A, 7);
        named.extend([1, b'x', 0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0]);
        named[11] = 1;
        assert_eq!(code_of(&named), MALFORMED);
    }

    #[test]
    fn a_reply_matches_by_id_direction_opcode_and_question() {
        let bytes = query("example.com.", RecordType::Unknown(65), 7);
        let asked = Query::parse(&bytes).unwrap();
        let mut reply = asked.under_id(0x1234);
        reply[2] |= 0x80;
        assert!(asked.is_answered_by(&reply, 0x1234));
        let edited = |at: usize, value: u8| {
            let mut bytes = reply.clone();
            bytes[at] = value;
            bytes
        };
        assert!(asked.is_answered_by(&edited(13, b'E'), 0x1234), "letters match in any case");
        let kind = reply.len() - 3;
        assert!(!asked.is_answered_by(&edited(kind, 97), 0x1234), "types are numbers, not letters");
        assert!(!asked.is_answered_by(&edited(13, b'x'), 0x1234));
        assert!(!asked.is_answered_by(&edited(2, 0x01), 0x1234), "not a reply");
        assert!(!asked.is_answered_by(&edited(2, 0xa0), 0x1234), "another opcode");
        assert!(!asked.is_answered_by(&edited(5, 2), 0x1234), "two questions");
        assert!(!asked.is_answered_by(&reply, 0x1235));
        assert!(!asked.is_answered_by(&reply[..reply.len() - 1], 0x1234));
        let without_question = |code: u8| {
            let mut bytes = reply[..HEADER_LEN].to_vec();
            (bytes[3], bytes[5]) = (code, 0);
            bytes
        };
        for (code, matches) in [(1, true), (2, true), (4, true), (5, true), (0, false), (3, false)] {
            assert_eq!(asked.is_answered_by(&without_question(code), 0x1234), matches, "{code}");
        }
    }

    #[test]
    fn a_failure_repeats_the_question_and_explains_itself_only_to_those_who_speak_edns() {
        let plain = query("example.com.", RecordType::A, 7);
        let reply = Query::parse(&plain).unwrap().fail(ResponseCode::ServFail, Some(ExtendedError::SILENT));
        let reply = Message::from_vec(&reply.unwrap()).unwrap();
        assert_eq!((reply.id, reply.response_code), (7, ResponseCode::ServFail));
        assert!(reply.recursion_desired && reply.recursion_available && !reply.authoritative);
        assert_eq!((reply.queries.len(), reply.edns), (1, None));

        let extended = with_opt(plain, 0, true, &[]);
        let reply =
            Query::parse(&extended).unwrap().fail(ResponseCode::ServFail, Some(ExtendedError::SILENT));
        let edns = Message::from_vec(&reply.unwrap()).unwrap().edns.unwrap();
        assert!(edns.flags().dnssec_ok);
        assert_eq!(edns.options().options, [(15.into(), ExtendedError::SILENT.option())]);
    }
}
