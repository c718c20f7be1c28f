//! Offsets of kernel structure members, from the running kernel's own type information.
//!
//! In: `/sys/kernel/btf/vmlinux` (format: Documentation/bpf/btf.rst). Out: byte offsets. Rust emits no CO-RE
//! relocations, so what the kernel side reads of kernel structures is resolved here and passed in at load time.

use profiler_common::KernelOffsets;

/// Where the running kernel publishes its types.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's types are missing or not as expected.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("{VMLINUX}: {0}")]
    Read(#[from] std::io::Error),
    #[error("{VMLINUX} is malformed: {0}")]
    Malformed(&'static str),
    #[error("this kernel's types have no {0}")]
    Missing(&'static str),
}

const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;

struct Btf<'a> {
    strings: &'a [u8],
    /// Byte range of each type, by id (0 is void).
    types: Vec<&'a [u8]>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        // struct btf_header { u16 magic; u8 version, flags; u32 hdr_len, type_off, type_len, str_off, str_len; }
        if bytes.get(..2)? != 0xeb9fu16.to_ne_bytes() {
            return None;
        }
        let header = u32_at(bytes, 4)? as usize;
        let section = |off: usize, len: usize| -> Option<&'a [u8]> {
            let start = header.checked_add(u32_at(bytes, off)? as usize)?;
            bytes.get(start..start.checked_add(u32_at(bytes, len)? as usize)?)
        };
        let all = section(8, 12)?;
        let strings = section(16, 20)?;
        let mut types = vec![&all[..0]];
        let mut at = 0;
        while at < all.len() {
            let info = u32_at(all, at + 4)?;
            let (kind, members) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
            let extra = match kind {
                1 | 14 | 17 => 4,                                   // INT, VAR, DECL_TAG
                KIND_ARRAY => 12,                                   //
                KIND_STRUCT | KIND_UNION | 15 | 19 => members * 12, // DATASEC, ENUM64
                6 | 13 => members * 8,                              // ENUM, FUNC_PROTO
                2 | 7..=12 | 16 | 18 => 0,                          // PTR, FWD … FUNC, FLOAT, TYPE_TAG
                _ => return None,
            };
            let end = at + 12 + extra;
            types.push(all.get(at..end)?);
            at = end;
        }
        Some(Self { strings, types })
    }

    fn name(&self, offset: u32) -> &[u8] {
        let tail = self.strings.get(offset as usize..).unwrap_or_default();
        &tail[..tail.iter().position(|b| *b == 0).unwrap_or(tail.len())]
    }

    fn kind(&self, id: u32) -> Option<u32> {
        Some((u32_at(self.types.get(id as usize)?, 4)? >> 24) & 0x1f)
    }

    fn structure(&self, name: &str) -> Option<u32> {
        (1..self.types.len() as u32).find(|id| {
            let t = self.types[*id as usize];
            self.kind(*id) == Some(KIND_STRUCT)
                && u32_at(t, 0).is_some_and(|n| self.name(n) == name.as_bytes())
        })
    }

    /// Bit offset and type of a member, looking into anonymous members too.
    fn member(&self, id: u32, name: &str) -> Option<(u32, u32)> {
        let t = self.types.get(id as usize)?;
        let info = u32_at(t, 4)?;
        for i in 0..(info & 0xffff) as usize {
            let at = 12 + i * 12;
            let (n, member_type, mut bits) = (u32_at(t, at)?, u32_at(t, at + 4)?, u32_at(t, at + 8)?);
            if info >> 31 == 1 {
                bits &= 0x00ff_ffff; // the rest is the width of a bit field
            }
            if self.name(n) == name.as_bytes() {
                return Some((bits, member_type));
            }
            if n == 0
                && matches!(self.kind(member_type), Some(KIND_STRUCT | KIND_UNION))
                && let Some((inner, found)) = self.member(member_type, name)
            {
                return Some((bits + inner, found));
            }
        }
        None
    }

    /// Byte offset of a path of members below a structure.
    fn offset(&self, structure: &str, path: &[&str]) -> Option<u32> {
        let mut id = self.structure(structure)?;
        let mut bits = 0;
        for name in path {
            // Modifiers (typedef, const, volatile …) stand between a member and its structure.
            while matches!(self.kind(id), Some(8..=11 | 18)) {
                id = u32_at(self.types.get(id as usize)?, 8)?;
            }
            let (at, next) = self.member(id, name)?;
            bits += at;
            id = next;
        }
        Some(bits / 8)
    }
}

/// The offsets the kernel side needs, for the running kernel.
pub fn kernel_offsets() -> Result<KernelOffsets, BtfError> {
    resolve(&std::fs::read(VMLINUX)?)
}

fn resolve(bytes: &[u8]) -> Result<KernelOffsets, BtfError> {
    let btf = Btf::parse(bytes).ok_or(BtfError::Malformed("not the layout of Documentation/bpf/btf.rst"))?;
    let get = |structure, path: &[&str], what| btf.offset(structure, path).ok_or(BtfError::Missing(what));
    Ok(KernelOffsets {
        valid: 1,
        task_tgid: get("task_struct", &["tgid"], "task_struct.tgid")?,
        task_stack: get("task_struct", &["stack"], "task_struct.stack")?,
        task_signal: get("task_struct", &["signal"], "task_struct.signal")?,
        task_fsbase: get("task_struct", &["thread", "fsbase"], "task_struct.thread.fsbase")?,
        signal_live: get("signal_struct", &["live"], "signal_struct.live")?,
        task_nvcsw: get("task_struct", &["nvcsw"], "task_struct.nvcsw")?,
        task_files: get("task_struct", &["files"], "task_struct.files")?,
        files_fdt: get("files_struct", &["fdt"], "files_struct.fdt")?,
        fdtable_max_fds: get("fdtable", &["max_fds"], "fdtable.max_fds")?,
        fdtable_fd: get("fdtable", &["fd"], "fdtable.fd")?,
        file_inode: get("file", &["f_inode"], "file.f_inode")?,
        file_epoll: btf.offset("file", &["f_ep"]).unwrap_or(0),
        file_flags: get("file", &["f_flags"], "file.f_flags")?,
        reserved: 0,
        file_epoll_list: btf.offset("file", &["f_ep_links"]).unwrap_or(0),
        inode_number: get("inode", &["i_ino"], "inode.i_ino")?,
        inode_mode: get("inode", &["i_mode"], "inode.i_mode")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_an_error() {
        assert!(matches!(resolve(b""), Err(BtfError::Malformed(_))));
        assert!(matches!(resolve(&[0x9f, 0xeb, 1, 0, 0xff, 0xff, 0xff, 0xff]), Err(BtfError::Malformed(_))));
    }

    /// Hand-made types: `struct task_struct { int pid @4; struct { int tgid @0; } anonymous @8; }`.
    #[test]
    fn members_are_found_inside_anonymous_ones() {
        let strings = b"\0task_struct\0pid\0tgid\0int\0";
        let mut types = Vec::new();
        let mut put = |words: &[u32]| words.iter().for_each(|w| types.extend(w.to_ne_bytes()));
        put(&[22, 1 << 24, 4, 32]); // 1: int
        put(&[0, (KIND_STRUCT << 24) | 1, 4, 17, 1, 0]); // 2: anonymous { tgid }
        put(&[1, (KIND_STRUCT << 24) | 2, 16, 13, 1, 32, 0, 2, 64]); // 3
        let mut all = Vec::new();
        all.extend(0xeb9fu16.to_ne_bytes());
        all.extend([1, 0]);
        for w in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            all.extend(w.to_ne_bytes());
        }
        all.extend(&types);
        all.extend(strings);
        let btf = Btf::parse(&all).unwrap();
        assert_eq!(btf.offset("task_struct", &["pid"]), Some(4));
        assert_eq!(btf.offset("task_struct", &["tgid"]), Some(8));
        assert_eq!(btf.offset("task_struct", &["nothing"]), None);
    }
}
