//! Why a frame has no name.

use crate::process::memory::ReadError;
use crate::process::patience::Unanswered;

use super::python::code::CodeError;

/// Why a frame could not be resolved; a label of `reqprof_unwind_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The address is in no mapping of the process.
    Unmapped,
    /// The mapping has no file: code made at run time.
    Anonymous,
    /// The file cannot be opened, is no regular file, or is not what was mapped.
    Unopened,
    /// The file is not an ELF file that is understood.
    Damaged,
    /// The file could be truncated by others while it is read, and is too large to copy.
    TooLarge,
    /// More files in use at once than are kept open.
    TooManyFiles,
    /// The file has no symbol there.
    NoSymbol,
    /// A guessed return address has no call before it: the guess, and what was guessed from it, is dropped.
    NoCallSite,
    /// More native frames than are kept beside Python frames.
    LeftOut,
    /// Kernel addresses are hidden (`kptr_restrict`, no CAP_SYSLOG) or unknown.
    NoKernelSymbol,
    /// The interpreter is of a version that is not supported, or cannot be found.
    NoInterpreter,
    /// Another object lies at the code object's address by now.
    Reused,
    /// The code object makes no sense.
    DamagedCode,
    /// The code object cannot be read (freed, or paged out).
    Fault,
    /// The process ended before its code object was read.
    Gone,
    /// The process lets reads of its memory or files wait; see `process::patience`.
    Unanswered,
    /// No permission to read the process's memory.
    Denied,
}

impl Reason {
    /// Whether it may be over at the next sight of the frame, which is then tried again.
    pub(super) const fn passes(self) -> bool {
        matches!(
            self,
            Self::Unmapped | Self::TooManyFiles | Self::Fault | Self::Gone | Self::Reused | Self::Unanswered
        )
    }

    /// Whether it is said of code that programs make at run time: in no file, or in one that is none of code.
    pub(super) const fn may_be_generated(self) -> bool {
        matches!(self, Self::Anonymous | Self::Damaged)
    }

    /// The name used as a label and in frames.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unmapped => "unmapped",
            Self::Anonymous => "anonymous",
            Self::Unopened => "unopened",
            Self::Damaged => "damaged_file",
            Self::TooLarge => "too_large",
            Self::TooManyFiles => "too_many_files",
            Self::NoSymbol => "no_symbol",
            Self::NoCallSite => "no_call_site",
            Self::LeftOut => "left_out",
            Self::NoKernelSymbol => "no_kernel_symbol",
            Self::NoInterpreter => "no_interpreter",
            Self::Reused => "reused",
            Self::DamagedCode => "damaged_code",
            Self::Fault => "fault",
            Self::Gone => "gone",
            Self::Unanswered => "unanswered",
            Self::Denied => "denied",
        }
    }
}

impl From<Unanswered> for Reason {
    fn from(_: Unanswered) -> Self {
        Self::Unanswered
    }
}

impl From<CodeError> for Reason {
    fn from(error: CodeError) -> Self {
        match error {
            CodeError::Reused => Self::Reused,
            CodeError::Damaged => Self::DamagedCode,
            CodeError::Memory(ReadError::Gone) => Self::Gone,
            CodeError::Memory(ReadError::Denied) => Self::Denied,
            CodeError::Memory(ReadError::Fault | ReadError::Os(_)) => Self::Fault,
        }
    }
}
