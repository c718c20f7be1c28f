//! Recordings: their header, and a small one of a real server.

use super::*;

#[test]
fn another_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events");
    drop(Recorder::create(&path, 5).unwrap());
    assert_eq!(Player::open(&path).unwrap().epoch, 5);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[9] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(
        matches!(Player::open(&path), Err(ReplayError::Version { found, .. }) if found == ABI_VERSION ^ 1)
    );
    std::fs::write(&path, "reqprof1\n12345678901234567890").unwrap();
    assert!(matches!(Player::open(&path), Err(ReplayError::Magic(_))));
}

#[test]
fn a_cut_recording_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events");
    let mut recorder = Recorder::create(&path, 5).unwrap();
    recorder.record(&[0; 40]);
    recorder.record(&[0; 40]);
    drop(recorder);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let mut player = Player::open(&path).unwrap();
    let mut record = Vec::new();
    assert!(player.next_record(&mut record).unwrap().is_some());
    assert!(matches!(player.next_record(&mut record), Err(ReplayError::Damaged(_, 65))));
}
