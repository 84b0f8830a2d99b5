//! What the two ends agree on in their SYNs: MSS, window scale, timestamps, SACK.

use crate::frame::tcp::{Options, Seq};
use crate::time::Now;

use super::Config;

/// The window scale of RFC 7323, 2.3 is at most this; a larger one counts as this.
const SCALE_MAX: u8 = 14;

/// The segment size of a guest that names none (RFC 9293, 3.7.1).
const MSS_DEFAULT: u16 = 536;

/// The result of the negotiation, and the state of timestamps.
#[derive(Clone, Copy, Debug)]
pub struct Agreed {
    /// The largest segment that the guest takes, payload bytes without options.
    pub mss: u16,
    /// The shift of windows that the guest sends.
    pub guest_scale: u8,
    /// The shift of windows that hythe sends.
    pub own_scale: u8,
    /// Both sides use SACK.
    pub sack: bool,
    /// Both sides use timestamps.
    pub timestamps: bool,
    /// TS.Recent (RFC 7323, 4.3).
    ts_recent: u32,
}

impl Agreed {
    /// Before the guest has said anything: everything is offered.
    pub fn offering(config: &Config) -> Self {
        Self {
            mss: MSS_DEFAULT,
            guest_scale: 0,
            own_scale: config.window_scale.min(SCALE_MAX),
            sack: true,
            timestamps: true,
            ts_recent: 0,
        }
    }

    /// Takes the options of the guest's SYN or SYN-ACK in: what it does not offer is off.
    pub fn settle(&mut self, theirs: &Options) {
        // RFC 6691: the option counts no TCP options; a tiny one would make a frame a byte, so there is a floor.
        self.mss = theirs.mss.unwrap_or(MSS_DEFAULT).max(64);
        match theirs.window_scale {
            Some(shift) => self.guest_scale = shift.min(SCALE_MAX),
            None => {
                // RFC 7323, 2.2: both or neither.
                self.guest_scale = 0;
                self.own_scale = 0;
            }
        }
        self.sack &= theirs.sack_permitted;
        self.timestamps &= theirs.timestamps.is_some();
        if let Some((value, _)) = theirs.timestamps {
            self.ts_recent = value;
        }
    }

    /// The options of a SYN or SYN-ACK of hythe's.
    pub fn of_syn(&self, config: &Config, now: Now) -> Options {
        Options {
            mss: Some(config.mss),
            window_scale: (self.own_scale > 0).then_some(self.own_scale),
            sack_permitted: self.sack,
            ..self.of_segment(now)
        }
    }

    /// The options of any other segment, without SACK blocks. The clock of the timestamps is the same in all
    /// connections: one that takes the name of another must never seem to be older (RFC 7323, 5.3).
    pub fn of_segment(&self, now: Now) -> Options {
        let timestamps = self.timestamps.then(|| (now.millis32(), self.ts_recent));
        Options { timestamps, ..Options::default() }
    }

    /// Payload bytes of a full segment: RFC 6691, options take their room from it.
    pub fn segment_bytes(&self) -> u16 {
        self.mss - if self.timestamps { 12 } else { 0 }
    }

    /// RFC 7323, 5.3 (R1): whether a segment is an old duplicate by its timestamp.
    pub fn is_old(&self, theirs: &Options) -> bool {
        match theirs.timestamps {
            Some((value, _)) if self.timestamps => (value.wrapping_sub(self.ts_recent) as i32) < 0,
            _ => false,
        }
    }

    /// RFC 7323, 4.3 (2): remembers the timestamp of a segment that starts at or before what was acknowledged last.
    pub fn remember(&mut self, theirs: &Options, seq: Seq, last_acknowledged: Seq) {
        if let Some((value, _)) = theirs.timestamps
            && self.timestamps
            && !last_acknowledged.before(seq)
        {
            self.ts_recent = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_does_not_offer_is_off() {
        let config = Config::for_mtu(1500, true);
        let mut agreed = Agreed::offering(&config);
        agreed.settle(&Options { mss: Some(1460), ..Options::default() });
        assert_eq!((agreed.mss, agreed.guest_scale, agreed.own_scale), (1460, 0, 0));
        assert!(!agreed.sack && !agreed.timestamps);
        assert_eq!(agreed.of_segment(Now(0)), Options::default());
    }

    #[test]
    fn a_shift_over_fourteen_counts_as_fourteen() {
        let mut agreed = Agreed::offering(&Config::for_mtu(1500, true));
        agreed.settle(&Options { window_scale: Some(200), ..Options::default() });
        assert_eq!(agreed.guest_scale, 14);
    }
}
