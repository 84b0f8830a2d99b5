//! What becomes of datagrams that leave the host: servers answer, nobody is there, strangers answer.

use std::rc::Rc;

use crate::frame::address::{Address, Endpoint};
use crate::frame::icmp::{self, ECHO_LEN, IcmpError};
use crate::host::errors::{IcmpReport, QueuedError};

use super::datagram_socket::Datagram;
use super::guest::datagrams::{identify, payload};
use super::plan::{DatagramPlan, Server};
use super::stage::Stage;

/// What comes back.
pub enum Return {
    /// A datagram.
    Datagram(Datagram),
    /// An error, with its number.
    Error(Datagram, i32, QueuedError),
}

/// All servers.
pub struct Servers {
    stage: Rc<Stage>,
    plans: Vec<DatagramPlan>,
}

impl Servers {
    /// The servers of a plan.
    pub fn new(stage: Rc<Stage>, plans: &[DatagramPlan]) -> Self {
        Self { stage, plans: plans.to_vec() }
    }

    /// A datagram has left; what comes back for it.
    pub fn receive(&self, sent: &Datagram) -> Option<Return> {
        let content = if sent.echo { sent.bytes.get(ECHO_LEN..)? } else { &sent.bytes };
        let Some((index, number)) = identify(content).filter(|(index, _)| *index < self.plans.len()) else {
            self.stage.fail(format!(
                "{} bytes leave for {} that the guest did not send",
                sent.bytes.len(),
                sent.remote
            ));
            return None;
        };
        let plan = &self.plans[index];
        let right = sent.remote == plan.remote
            && sent.echo == plan.echo
            && content == payload(&self.stage, index, number, plan.size);
        self.stage
            .check(right, || format!("datagram {number} of conversation {index} leaves for {}", sent.remote));
        self.stage.trace(0x50 | u64::from(number) << 8, || {
            format!("server      datagram {number} of conversation {index} from port {}", sent.local.port)
        });
        let back = |remote| Some(Return::Datagram(self.answer(sent, remote)));
        match plan.server {
            Server::Silent => None,
            Server::Echoes => back(sent.remote),
            Server::OtherPort => back(Endpoint { port: sent.remote.port + 1, ..sent.remote }),
            Server::Stranger => back(Endpoint { address: stranger(sent.remote.address.is_v4()), port: 9 }),
            Server::Unreachable => {
                let offender = Some(sent.remote.address);
                let report = IcmpReport { error: IcmpError::PortUnreachable, offender };
                let queued = QueuedError { report, destination: sent.remote, payload: sent.bytes.clone() };
                Some(Return::Error(sent.clone(), libc::ECONNREFUSED, queued))
            }
        }
    }

    fn answer(&self, sent: &Datagram, remote: Endpoint) -> Datagram {
        let mut answer = Datagram { remote, ..sent.clone() };
        let v4 = sent.remote.address.is_v4();
        if sent.echo {
            match icmp::parse_echo_request(&sent.bytes, v4) {
                Some(echo) => answer.bytes[..ECHO_LEN].copy_from_slice(&icmp::echo_reply(v4, echo)),
                None => self.stage.fail(format!("no echo request leaves for {remote}")),
            }
        }
        answer
    }
}

fn stranger(v4: bool) -> Address {
    if v4 {
        Address::v4([198, 51, 100, 250])
    } else {
        Address::v6([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9])
    }
}
