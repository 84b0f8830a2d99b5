//! System calls as hythe makes them, without hythe.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

pub const SO_PEEK_OFF: i32 = 42;
pub const SO_MEMINFO: i32 = 55;

/// How long the kernel may take for what it does at once.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The loopback addresses of both families.
pub const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn result(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Why a call failed, as the number of the error.
pub fn number<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.expect_err("an error").raw_os_error().unwrap()
}

pub fn set(socket: &impl AsRawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let len = size_of::<i32>() as u32;
    // SAFETY: `value` is valid for `len` bytes.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    result(set as isize).map(drop)
}

/// The numbers of an option that has several.
pub fn get<const N: usize>(socket: &impl AsRawFd, level: i32, name: i32) -> io::Result<[i32; N]> {
    let (mut values, mut len) = ([0; N], size_of::<[i32; N]>() as u32);
    // SAFETY: `values` is valid for `len` bytes.
    let got = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, values.as_mut_ptr().cast(), &raw mut len)
    };
    result(got as isize).map(|_| values)
}

/// Bytes in a TCP send queue that were not sent yet.
pub fn unsent(socket: &impl AsRawFd) -> i32 {
    let mut bytes = 0;
    // SAFETY: the request writes one int.
    let asked = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCOUTQNSD as _, &raw mut bytes) };
    assert_eq!(asked, 0);
    bytes
}

/// recv(2) that never waits.
pub fn receive(socket: &impl AsRawFd, len: usize, flags: i32) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; len];
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: `bytes` is valid for its length.
    let taken = result(unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), len, flags) })?;
    bytes.truncate(taken);
    Ok(bytes)
}

pub fn peek(socket: &impl AsRawFd, len: usize) -> io::Result<Vec<u8>> {
    receive(socket, len, libc::MSG_PEEK)
}

/// Bytes leave the queue without going anywhere.
pub fn discard(socket: &impl AsRawFd, len: usize) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: with MSG_TRUNC the kernel writes nowhere; should it try, it fails with EFAULT.
    result(unsafe { libc::recv(socket.as_raw_fd(), std::ptr::null_mut(), len, flags) })
}

/// Sends what fits without waiting.
pub fn send(socket: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `bytes` is valid for its length.
    result(unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// splice(2) that never waits.
pub fn splice(from: &impl AsRawFd, to: &impl AsRawFd, len: usize) -> io::Result<usize> {
    let null = std::ptr::null_mut();
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: null offsets are what pipes and sockets take.
    result(unsafe { libc::splice(from.as_raw_fd(), null, to.as_raw_fd(), null, len, flags) })
}

/// Waits until a call that never waits does not say EAGAIN.
pub fn when_ready<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

/// Waits until so many bytes lie in a receive queue.
pub fn await_queue(socket: &impl AsRawFd, len: i32) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut queued = 0;
        // SAFETY: the request writes one int.
        assert_eq!(unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut queued) }, 0);
        if queued >= len {
            return;
        }
        assert!(Instant::now() < deadline, "{queued} of {len} bytes came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until poll(2) reports one of `events`; returns all it reports.
pub fn await_events(socket: &impl AsRawFd, events: i16) -> i16 {
    let mut asked = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry, valid.
    let ready = unsafe { libc::poll(&raw mut asked, 1, PATIENCE.as_millis() as i32) };
    assert_eq!(ready, 1, "nothing happened");
    asked.revents
}

/// The two ends of a TCP connection over loopback: the connecting one, the accepted one.
pub fn tcp_pair(address: IpAddr) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, server)
}

/// Two UDP sockets of loopback.
pub fn udp_pair(address: IpAddr) -> [UdpSocket; 2] {
    [(); 2].map(|()| {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    })
}

/// An entry of a socket's error queue: who said what about a datagram to whom.
#[derive(Debug)]
pub struct QueuedError {
    pub error: libc::sock_extended_err,
    pub offender: Option<SocketAddr>,
    pub destination: Option<SocketAddr>,
    pub payload: Vec<u8>,
}

/// The next entry of a socket's error queue, waited for.
pub fn await_error(socket: &impl AsRawFd) -> QueuedError {
    await_events(socket, libc::POLLERR);
    next_error(socket).expect("an entry")
}

pub fn next_error(socket: &impl AsRawFd) -> Option<QueuedError> {
    let (mut payload, mut control) = (vec![0u8; 2048], [0u64; 64]);
    // SAFETY: zero is valid for both.
    let (mut name, mut header): (libc::sockaddr_storage, libc::msghdr) = unsafe { std::mem::zeroed() };
    let mut piece = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = size_of_val(&name) as u32;
    header.msg_iov = &raw mut piece;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: the header points to locals that outlive the call, with their lengths.
    let len = result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) }).ok()?;
    payload.truncate(len);
    // SAFETY: the kernel wrote the control messages; the macros walk them within their length.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !message.is_null() {
        // SAFETY: a whole header lies there.
        let head = unsafe { message.read_unaligned() };
        let kinds = [(libc::IPPROTO_IP, libc::IP_RECVERR), (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)];
        if kinds.contains(&(head.cmsg_level, head.cmsg_type)) {
            #[expect(clippy::cast_ptr_alignment, reason = "both are read unaligned")]
            // SAFETY: the error lies there, and the offender behind it; the buffer is larger than both.
            let (error, offender) = unsafe {
                let data = libc::CMSG_DATA(message).cast::<libc::sock_extended_err>();
                (data.read_unaligned(), data.add(1).cast::<libc::sockaddr_storage>().read_unaligned())
            };
            return Some(QueuedError {
                error,
                offender: address(offender),
                destination: address(name),
                payload,
            });
        }
        // SAFETY: as for the first.
        message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
    }
    None
}

fn address(storage: libc::sockaddr_storage) -> Option<SocketAddr> {
    let len = size_of::<libc::sockaddr_storage>() as u32;
    // SAFETY: both are the same structure; the family says what it holds.
    let ((), address) = unsafe {
        socket2::SockAddr::try_init(|to, size| {
            to.cast::<libc::sockaddr_storage>().write(storage);
            *size = len;
            Ok(())
        })
    }
    .ok()?;
    address.as_socket()
}

/// sendmsg(2) of one buffer with one control message.
pub fn send_with(
    socket: &impl AsRawFd,
    to: SocketAddr,
    bytes: &[u8],
    (level, kind, data): (i32, i32, &[u8]),
) -> io::Result<usize> {
    let to = socket2::SockAddr::from(to);
    let mut control = [0u64; 8];
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: zero is valid; every pointer is to a local that outlives the call; CMSG_SPACE of so few bytes is less than
    // `control`.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_namelen = to.len();
        header.msg_iov = &raw mut piece;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(data.len() as u32) as _;
        let message = libc::CMSG_FIRSTHDR(&raw const header);
        (*message).cmsg_level = level;
        (*message).cmsg_type = kind;
        (*message).cmsg_len = libc::CMSG_LEN(data.len() as u32) as _;
        std::ptr::copy_nonoverlapping(data.as_ptr(), libc::CMSG_DATA(message), data.len());
        result(libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT))
    }
}

/// recvmsg(2): the bytes, and the number that a control message of this kind carries.
pub fn receive_with(
    socket: &impl AsRawFd,
    len: usize,
    level: i32,
    kind: i32,
) -> io::Result<(Vec<u8>, Option<u16>)> {
    let (mut bytes, mut control) = (vec![0u8; len], [0u64; 32]);
    let mut piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    // SAFETY: zero is valid; every pointer is to a local that outlives the call; the macros walk what the kernel wrote.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut piece;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        let taken = result(libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT))?;
        bytes.truncate(taken);
        let mut value = None;
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while !message.is_null() {
            if ((*message).cmsg_level, (*message).cmsg_type) == (level, kind) {
                value = Some(libc::CMSG_DATA(message).cast::<u16>().read_unaligned());
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
        Ok((bytes, value))
    }
}

/// Runs `task` in a new network namespace, whose loopback is up.
pub fn in_new_namespace<T: Send + 'static>(task: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    let inside = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; these tests run as root");
        ip("link set lo up");
        let _ = tell.send(task());
    });
    match inside.join() {
        Ok(()) => told.recv().unwrap(),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// ip(8) in the calling thread's namespace, one command a line.
pub fn ip(commands: &str) {
    for line in commands.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let output = std::process::Command::new("ip").args(line.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Sets a kernel parameter of the calling thread's namespace, below /proc/sys/net.
pub fn sysctl(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap_or_else(|error| panic!("{path}: {error}"));
}
