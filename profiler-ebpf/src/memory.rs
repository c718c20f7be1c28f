//! Access to the profiled process's memory, as the walkers see it.

/// The address could not be read: not mapped, or paged out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// A process's memory.
pub trait Memory {
    /// Reads the eight bytes at `address`.
    fn word(&self, address: u64) -> Result<u64, Fault> {
        let mut block = Block::<8>::zeroed();
        self.fill(address, 8, &mut block)?;
        Ok(block.u64(0))
    }

    /// Reads the sixteen bytes at `address`.
    fn pair(&self, address: u64) -> Result<(u64, u64), Fault> {
        let mut block = Block::<16>::zeroed();
        self.fill(address, 16, &mut block)?;
        Ok((block.u64(0), block.u64(8)))
    }

    /// Reads `size` bytes, at most `N`, from `address` to the start of `block`.
    fn fill<const N: usize>(&self, address: u64, size: u32, block: &mut Block<N>) -> Result<(), Fault>;
}

/// Room for `N` bytes, a power of two.
///
/// Numbers are read where they are aligned, as compilers lay them out: an index is silently rounded down to that, and
/// callers see to it that there is nothing to round. For BPF each other read is one per byte, and the shifts to put
/// them together, which made most of a walk's time.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Block<const N: usize> {
    bytes: [u8; N],
}

impl<const N: usize> Block<N> {
    /// Indices are masked to this, which keeps a wild one inside the block (and tells the verifier so).
    const MASK: usize = {
        assert!(N.is_power_of_two() && N >= 8);
        N - 1
    };

    pub const fn zeroed() -> Self {
        Self { bytes: [0; N] }
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes.as_mut_ptr()
    }

    #[inline(always)]
    fn at<T>(&self, index: u32) -> *const T {
        let mask = Self::MASK & !(size_of::<T>() - 1);
        // SAFETY: the mask is below N.
        unsafe { (&raw const *self).cast::<u8>().add(index as usize & mask).cast() }
    }

    #[inline(always)]
    pub fn u64(&self, index: u32) -> u64 {
        // SAFETY: a multiple of 8 below N, which is one too, is followed by eight bytes; the block is aligned to 8.
        unsafe { *self.at(index) }
    }

    #[inline(always)]
    pub fn u32(&self, index: u32) -> u32 {
        // SAFETY: as above, of 4.
        unsafe { *self.at(index) }
    }

    #[inline(always)]
    pub fn u8(&self, index: u32) -> u8 {
        // SAFETY: an index below N.
        unsafe { *self.at(index) }
    }
}
