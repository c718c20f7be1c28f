//! From the ring's bytes to events.
//!
//! In: one record as the kernel side wrote it. Out: a typed [`Event`] that borrows the record's bytes. Every count
//! inside a record is checked against the length that the ring reported; a record that does not add up is an
//! error to be counted, never a guess.

use profiler_common::{
    Accept, Close, ConnId, Data, Exit, Fork, Header, Interleaved, KERNEL_FRAMES_MAX, Kind, RawFrame, Sample,
    USER_FRAMES_MAX,
};

/// What the kernel side reports.
#[derive(Debug)]
pub enum Event<'a> {
    Sample(SampleEvent<'a>),
    Data { data: Data, captured: &'a [u8] },
    Accept(Header, ConnId),
    Close(Header, ConnId),
    Fork { header: Header, child: u32 },
    Exec(Header),
    Exit { header: Header, live: u32 },
    Interleaved { header: Header, activation: u64 },
}

/// A CPU sample with its raw stack, leaf first.
#[derive(Debug)]
pub struct SampleEvent<'a> {
    pub sample: Sample,
    user: &'a [u8],
    kernel: &'a [u8],
}

impl SampleEvent<'_> {
    /// One without a stack.
    #[cfg(test)]
    pub fn bare(sample: Sample) -> Self {
        Self { sample, user: &[], kernel: &[] }
    }
    pub fn user(&self) -> impl ExactSizeIterator<Item = RawFrame> {
        self.user.chunks_exact(size_of::<RawFrame>()).map(pod::<RawFrame>)
    }
    pub fn kernel(&self) -> impl ExactSizeIterator<Item = u64> {
        self.kernel.chunks_exact(8).map(pod::<u64>)
    }
}

/// A record that is not what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("record of {0} bytes is too short")]
    Short(usize),
    #[error("unknown record kind {0}")]
    Kind(u16),
    #[error("a record's counts exceed its length")]
    Counts,
}

/// Types that may be read from any bytes.
trait Plain: Copy {}
impl Plain for u64 {}
impl Plain for RawFrame {}
impl Plain for Header {}
impl Plain for Sample {}
impl Plain for Data {}
impl Plain for Accept {}
impl Plain for Close {}
impl Plain for Fork {}
impl Plain for Exit {}
impl Plain for Interleaved {}

fn pod<T: Plain>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: long enough by the assertion; a Plain type is made of integers, for which any bytes are valid.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

fn fixed<T: Plain>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() < size_of::<T>() { Err(DecodeError::Short(bytes.len())) } else { Ok(pod(bytes)) }
}

/// Reads one record.
pub fn decode(bytes: &[u8]) -> Result<Event<'_>, DecodeError> {
    let header: Header = fixed(bytes)?;
    let is = |kind: Kind| header.kind == kind as u16;
    if is(Kind::Sample) {
        let sample: Sample = fixed(bytes)?;
        let (users, kernels) = (usize::from(sample.user_count), usize::from(sample.kernel_count));
        let user_end = size_of::<Sample>() + users * size_of::<RawFrame>();
        let end = user_end + kernels * 8;
        if users > USER_FRAMES_MAX || kernels > KERNEL_FRAMES_MAX || end > bytes.len() {
            return Err(DecodeError::Counts);
        }
        let (user, kernel) = (&bytes[size_of::<Sample>()..user_end], &bytes[user_end..end]);
        Ok(Event::Sample(SampleEvent { sample, user, kernel }))
    } else if is(Kind::Data) {
        let data: Data = fixed(bytes)?;
        let captured = usize::from(data.captured);
        let start = size_of::<Data>();
        if start + captured > bytes.len() || captured as u64 > data.advance || data.tail_len > 8 {
            return Err(DecodeError::Counts);
        }
        Ok(Event::Data { data, captured: &bytes[start..start + captured] })
    } else if is(Kind::Accept) {
        let record: Accept = fixed(bytes)?;
        Ok(Event::Accept(record.header, record.conn))
    } else if is(Kind::Close) {
        let record: Close = fixed(bytes)?;
        Ok(Event::Close(record.header, record.conn))
    } else if is(Kind::Fork) {
        let record: Fork = fixed(bytes)?;
        Ok(Event::Fork { header: record.header, child: record.child })
    } else if is(Kind::Exec) {
        Ok(Event::Exec(header))
    } else if is(Kind::Exit) {
        let record: Exit = fixed(bytes)?;
        Ok(Event::Exit { header: record.header, live: record.live })
    } else if is(Kind::Interleaved) {
        let record: Interleaved = fixed(bytes)?;
        Ok(Event::Interleaved { header: record.header, activation: record.activation })
    } else {
        Err(DecodeError::Kind(header.kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A sample with two user frames and one kernel address, laid out by hand as record.rs documents.
    fn sample_bytes() -> Vec<u8> {
        let mut b = Vec::new();
        b.extend(1u16.to_ne_bytes());
        b.extend(0u16.to_ne_bytes());
        b.extend(0u32.to_ne_bytes());
        b.extend(77u64.to_ne_bytes());
        b.extend(10u32.to_ne_bytes());
        b.extend(11u32.to_ne_bytes());
        b.extend(5u64.to_ne_bytes());
        b.extend(1u16.to_ne_bytes());
        b.extend(2u16.to_ne_bytes());
        b.extend(0u32.to_ne_bytes());
        b.extend(10_101_010u64.to_ne_bytes());
        for (address, kind_lasti, check) in [(0x1111u64, 0u32, 0u32), (0x2222, (2 << 28) | 12, 9)] {
            b.extend(address.to_ne_bytes());
            b.extend(kind_lasti.to_ne_bytes());
            b.extend(check.to_ne_bytes());
        }
        b.extend(0xffff_8000_0000_0001u64.to_ne_bytes());
        b
    }

    #[test]
    fn a_sample_is_read_field_by_field() {
        let bytes = sample_bytes();
        let Ok(Event::Sample(s)) = decode(&bytes) else { panic!() };
        assert_eq!((s.sample.header.time, s.sample.header.pid, s.sample.header.tid), (77, 10, 11));
        assert_eq!((s.sample.activation, s.sample.weight), (5, 10_101_010));
        let user: Vec<_> = s.user().collect();
        assert_eq!(user[0].address, 0x1111);
        assert_eq!((user[1].kind(), user[1].lasti(), user[1].check), (2, 12, 9));
        assert_eq!(s.kernel().collect::<Vec<_>>(), [0xffff_8000_0000_0001]);
    }

    #[test]
    fn counts_beyond_the_record_are_refused() {
        let mut bytes = sample_bytes();
        bytes.truncate(bytes.len() - 1);
        assert_eq!(decode(&bytes).unwrap_err(), DecodeError::Counts);
        assert_eq!(decode(&bytes[..10]).unwrap_err(), DecodeError::Short(10));
        bytes[0] = 99;
        assert_eq!(decode(&bytes).unwrap_err(), DecodeError::Kind(99));
    }

    /// Laid out by hand as record.rs documents.
    #[test]
    fn interleaving_is_read_field_by_field() {
        let mut b = Vec::new();
        b.extend(8u16.to_ne_bytes());
        b.extend([0; 6]);
        b.extend(77u64.to_ne_bytes());
        b.extend(10u32.to_ne_bytes());
        b.extend(11u32.to_ne_bytes());
        b.extend(5u64.to_ne_bytes());
        let Ok(Event::Interleaved { header, activation }) = decode(&b) else { panic!() };
        assert_eq!((header.time, header.pid, header.tid, activation), (77, 10, 11, 5));
        assert_eq!(decode(&b[..31]).unwrap_err(), DecodeError::Short(31));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..10) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = kind; }
            if bytes.len() > 1 { bytes[1] = 0; }
            if let Ok(Event::Sample(s)) = decode(&bytes) {
                prop_assert_eq!(s.user().count(), usize::from(s.sample.user_count));
                prop_assert_eq!(s.kernel().count(), usize::from(s.sample.kernel_count));
            }
        }
    }
}
