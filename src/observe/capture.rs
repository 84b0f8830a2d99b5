//! Captures: the frames of a link in a file that Wireshark and `tcpdump` read (pcapng, draft-ietf-opsawg-pcapng).
//!
//! Each block is put together in memory and written at once: whatever ends the process, the file ends with a whole
//! block, and who reads from a pipe sees each frame when it is written.

use std::borrow::Cow;
use std::io::{self, Write};
use std::time::Duration;

use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, Endianness, PcapError};

/// `if_tsresol`: timestamps count 10^-9 seconds.
const NANOSECONDS: u8 = 9;

/// `epb_flags`, bits 0 and 1: the direction as the interface sees it.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

/// A capture that is being written: one section, one Ethernet interface, which is the guest's.
pub struct Capture<W: Write> {
    /// Encodes into memory.
    blocks: PcapNgWriter<Vec<u8>>,
    writer: W,
}

impl<W: Write> Capture<W> {
    /// Begins a capture. Errors are those of `writer`.
    pub fn new(writer: W) -> io::Result<Self> {
        let section = SectionHeaderBlock {
            endianness: Endianness::native(),
            options: vec![SectionHeaderOption::UserApplication("hythe".into())],
            ..SectionHeaderBlock::default()
        };
        let interface = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            // No limit: frames are captured whole, with up to 64 KiB of payload where segmentation is offloaded.
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName("guest".into()),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        };
        let mut blocks = PcapNgWriter::with_section_header(Vec::new(), section).map_err(io_error)?;
        blocks.write_pcapng_block(interface).map_err(io_error)?;
        let mut capture = Self { blocks, writer };
        capture.hand_over()?;
        Ok(capture)
    }

    /// Writes a frame that passed at `time_ns` nanoseconds since the epoch; `outbound` when it came from the guest.
    pub fn frame(&mut self, time_ns: u64, outbound: bool, bytes: &[u8]) -> io::Result<()> {
        let packet = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: Duration::from_nanos(time_ns),
            original_len: bytes.len() as u32,
            data: Cow::Borrowed(bytes),
            options: vec![EnhancedPacketOption::Flags(if outbound { OUTBOUND } else { INBOUND })],
        };
        self.blocks.write_pcapng_block(packet).map_err(io_error)?;
        self.hand_over()
    }

    fn hand_over(&mut self) -> io::Result<()> {
        let bytes = self.blocks.get_mut();
        let result = self.writer.write_all(bytes).and_then(|()| self.writer.flush());
        bytes.clear();
        result
    }
}

fn io_error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcapng::{Block, PcapNgReader};
    use proptest::prelude::*;

    /// The frames of a capture: time, flags, bytes.
    fn read(bytes: &[u8]) -> Vec<(u64, u32, Vec<u8>)> {
        let mut reader = PcapNgReader::new(bytes).unwrap();
        let named = SectionHeaderOption::UserApplication("hythe".into());
        assert_eq!(reader.section().options, [named]);
        let mut frames = Vec::new();
        while let Some(block) = reader.next_block() {
            match block.unwrap() {
                Block::InterfaceDescription(interface) => {
                    assert!(frames.is_empty());
                    assert_eq!((interface.linktype, interface.snaplen), (DataLink::ETHERNET, 0));
                    assert!(interface.options.contains(&InterfaceDescriptionOption::IfTsResol(9)));
                }
                Block::EnhancedPacket(packet) => {
                    let [EnhancedPacketOption::Flags(flags)] = packet.options[..] else { panic!() };
                    assert_eq!(packet.original_len as usize, packet.data.len());
                    frames.push((packet.timestamp.as_nanos() as u64, flags, packet.data.to_vec()));
                }
                other => panic!("{other:?}"),
            }
        }
        frames
    }

    #[test]
    fn a_capture_without_frames_is_a_whole_file() {
        let mut file = Vec::new();
        Capture::new(&mut file).unwrap();
        assert_eq!(read(&file), []);
    }

    #[test]
    fn every_block_is_one_write_so_that_the_file_is_always_whole() {
        struct Writes(Vec<usize>, Vec<u8>);
        impl Write for Writes {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.push(bytes.len());
                self.1.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut writes = Writes(Vec::new(), Vec::new());
        let mut capture = Capture::new(&mut writes).unwrap();
        for len in [0, 1, 60, 61, 65_549] {
            capture.frame(5, true, &vec![7; len]).unwrap();
        }
        assert_eq!(writes.0.len(), 1 + 5);
        let mut end = writes.0[0];
        for (index, len) in writes.0[1..].iter().enumerate() {
            end += len;
            assert_eq!(read(&writes.1[..end]).len(), index + 1);
        }
    }

    #[test]
    fn a_writer_that_fails_is_reported_and_nothing_is_kept_for_later() {
        struct Fails(bool);
        impl Write for Fails {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if std::mem::replace(&mut self.0, true) {
                    Err(io::ErrorKind::StorageFull.into())
                } else {
                    Ok(bytes.len())
                }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut capture = Capture::new(Fails(false)).unwrap();
        let error = capture.frame(1, false, &[0; 100]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(capture.blocks.get_ref().is_empty());
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(
            frames in proptest::collection::vec(
                (any::<u64>(), any::<bool>(), proptest::collection::vec(any::<u8>(), 0..100)),
                0..20,
            ),
        ) {
            let mut file = Vec::new();
            let mut capture = Capture::new(&mut file).unwrap();
            for (time_ns, outbound, bytes) in &frames {
                capture.frame(*time_ns, *outbound, bytes).unwrap();
            }
            let expected: Vec<_> = frames
                .into_iter()
                .map(|(time, outbound, bytes)| (time, if outbound { 2 } else { 1 }, bytes))
                .collect();
            prop_assert_eq!(read(&file), expected);
        }
    }
}
