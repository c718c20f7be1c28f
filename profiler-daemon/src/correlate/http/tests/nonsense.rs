//! Pieces that no server and no kernel makes: survived, within bounds.

use proptest::prelude::*;

use super::run::{GET, OK, Run};
use crate::correlate::http::kernel::Captured;
use crate::correlate::http::partial::PARTIAL_MAX;
use crate::correlate::http::{Connection, Direction};
use crate::record::Outcome::*;

/// Pieces that push the machine from state to state, and many that do not fit.
fn piece() -> impl Strategy<Value = Captured> {
    let text = prop::sample::select(vec![
        GET,
        OK,
        "G",
        "H",
        "HTTP/1.",
        "\r\n",
        "\r\n\r\n",
        "0\r\n\r\n",
        "GET\r\n",
        "PROXY TCP4 x\r\n",
        "PRI * HTTP/2.0\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\n",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
        "HTTP/1.1 200 OK\r\n\r\n",
        "Host: x\r\n",
    ]);
    let bytes = prop_oneof![
        5 => text.prop_map(|text| text.as_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..80),
        1 => (1..5000usize).prop_map(|len| vec![b'A'; len]),
    ];
    // One call transfers at most 2 GiB.
    let beyond = prop_oneof![4 => Just(0u64), 2 => 0..100u64, 1 => 0..1u64 << 31];
    let rest = (0..4u64, any::<bool>(), prop::bool::weighted(0.6), prop::bool::weighted(0.05), 0..=8usize);
    let early = prop_oneof![Just(0u64), 0..200u64];
    let pieces = (bytes, beyond, early, rest);
    pieces.prop_map(|(bytes, beyond, early, (activation, begins, inward, lost, tail))| Captured {
        time: 0,
        // How long before `time`, until that is known.
        handed: early,
        tid: activation as u32,
        activation,
        begins,
        direction: if inward { Direction::In } else { Direction::Out },
        advance: bytes.len() as u64 + beyond,
        tail: bytes[bytes.len().saturating_sub(tail)..].to_vec(),
        bytes,
        lost: u32::from(lost),
        blind: lost,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nonsense_is_survived_within_bounds(pieces in proptest::collection::vec(piece(), 0..150), accepted: bool, end in 0..3usize) {
        let mut run = Run::on(if accepted { Connection::accepted() } else { Connection::joined() });
        for (time, mut piece) in pieces.into_iter().enumerate() {
            piece.time = time as u64;
            piece.handed = piece.time.saturating_sub(piece.handed);
            run.feed(vec![piece]);
            if time % 50 == 49 {
                run.idle();
            }
            prop_assert!(run.connection.requests().count() <= 64);
            prop_assert!(run.connection.buffered() <= 2 * 2 * PARTIAL_MAX, "twice for the growth of a vector");
        }
        run.time = 1000;
        let ends: [fn(&mut Run) -> &mut Run; 3] = [Run::close, Run::reset, Run::exit];
        ends[end](&mut run);
        prop_assert!(!run.connection.is_open());
        // Every request that started ended exactly once.
        let of = |word: &str| -> Vec<u64> {
            let lines = run.log.iter().filter_map(|line| line.strip_prefix(word)?.split(' ').next()?.parse().ok());
            lines.collect()
        };
        let mut ended: Vec<u64> = run.done.iter().map(|x| x.seq).chain(of("discard ")).collect();
        ended.sort_unstable();
        prop_assert_eq!(of("start "), ended);
        prop_assert!(run.done.iter().all(|x| x.start <= x.end && x.first_out.is_none_or(|t| x.start <= t && t <= x.end)));
        prop_assert!(run.done.iter().all(|x| x.outcome == Complete || x.note.is_some() || x.outcome == Upgraded));
    }
}
