//! The vocabulary of input and output: pieces of memory, and batches of operations on descriptors.
//!
//! Links and relays describe what they want done as [`Operations`]; an engine ([`crate::host::engine`]) does all of a
//! batch before it returns, with one system call or many. So memory is lent for the length of one call, and nothing is
//! in flight between two passes of a worker's loop. Every operation is non-blocking.
#![allow(unsafe_code)]

pub mod sockaddr;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU64;

use crate::frame::address::Endpoint;

/// A piece of memory that the kernel reads from or writes to.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Piece(libc::iovec);

// SAFETY: a piece is an address and a length; what may be done with it is the promise made at its creation.
unsafe impl std::marker::Send for Piece {}

impl Piece {
    /// # Safety
    /// `start..start + len` must stay mapped, and no Rust reference to it may exist while the kernel may use it:
    /// for as long as the piece is part of a batch that is being run.
    pub unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast(), iov_len: len })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// Its address, for comparing.
    pub fn start(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The part from `from` on, at most `len` bytes of it.
    #[must_use]
    pub fn part(&self, from: usize, len: usize) -> Self {
        let from = from.min(self.len());
        // In bounds of the piece, so the promise made for it holds for the part.
        let start = self.start().wrapping_add(from);
        Self(libc::iovec { iov_base: start.cast(), iov_len: len.min(self.len() - from) })
    }

    /// Copies the piece's bytes out. For the exceptional paths: on the usual one the kernel is who copies.
    pub fn copy_to(&self, out: &mut Vec<u8>) {
        let at = out.len();
        out.resize(at + self.len(), 0);
        // SAFETY: `new` promises that the memory is mapped; `out` was just made large enough; the two cannot overlap,
        // since no reference to the piece's memory exists.
        unsafe { std::ptr::copy_nonoverlapping(self.start(), out[at..].as_mut_ptr(), self.len()) }
    }

    /// Copies the first bytes out, as many as `out` has room for; returns how many.
    pub fn copy_out(&self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.len());
        // SAFETY: as in `copy_to`.
        unsafe { std::ptr::copy_nonoverlapping(self.start(), out.as_mut_ptr(), len) };
        len
    }

    /// Copies bytes in; returns how many fitted.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.len());
        // SAFETY: as in `copy_to`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start(), len) };
        len
    }

    /// Copies another piece's bytes in; returns how many fitted.
    pub fn copy_piece(&self, other: &Piece) -> usize {
        let len = other.len().min(self.len());
        // SAFETY: `new` promises for both that their memory is mapped; they may overlap.
        unsafe { std::ptr::copy(other.start(), self.start(), len) };
        len
    }
}

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `readv` of one frame.
    Read,
    /// `writev` of one frame.
    Write,
    /// `sendmsg` on a stream.
    Send,
    /// `recvmsg` with `MSG_PEEK` on a stream, from the socket's peek offset on.
    Peek,
    /// `recvmsg` on a stream.
    Receive,
    /// `recv` with `MSG_TRUNC` and no memory: drops bytes at the start of a TCP receive queue.
    Discard,
    /// `sendmsg` of a datagram, with address and control data.
    SendDatagram,
    /// `recvmsg` of a datagram, with address and control data.
    ReceiveDatagram,
    /// `sendmmsg` on a connected socket: each piece is a datagram of its own. They go out in order, up to the first that
    /// does not; it gives how many did, and the error only where none did.
    SendEach,
}

/// Room for the control data of one datagram, in bytes.
pub const CONTROL_LEN: usize = 192;

/// Address and control data of a datagram.
#[derive(Clone)]
#[repr(C, align(8))]
pub struct Message {
    pub(crate) control: [u8; CONTROL_LEN],
    pub(crate) control_len: usize,
    pub(crate) name: libc::sockaddr_storage,
    pub(crate) name_len: libc::socklen_t,
    pub(crate) flags: i32,
}

impl Message {
    fn empty() -> Self {
        Self {
            control: [0; CONTROL_LEN],
            control_len: 0,
            // SAFETY: sockaddr_storage is plain data for which zero (AF_UNSPEC) is a valid value.
            name: unsafe { std::mem::zeroed() },
            name_len: 0,
            flags: 0,
        }
    }

    /// Sets the destination; `None` for a connected socket.
    pub fn set_destination(&mut self, destination: Option<Endpoint>) {
        self.name_len = destination.map_or(0, |endpoint| sockaddr::store(endpoint, &mut self.name));
    }

    /// The source of a datagram that was received.
    pub fn source(&self) -> Option<Endpoint> {
        sockaddr::load(&self.name)
    }

    /// Whether the datagram was longer than the memory given.
    pub fn is_truncated(&self) -> bool {
        self.flags & libc::MSG_TRUNC != 0
    }
}

/// One operation of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub(crate) fd: RawFd,
    pub(crate) kind: Kind,
    pub(crate) first_piece: u32,
    pub(crate) pieces: u32,
    /// The index of its message; for [`Kind::Discard`] the bytes to drop.
    pub(crate) extra: u32,
    pub(crate) result: i32,
}

impl Operation {
    /// What it does.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What it is done to.
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// Bytes to drop, of a [`Kind::Discard`].
    pub fn bytes_to_drop(&self) -> u32 {
        self.extra
    }

    /// What it gave, once the batch was run: bytes, or the error.
    pub fn result(&self) -> io::Result<usize> {
        if self.result < 0 {
            Err(io::Error::from_raw_os_error(-self.result))
        } else {
            Ok(self.result as usize)
        }
    }
}

/// Which operation of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OperationId(u32);

/// A batch of operations; it keeps its memory between uses.
pub struct Operations {
    pub(crate) list: Vec<Operation>,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) messages: Vec<Message>,
    messages_used: usize,
}

impl Default for Operations {
    /// None, and memory for what a pass does as a rule.
    fn default() -> Self {
        let (list, pieces) = (Vec::with_capacity(128), Vec::with_capacity(4 * PIECES_MAX));
        Self { list, pieces, messages: Vec::new(), messages_used: 0 }
    }
}

/// `sendmsg` takes no more pieces than this (`UIO_MAXIOV`).
pub const PIECES_MAX: usize = 1024;

impl Operations {
    /// Forgets all operations.
    pub fn clear(&mut self) {
        self.list.clear();
        self.pieces.clear();
        self.messages_used = 0;
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Begins an operation whose pieces come one by one. It counts once it is finished.
    pub fn begin(&mut self, fd: RawFd, kind: Kind) -> Begun<'_> {
        let first = self.pieces.len();
        Begun { operations: self, fd, kind, first }
    }

    /// Adds an operation on pieces; at most [`PIECES_MAX`] of them are used.
    pub fn push(&mut self, fd: RawFd, kind: Kind, pieces: impl IntoIterator<Item = Piece>) -> OperationId {
        let mut begun = self.begin(fd, kind);
        pieces.into_iter().for_each(|piece| begun.piece(piece));
        begun.finish()
    }

    /// Gives an operation on a datagram its message, to be filled in (or, after the run, read).
    fn attach_message(&mut self, id: OperationId, kind: Kind) -> &mut Message {
        let index = self.messages_used;
        self.messages_used += 1;
        if index == self.messages.len() {
            self.messages.push(Message::empty());
        }
        self.list[id.0 as usize].extra = index as u32;
        let message = &mut self.messages[index];
        message.control_len = if kind == Kind::ReceiveDatagram { CONTROL_LEN } else { 0 };
        message.name_len =
            if kind == Kind::ReceiveDatagram { size_of::<libc::sockaddr_storage>() as u32 } else { 0 };
        message
    }

    /// Adds the dropping of `len` bytes from a TCP receive queue.
    pub fn push_discard(&mut self, fd: RawFd, len: u32) -> OperationId {
        self.add(Operation { fd, kind: Kind::Discard, first_piece: 0, pieces: 0, extra: len, result: 0 })
    }

    fn add(&mut self, operation: Operation) -> OperationId {
        self.list.push(operation);
        OperationId(self.list.len() as u32 - 1)
    }

    /// What an operation gave, once the batch was run: bytes, or the error.
    pub fn result(&self, id: OperationId) -> io::Result<usize> {
        self.list[id.0 as usize].result()
    }

    /// The message of a datagram operation.
    pub fn message(&self, id: OperationId) -> &Message {
        &self.messages[self.list[id.0 as usize].extra as usize]
    }

    /// Carries all of them out, in order, by `perform`: it gives what the kernel would, bytes or an error number negated. For
    /// engines whose sockets are not the kernel's.
    pub fn perform(&mut self, mut perform: impl FnMut(&Operation, &[Piece], Option<&mut Message>) -> i32) {
        let Self { list, pieces, messages, .. } = self;
        for operation in list {
            let first = operation.first_piece as usize;
            let memory = &pieces[first..first + operation.pieces as usize];
            let message = match operation.kind {
                Kind::SendDatagram | Kind::ReceiveDatagram => messages.get_mut(operation.extra as usize),
                _ => None,
            };
            operation.result = perform(operation, memory, message);
        }
    }

    /// All of them, in order: for whoever looks on.
    pub fn iter(&self) -> impl Iterator<Item = &Operation> {
        self.list.iter()
    }

    /// The pieces of an operation.
    pub fn pieces_of(&self, operation: &Operation) -> &[Piece] {
        let first = operation.first_piece as usize;
        &self.pieces[first..first + operation.pieces as usize]
    }
}

/// An operation that is being put together.
pub struct Begun<'o> {
    operations: &'o mut Operations,
    fd: RawFd,
    kind: Kind,
    first: usize,
}

impl<'o> Begun<'o> {
    /// Adds a piece. Empty ones are left out, so that zero bytes never look like the end of a stream; more than
    /// [`PIECES_MAX`] are not used.
    pub fn piece(&mut self, piece: Piece) {
        if !piece.is_empty() && self.operations.pieces.len() - self.first < PIECES_MAX {
            self.operations.pieces.push(piece);
        }
    }

    /// The operation is complete.
    pub fn finish(self) -> OperationId {
        let pieces = (self.operations.pieces.len() - self.first) as u32;
        let Self { operations, fd, kind, first } = self;
        operations.add(Operation { fd, kind, first_piece: first as u32, pieces, extra: 0, result: 0 })
    }

    /// The operation, on a datagram, is complete but for its message.
    pub fn finish_datagram(self) -> (OperationId, &'o mut Message) {
        let pieces = (self.operations.pieces.len() - self.first) as u32;
        let Self { operations, fd, kind, first } = self;
        let id =
            operations.add(Operation { fd, kind, first_piece: first as u32, pieces, extra: 0, result: 0 });
        let message = operations.attach_message(id, kind);
        (id, message)
    }
}

const CACHE_LINE: usize = 64;

/// Memory of fixed size that only the kernel and copies touch, in equal slots.
///
/// Slots are staggered by a few cache lines, so that the starts of many do not fall into one cache set.
pub struct Buffers {
    memory: std::ptr::NonNull<u8>,
    layout: std::alloc::Layout,
    /// Where the first slot begins, so that slots begin at cache lines.
    start: usize,
    slot_len: usize,
    spacing: usize,
    slots: usize,
}

// SAFETY: the memory is owned by the value alone and touched through `&self`/`&mut self` of one thread at a time.
unsafe impl std::marker::Send for Buffers {}

impl Buffers {
    /// `slots` slots of `slot_len` bytes, zeroed by the kernel when they are first touched.
    ///
    /// # Panics
    /// When the memory cannot be had: at start, where nothing can go on without it.
    pub fn new(slots: usize, slot_len: usize) -> Self {
        let spacing = slot_len.next_multiple_of(CACHE_LINE) + 3 * CACHE_LINE;
        // Of this alignment, and no larger one, the allocator gives large memory as it comes from the kernel.
        let layout = std::alloc::Layout::from_size_align(slots * spacing + CACHE_LINE, 8)
            .unwrap_or_else(|_| panic!("buffers of {slots} x {slot_len} bytes"));
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(memory) = std::ptr::NonNull::new(memory) else { std::alloc::handle_alloc_error(layout) };
        let start = memory.as_ptr().align_offset(CACHE_LINE);
        Self { memory, layout, start, slot_len, spacing, slots }
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// The memory of a slot.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn piece(&self, slot: usize) -> Piece {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        // SAFETY: in bounds of the allocation, which lives as long as `self`; references to it come only from `bytes`
        // and `bytes_mut`, whose callers run no batch meanwhile because a batch is run with the link borrowed
        // mutably or not at all.
        unsafe { Piece::new(self.memory.as_ptr().add(self.start + slot * self.spacing), self.slot_len) }
    }

    /// The first `len` bytes of a slot, to read.
    pub fn bytes(&self, slot: usize, len: usize) -> &[u8] {
        let piece = self.piece(slot);
        // SAFETY: in bounds and initialized (zeroed at least); the kernel writes only while a batch is run, which
        // takes the pieces' owner out of use.
        unsafe { std::slice::from_raw_parts(piece.start(), len.min(self.slot_len)) }
    }

    /// The first `len` bytes of a slot, to write.
    pub fn bytes_mut(&mut self, slot: usize, len: usize) -> &mut [u8] {
        let piece = self.piece(slot);
        // SAFETY: as in `bytes`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(piece.start(), len.min(self.slot_len)) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), self.layout) }
    }
}

/// Bytes in order that wait to be written, in a queue that grows and shrinks.
#[derive(Default)]
pub struct ByteQueue(std::collections::VecDeque<u8>);

impl ByteQueue {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds bytes at the end.
    pub fn append(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// Adds a copy of a piece's bytes at the end.
    pub fn append_piece(&mut self, piece: &Piece) {
        // By way of the stack: no reference may be made to the piece's memory, which the guest may share.
        let mut some = [0; 4096];
        let mut done = 0;
        while done < piece.len() {
            let part = piece.part(done, some.len());
            // SAFETY: the part's memory is mapped, as `new` promises, and `some` has room for it.
            unsafe { std::ptr::copy_nonoverlapping(part.start(), some.as_mut_ptr(), part.len()) };
            self.0.extend(&some[..part.len()]);
            done += part.len();
        }
    }

    /// Drops bytes at the start; memory goes back once all are gone.
    pub fn consume(&mut self, len: usize) {
        self.0.drain(..len.min(self.0.len()));
        if self.0.is_empty() {
            self.0 = std::collections::VecDeque::new();
        }
    }

    /// The bytes as pieces, for an operation that reads them. The queue must not change before the batch was run.
    pub fn pieces(&self) -> [Piece; 2] {
        let (first, second) = self.0.as_slices();
        // SAFETY: the slices stay where they are until the queue changes, which the caller leaves alone; they are
        // only read, by the kernel and through other shared references.
        [first, second].map(|part| unsafe { Piece::new(part.as_ptr().cast_mut(), part.len()) })
    }
}

/// Has the system take the whole pages that lie in some words, which read as zero afterwards.
pub fn discard(words: &[AtomicU64]) {
    const PAGE: usize = 4096;
    let start = words.as_ptr().addr().next_multiple_of(PAGE);
    let end = words.as_ptr_range().end.addr() / PAGE * PAGE;
    if start < end {
        let first = words.as_ptr().wrapping_byte_add(start - words.as_ptr().addr());
        // SAFETY: the pages lie in `words`, private memory of the process that anybody may write to at any time.
        unsafe { libc::madvise(first.cast_mut().cast(), end - start, libc::MADV_DONTNEED) };
    }
}

/// Has the allocator give back what is large whenever it is freed. Left to itself, glibc keeps what is no larger than
/// anything that was ever freed. Large is more than a stream's full buffer, and no more than a chunk of records.
pub fn return_what_is_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a parameter of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 72 << 10)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_stays_inside_its_piece() {
        let buffers = Buffers::new(1, 100);
        let piece = buffers.piece(0);
        for (from, len, expected) in [(0, 100, 100), (40, 100, 60), (100, 1, 0), (200, 5, 0), (10, 5, 5)] {
            let part = piece.part(from, len);
            assert_eq!(part.len(), expected);
            assert!(part.start() as usize + part.len() <= piece.start() as usize + 100);
        }
    }

    #[test]
    fn slots_do_not_overlap_and_keep_what_is_written() {
        let mut buffers = Buffers::new(3, 1000);
        for slot in 0..3 {
            buffers.bytes_mut(slot, 1000).fill(slot as u8 + 1);
        }
        for slot in 0..3 {
            assert!(buffers.bytes(slot, 1000).iter().all(|byte| *byte == slot as u8 + 1));
        }
        let mut out = vec![9];
        buffers.piece(2).part(998, 10).copy_to(&mut out);
        assert_eq!(out, [9, 3, 3]);
        assert_eq!(buffers.piece(0).part(0, 2).copy_from(&[7, 8, 9]), 2);
        assert_eq!(buffers.bytes(0, 3), [7, 8, 1]);
    }

    #[test]
    fn an_empty_piece_is_left_out_so_that_zero_bytes_never_look_like_the_end() {
        let buffers = Buffers::new(1, 10);
        let mut operations = Operations::default();
        let piece = buffers.piece(0);
        operations.push(0, Kind::Peek, [piece.part(0, 0), piece, piece.part(10, 1)]);
        assert_eq!(operations.list[0].pieces, 1);
    }
}
