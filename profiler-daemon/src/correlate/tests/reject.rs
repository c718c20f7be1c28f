//! Processes that turn out not to be selected.

use super::stage::{OK, Stage};

#[test]
fn what_a_rejected_process_had_open_is_discarded() {
    let mut stage = Stage::new();
    stage.accept(1, 5).accept(2, 5);
    stage.request(1, 10, 5, "/theirs").samples(1, 10, 2);
    stage.request(2, 20, 5, "/ours").samples(2, 20, 3);
    stage.reject(1);
    assert_eq!(stage.left, [(1, 5)], "the kernel side is told of the connection");
    stage.output(2, 20, 5, OK).close(2, 20, 5);
    stage.gives(&["/ours Complete 3 after 0"]);
    let counters = stage.counters();
    assert_eq!(
        (counters.requests_discarded, counters.samples_attributed, counters.samples_revoked),
        (1, 3, 2)
    );
    assert_eq!((stage.engine.open_requests(), stage.engine.open_connections()), (0, 0));
}
