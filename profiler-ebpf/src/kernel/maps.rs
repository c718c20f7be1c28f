//! Every map and every load-time constant, with why it has this type and this size.

use aya_ebpf::{
    bindings::bpf_map_type::BPF_MAP_TYPE_ARRAY,
    btf_maps,
    helpers::bpf_map_lookup_elem,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, RingBuf},
};
use profiler_common::unwind::{
    Block, CHUNK_BLOCKS, CHUNKS_MAX, MAPPINGS_MAX, Mapping, RULES_MAX, Rule, Space,
};
use profiler_common::{
    ABI_VERSION, Active, CODE_LIVES_MAX, CONTEXT_PROCESSES_MAX, CodeLives, Connection, ContextKey,
    STAT_COUNT, Settings, Stat, Target,
};
use profiler_ebpf::{native::Found, places::PLACES, python::Known};

use super::{
    context::Turn,
    sampler::Walk,
    tls::{Session, SessionKey, Thread},
    transfer::Transfer,
};

/// The only way to the daemon. A ring and not per-CPU buffers, because records of one connection must keep their
/// order. The daemon resizes it at load; 8 MiB hold about 200 ms of records at 60,000 requests a second.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// The processes we look at. 16,384 is far more than a host's services have workers.
#[map]
pub static TARGETS: HashMap<u32, Target> = HashMap::with_max_entries(16_384, 0);

/// Open server-side connections. Preallocated, because it is updated where allocation may fail; 65,536 are 7 MB.
#[map]
pub static CONNECTIONS: HashMap<u64, Connection> = HashMap::with_max_entries(65_536, 0);

/// Threads inside a request. Bounded by the threads of all targets that serve at once; preallocated as above.
#[map]
pub static ACTIVE: HashMap<u32, Active> = HashMap::with_max_entries(16_384, 0);

/// Transfers being looked at, by thread: one while its programs run, which a preemption may draw out but nothing ends
/// early. So the bound is on threads preempted there at once. Not per CPU, since programs of several threads are then
/// under way on one, and not part of `CONNECTIONS`, since several threads transfer on one connection.
#[map]
pub static TRANSFERS: HashMap<u32, Transfer> = HashMap::with_max_entries(4096, 0);

/// Counters; per CPU, so that CPUs do not wait for each other.
#[map]
pub static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(STAT_COUNT, 0);

/// The sampler's scratch: a stack is larger than the BPF stack. The CPU clock interrupts only code that is not the
/// sampler, so one per CPU is enough.
#[map]
pub static WALK: PerCpuArray<Walk> = PerCpuArray::with_max_entries(1, 0);

/// Blocks of unwind tables, a megabyte in each inner map, which the daemon makes when it needs one. Arrays, because a
/// look-up in one is compiled into the program; of one size, because otherwise it is not.
#[btf_map]
pub static UNWIND_CHUNKS: btf_maps::ArrayOfMaps<Chunk, { CHUNKS_MAX as usize }> =
    btf_maps::ArrayOfMaps::new();

/// The template of those inner maps, as libbpf's map definitions are written: numbers are the lengths of arrays. It gives
/// sizes and not types of key and value, because Linux 5.15 to 6.1 takes no inner map whose BTF is not that of the
/// template (`bpf_map_meta_equal` in kernel/bpf/map_in_map.c), and the daemon makes the inner maps without any.
#[repr(C)]
pub struct Chunk {
    r#type: *const [i32; BPF_MAP_TYPE_ARRAY as usize],
    key_size: *const [i32; size_of::<u32>()],
    value_size: *const [i32; size_of::<Block>()],
    max_entries: *const [i32; CHUNK_BLOCKS as usize],
}

/// A block, by its number among all.
#[inline(always)]
pub fn block(number: u32) -> Option<&'static Block> {
    let chunk: *const Chunk = UNWIND_CHUNKS.get(number / CHUNK_BLOCKS)?;
    let key = number % CHUNK_BLOCKS;
    // SAFETY: an array map of blocks with keys of this type, and a key on the stack. Arrays keep their elements in place;
    // the daemon writes none that a program may be reading (what is given back rests before it is used again).
    unsafe { bpf_map_lookup_elem(chunk.cast_mut().cast(), (&raw const key).cast()).cast::<Block>().as_ref() }
}

/// The rules that rows of those tables name: 256 KiB.
#[map]
pub static UNWIND_RULES: Array<Rule> = Array::with_max_entries(RULES_MAX, 0);

/// Executable memory of the targets, each one's in a row: 2 MiB.
#[map]
pub static MAPPINGS: Array<Mapping> = Array::with_max_entries(MAPPINGS_MAX, 0);

/// Which of `MAPPINGS` are a target's, by pid. Apart from `TARGETS`, because another thread of the daemon writes it.
#[map]
pub static SPACES: HashMap<u32, Space> = HashMap::with_max_entries(16_384, 0);

/// Rules that walks on this CPU have found, 16 KiB. One element and not one per rule, because each would be an allocation
/// of its own.
#[map]
pub static FOUND_RULES: PerCpuArray<[Found; PLACES]> = PerCpuArray::with_max_entries(1, 0);

/// The same for code objects, 24 KiB. For each CPU, because a walk is not to see half of what another writes.
#[map]
pub static KNOWN_CODE: PerCpuArray<[Known; PLACES]> = PerCpuArray::with_max_entries(1, 0);

/// Processes whose code objects are seen dying: as many as the daemon puts probes into.
#[map]
pub static CODE_LIVES: HashMap<u32, CodeLives> = HashMap::with_max_entries(CODE_LIVES_MAX, 0);

/// Contexts that work for a request. A request of an event loop has some ten at a time; 65,536 are 7 MB, preallocated
/// because they come and go with every request.
#[map]
pub static CONTEXTS: HashMap<ContextKey, u64> = HashMap::with_max_entries(65_536, 0);

/// Threads of event loops: one or a few in each process whose contexts are followed.
#[map]
pub static TURNS: HashMap<u32, Turn> = HashMap::with_max_entries(4096, 0);

/// Processes whose contexts are followed.
#[map]
pub static CONTEXT_PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(CONTEXT_PROCESSES_MAX, 0);

/// Threads that receive on connections with TLS: as many as serve such at once.
#[map]
pub static TLS_THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(4096, 0);

/// What sessions of TLS work on. As many as connections are followed; not all ends are seen, so the one that was used
/// least recently makes room, and is told anew when it receives again. 5 MB, preallocated as above.
#[map]
pub static TLS_SESSIONS: LruHashMap<SessionKey, Session> = LruHashMap::with_max_entries(65_536, 0);

/// The sampler's continuation programs.
#[map]
pub static SAMPLE_STEPS: ProgramArray = ProgramArray::with_max_entries(2, 0);
pub const STEP_WALK: u32 = 0;
pub const STEP_FINISH: u32 = 1;

/// What looks at the next piece of a transfer, by direction.
#[map]
pub static TRANSFER_STEPS: ProgramArray = ProgramArray::with_max_entries(2, 0);

/// The same at system calls: a program array holds programs of one type.
#[map]
pub static SYSCALL_STEPS: ProgramArray = ProgramArray::with_max_entries(2, 0);

/// Layout version, compared by the daemon before anything is attached.
#[unsafe(no_mangle)]
pub static ABI: u32 = ABI_VERSION;

/// Set by the daemon before loading; the verifier sees constants and drops what is off.
#[unsafe(no_mangle)]
pub static SETTINGS: Settings = Settings {
    kernel: profiler_common::KernelOffsets {
        valid: 0,
        task_tgid: 0,
        task_stack: 0,
        task_signal: 0,
        task_fsbase: 0,
        signal_live: 0,
        task_nvcsw: 0,
        task_files: 0,
        files_fdt: 0,
        fdtable_max_fds: 0,
        fdtable_fd: 0,
        file_inode: 0,
        file_epoll: 0,
        file_epoll_list: 0,
        file_flags: 0,
        reserved: 0,
        inode_number: 0,
        inode_mode: 0,
    },
    own_pid: 0,
    adopt_acceptors: 0,
    has_task_pt_regs: 0,
    reserved: 0,
    ring_reserve: 0,
};

#[inline(always)]
pub fn settings() -> Settings {
    // SAFETY: a static of our own; volatile, because the daemon replaces the value that the compiler sees.
    unsafe { core::ptr::read_volatile(&raw const SETTINGS) }
}

#[inline(always)]
pub fn count(stat: Stat) {
    if let Some(slot) = STATS.get_ptr_mut(stat as u32) {
        // SAFETY: a live map value. It is not atomic, which the target does not offer: where a uprobe program is
        // preempted between load and store by another that counts the same on this CPU, one of the two is not counted.
        unsafe { slot.write_volatile(slot.read_volatile() + 1) };
    }
}

/// No wake-up per record: the daemon polls, which is far cheaper than being woken thousands of times a second.
pub const QUIET: u64 = 1; // BPF_RB_NO_WAKEUP
