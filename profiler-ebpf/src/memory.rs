//! Access to the profiled process's memory, as the walkers see it.

/// The address could not be read: not mapped, or paged out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// A process's memory.
pub trait Memory {
    /// Reads the eight bytes at `address`.
    fn word(&self, address: u64) -> Result<u64, Fault>;
    /// Fills `block` from `address`.
    fn block(&self, address: u64, block: &mut Block) -> Result<(), Fault>;
}

/// Bytes read at once from an interpreter structure. 96 covers every field we need of a frame and of the fixed part
/// of a code object, in all versions; the excess makes every masked index valid.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Block {
    bytes: [u8; Block::CAPACITY],
}

impl Block {
    /// How many bytes a read fills.
    pub const READ: usize = 96;
    const CAPACITY: usize = 136;
    /// Offsets are masked to this, which keeps a wild offset inside the block (and tells the verifier so).
    const MASK: usize = 127;

    pub const fn zeroed() -> Self {
        Self { bytes: [0; Self::CAPACITY] }
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes.as_mut_ptr()
    }

    #[inline(always)]
    pub fn u64(&self, offset: u16) -> u64 {
        let at = offset as usize & Self::MASK;
        // SAFETY: MASK + 8 <= CAPACITY; the read is unaligned.
        unsafe { self.bytes.as_ptr().add(at).cast::<u64>().read_unaligned() }
    }

    #[inline(always)]
    pub fn u32(&self, offset: u16) -> u32 {
        let at = offset as usize & Self::MASK;
        // SAFETY: MASK + 4 <= CAPACITY; the read is unaligned.
        unsafe { self.bytes.as_ptr().add(at).cast::<u32>().read_unaligned() }
    }

    #[inline(always)]
    pub fn u8(&self, offset: u16) -> u8 {
        let at = offset as usize & Self::MASK;
        // SAFETY: MASK < CAPACITY.
        unsafe { *self.bytes.as_ptr().add(at) }
    }
}
