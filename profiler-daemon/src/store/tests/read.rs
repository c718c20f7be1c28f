//! What was written is found again, in order, page by page, and summed up rightly.

use super::*;

fn filled(dir: &Path, records: impl IntoIterator<Item = RequestRecord>) -> Store {
    let store = Store::open(&config(dir)).unwrap();
    for record in records {
        assert!(store.sender().try_send(entry(record)));
    }
    store.flush();
    store
}

#[test]
fn a_record_comes_back_as_it_was_even_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let full = record(NEW_YEAR, 1);
    let mut bare = record(NEW_YEAR, 2);
    bare.status = None;
    bare.ttfb_ns = None;
    bare.on_cpu_ns = None;
    bare.runqueue_ns = None;
    bare.off_cpu_ns = None;
    bare.note = None;
    bare.trace_id = None;
    bare.boundary = Boundary::Syscall;
    bare.attribution = Attribution::None;
    bare.outcome = Outcome::Exit;
    bare.path = Some("/\u{202e}<script>'; DROP TABLE requests; --".into());
    (bare.method, bare.route) = (None, None);
    let store = filled(dir.path(), [full.clone(), bare.clone()]);
    store.close();
    let store = Store::open(&config(dir.path())).unwrap();
    assert!(store.warnings().is_empty());
    let reader = store.reader();
    assert_eq!(reader.get(id(1).parse().unwrap()).unwrap(), Some(full));
    assert_eq!(reader.get(id(2).parse().unwrap()).unwrap(), Some(bare));
    assert_eq!(reader.get(id(3).parse().unwrap()).unwrap(), None);
}

#[test]
fn what_has_a_profile_says_so_and_the_rest_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), [record(NEW_YEAR, 1)]);
    let profile = crate::profile::Profile::default();
    for n in 2..=4 {
        let entry = Entry { profile: Some(profile.encode()), ..entry(record(NEW_YEAR, n)) };
        assert!(store.sender().try_send(entry));
    }
    store.flush();
    let reader = store.reader();
    assert!(!reader.get(id(1).parse().unwrap()).unwrap().unwrap().profile);
    assert!(reader.profile(id(1).parse().unwrap()).unwrap().is_none());
    assert!(reader.get(id(2).parse().unwrap()).unwrap().unwrap().profile);
    assert_eq!(reader.profile(id(2).parse().unwrap()).unwrap(), Some(profile));
    let merged = reader.merged(&Filter::default(), soon()).unwrap();
    assert_eq!((merged.merged, merged.unreadable, merged.truncated), (3, 0, false));
    let other = Filter { service: Some("other".into()), ..Filter::default() };
    let none = reader.merged(&other, soon()).unwrap();
    assert_eq!(none.merged, 0);
}

#[test]
fn a_merged_profile_is_bounded_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    let bytes = crate::profile::Profile::default().encode();
    for n in 0..=reader::MAX_MERGED as u64 {
        assert!(
            store.sender().try_send(Entry { profile: Some(bytes.clone()), ..entry(record(NEW_YEAR, n)) })
        );
    }
    store.flush();
    let merged = store.reader().merged(&Filter::default(), soon()).unwrap();
    assert_eq!((merged.merged, merged.truncated), (2_000, true));
}

/// Request `n` of 1 ms; every tenth was hit by one sample that stands for 10 ms.
fn short(n: u64) -> Entry {
    let hit = n.is_multiple_of(10);
    let duration_ns = 1_000_000;
    let record = RequestRecord { duration_ns, samples: u64::from(hit), ..record(NEW_YEAR, n) };
    let profile = hit.then(|| {
        let frame = crate::profile::testing::py("view", 12);
        let mut builder = crate::profile::Builder::default();
        builder.add(&crate::profile::testing::stack(&[frame]), 10_000_000);
        builder.finish(duration_ns).encode()
    });
    Entry { sampled_cpu_ns: Some(if hit { 10_000_000 } else { 0 }), record, profile }
}

#[test]
fn a_merged_profile_is_also_of_the_requests_that_no_sample_hit() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    for n in 0..100 {
        assert!(store.sender().try_send(short(n)));
    }
    // Not sampled at all, so its time says nothing about samples.
    let unattributed = RequestRecord { attribution: Attribution::None, samples: 0, ..record(NEW_YEAR, 200) };
    // Sampled, but its profile was too large to be kept.
    let without = RequestRecord { samples: 3, ..record(NEW_YEAR, 201) };
    for record in [unattributed, without] {
        assert!(store.sender().try_send(Entry { sampled_cpu_ns: None, ..entry(record) }));
    }
    store.flush();
    let merged = store.reader().merged(&Filter::default(), soon()).unwrap();
    assert_eq!((merged.merged, merged.without_samples), (10, 90));
    let profile = merged.profile;
    assert_eq!((profile.requests(), profile.duration_ns()), (100, 100_000_000));
    assert_eq!((profile.samples(), profile.sampled_ns()), (10, 100_000_000));
    let half = Filter { since: Some(NEW_YEAR + 50), ..Filter::default() };
    let merged = store.reader().merged(&half, soon()).unwrap();
    assert_eq!((merged.profile.requests(), merged.profile.sampled_ns()), (50, 50_000_000));
}

#[test]
fn a_cut_merged_profile_is_of_one_stretch_of_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    for n in 0..=10 * reader::MAX_MERGED as u64 {
        while !store.sender().try_send(short(n)) {
            store.flush();
        }
    }
    store.flush();
    let merged = store.reader().merged(&Filter::default(), soon()).unwrap();
    assert!(merged.truncated);
    // The newest profile is of request 20,000, the oldest that still fits of request 10.
    assert_eq!((merged.merged, merged.profile.requests()), (2_000, 20_000 - 10 + 1));
}

#[test]
fn a_question_that_nobody_waits_for_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&config(dir.path())).unwrap();
    assert!(store.sender().try_send(short(0)));
    store.flush();
    let over = Deadline::after(Duration::ZERO);
    assert!(matches!(store.reader().merged(&Filter::default(), over), Err(ReadError::Deadline)));
    assert!(matches!(store.reader().routes(&Filter::default(), over), Err(ReadError::Deadline)));
}

#[test]
fn each_filter_selects_exactly_its_requests() {
    let dir = tempfile::tempdir().unwrap();
    let change = |n: u64, f: fn(&mut RequestRecord)| {
        let mut r = record(NEW_YEAR, n);
        f(&mut r);
        r
    };
    let store = filled(
        dir.path(),
        [
            change(1, |r| r.service = "blog".into()),
            change(2, |r| r.route = Some("/".into())),
            change(3, |r| r.method = Some("POST".into())),
            change(4, |r| r.status = Some(503)),
            change(5, |r| r.status = None),
            change(6, |r| r.pid = 7),
            change(7, |r| r.duration_ns = 50),
            change(8, |r| r.duration_ns = u64::MAX),
        ],
    );
    let list = |filter: Filter| ids(&store.reader().list(&filter, Sort::Oldest, 100, None).unwrap());
    let any = Filter::default;
    assert_eq!(list(any()), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(list(Filter { service: Some("blog".into()), ..any() }), [1]);
    assert_eq!(list(Filter { route: Some("/".into()), ..any() }), [2]);
    assert_eq!(list(Filter { method: Some("POST".into()), ..any() }), [3]);
    assert_eq!(list(Filter { status: Some(StatusFilter::Exactly(503)), ..any() }), [4]);
    assert_eq!(list(Filter { status: Some(StatusFilter::Class(5)), ..any() }), [4]);
    assert_eq!(list(Filter { status: Some(StatusFilter::Class(2)), ..any() }), [1, 2, 3, 6, 7, 8]);
    assert_eq!(list(Filter { pid: Some(7), ..any() }), [6]);
    assert_eq!(list(Filter { max_duration: Some(50), ..any() }), [7]);
    assert_eq!(list(Filter { min_duration: Some(1_006), ..any() }), [6, 8]);
    assert_eq!(list(Filter { since: Some(NEW_YEAR + 7), ..any() }), [7, 8]);
    assert_eq!(list(Filter { until: Some(NEW_YEAR + 2), ..any() }), [1]);
    assert_eq!(list(Filter { service: Some("' OR 1=1 --".into()), ..any() }), [0; 0]);
}

#[test]
fn pages_neither_repeat_nor_hide_a_row_while_rows_come_in() {
    for (sort, first, rest) in [
        (Sort::Newest, [9, 8, 7, 6], vec![5, 4, 3, 2, 1, 0]),
        (Sort::Oldest, [0, 1, 2, 3], vec![4, 5, 6, 7, 8, 9, 100, 101]),
        // The durations are 1,000 + n, except that the new ones have the same duration as number 5.
        (Sort::Slowest, [9, 8, 7, 6], vec![101, 100, 5, 4, 3, 2, 1, 0]),
        (Sort::Fastest, [0, 1, 2, 3], vec![4, 5, 100, 101, 6, 7, 8, 9]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = filled(dir.path(), (0..10).map(|n| record(NEW_YEAR, n)));
        let reader = store.reader();
        let page = reader.list(&Filter::default(), sort, 4, None).unwrap();
        assert_eq!(ids(&page), first, "{sort:?}");
        for n in [100, 101] {
            let late = RequestRecord { duration_ns: 1_005, ..record(NEW_YEAR, n) };
            assert!(store.sender().try_send(entry(late)));
        }
        store.flush();
        let mut seen = Vec::new();
        let mut next = page.next;
        while let Some(cursor) = next {
            let page = reader.list(&Filter::default(), sort, 3, Some(&cursor)).unwrap();
            assert!(!page.records.is_empty(), "a cursor promises another row");
            seen.extend(ids(&page));
            next = page.next;
        }
        assert_eq!(seen, rest, "{sort:?}");
    }
}

#[test]
fn a_cursor_that_we_did_not_make_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), [record(NEW_YEAR, 1), record(NEW_YEAR, 2)]);
    let reader = store.reader();
    let next = reader.list(&Filter::default(), Sort::Newest, 1, None).unwrap().next.unwrap();
    for (sort, text) in [(Sort::Slowest, next.as_str()), (Sort::Newest, ""), (Sort::Newest, "1;--")] {
        let result = reader.list(&Filter::default(), sort, 1, Some(text));
        assert!(matches!(result, Err(ReadError::BadCursor(_))), "{sort:?} {text:?}");
    }
}

#[test]
fn routes_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let off = |network, gil| Some(OffCpu { network, gil, ..OffCpu::default() });
    // Durations 1 to 200 in an order that is not theirs: the nearest ranks are 100, 190 and 198.
    let mut records: Vec<_> = (0..200)
        .map(|n| RequestRecord {
            duration_ns: n * 77 % 200 + 1,
            status: Some(if n < 3 { 500 } else { 404 }),
            outcome: if n == 150 { Outcome::Aborted } else { Outcome::Complete },
            on_cpu_ns: (n < 2).then_some(10 + n),
            off_cpu_ns: if n < 2 { off(5, n) } else { None },
            ..record(NEW_YEAR, n)
        })
        .collect();
    records.push(RequestRecord {
        route: None,
        duration_ns: 42,
        status: None,
        on_cpu_ns: None,
        off_cpu_ns: None,
        ..record(NEW_YEAR, 900)
    });
    let store = filled(dir.path(), records);
    let routes = store.reader().routes(&Filter::default(), soon()).unwrap();
    let orders = RouteStats {
        service: "shop".into(),
        route: Some("/orders/{id}".into()),
        count: 200,
        errors: 4,
        p50_ns: 100,
        p95_ns: 190,
        p99_ns: 198,
        max_ns: 200,
        total_ns: 20_100,
        on_cpu_ns: Some(21),
        off_cpu_ns: off(10, 1),
        sampled_cpu_ns: Some(1_000),
        samples: 1_400,
        profiles: 0,
    };
    let one = RouteStats {
        service: "shop".into(),
        route: None,
        count: 1,
        errors: 0,
        p50_ns: 42,
        p95_ns: 42,
        p99_ns: 42,
        max_ns: 42,
        total_ns: 42,
        on_cpu_ns: None,
        off_cpu_ns: None,
        sampled_cpu_ns: Some(5),
        samples: 7,
        profiles: 0,
    };
    assert_eq!(routes, [orders, one.clone()]);
    let since = Filter { since: Some(NEW_YEAR + 900), ..Filter::default() };
    assert_eq!(store.reader().routes(&since, soon()).unwrap(), [one]);
}
