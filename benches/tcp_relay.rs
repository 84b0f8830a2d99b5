//! What the TCP relay itself costs: a segment in, and everything that is decided because of it.

#[path = "steps/connection.rs"]
mod connection;

use connection::{Connection, SEGMENT};
use criterion::{Criterion, criterion_group, criterion_main};

fn guest_to_host(criterion: &mut Criterion) {
    let mut connection = Connection::open();
    criterion.bench_function("tcp_relay/segment_of_guest", |bencher| {
        bencher.iter(|| connection.give(SEGMENT));
    });
    assert_eq!(connection.relay.receive().next(), connection.guest.seq, "every segment was taken");
}

fn host_to_guest(criterion: &mut Criterion) {
    let mut connection = Connection::open();
    criterion.bench_function("tcp_relay/segment_to_guest_and_its_acknowledgement", |bencher| {
        bencher.iter(|| assert_eq!(connection.take(SEGMENT), SEGMENT));
    });
}

fn one_byte_each_way(criterion: &mut Criterion) {
    let mut connection = Connection::open();
    criterion.bench_function("tcp_relay/question_and_answer", |bencher| {
        bencher.iter(|| {
            connection.give(1);
            connection.take(1)
        });
    });
}

criterion_group!(benches, guest_to_host, host_to_guest, one_byte_each_way);
criterion_main!(benches);
