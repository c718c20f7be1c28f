//! Unwind tables into the kernel's memory.
//!
//! In: rules, blocks, mappings, with their numbers. Out: entries of the kernel side's maps. Blocks live in chunks of a
//! megabyte, each a map of its own that is made when its first block is written and then stays.

use std::io;
use std::os::fd::AsFd;

use aya::maps::{ArrayOfMaps, Map, MapData, MapError};
use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY;
use profiler_common::unwind::{Block, CHUNK_BLOCKS, CHUNKS_MAX, Mapping, Rule, Space};

use super::{BlockValue, HashOf, LoadError, MappingValue, RuleValue, SpaceValue, batch};
use crate::unwind::Sink;

/// The maps that hold unwind tables.
pub struct UnwindMaps {
    chunks: ArrayOfMaps<MapData>,
    rules: MapData,
    mappings: MapData,
    spaces: HashOf<u32, SpaceValue>,
    /// By number, as far as they were made.
    made: Vec<Option<MapData>>,
}

impl UnwindMaps {
    pub(super) fn new(
        chunks: Map,
        rules: Map,
        mappings: Map,
        spaces: HashOf<u32, SpaceValue>,
    ) -> Result<Self, LoadError> {
        let wrong = |name| move |error: MapError| LoadError::Map { name, reason: error.to_string() };
        let array = |map, name| match map {
            Map::Array(data) => Ok(data),
            _ => Err(LoadError::Map { name, reason: "is not an array".into() }),
        };
        Ok(Self {
            chunks: ArrayOfMaps::try_from(chunks).map_err(wrong("UNWIND_CHUNKS"))?,
            rules: array(rules, "UNWIND_RULES")?,
            mappings: array(mappings, "MAPPINGS")?,
            spaces,
            made: (0..CHUNKS_MAX).map(|_| None).collect(),
        })
    }

    fn chunk(&mut self, number: u32) -> io::Result<&MapData> {
        let slot = self.made.get_mut(number as usize).ok_or(io::ErrorKind::InvalidInput)?;
        if slot.is_none() {
            // As the kernel side declares it: the kernel takes no other.
            let like = aya_obj::Map::new_from_params(
                BPF_MAP_TYPE_ARRAY as u32,
                size_of::<u32>() as u32,
                size_of::<Block>() as u32,
                CHUNK_BLOCKS,
                0,
            );
            let chunk = MapData::create(like, "unwind_chunk", None).map_err(io::Error::other)?;
            self.chunks.set(number, &chunk, 0).map_err(io::Error::other)?;
            *slot = Some(chunk);
        }
        slot.as_ref().ok_or(io::ErrorKind::NotFound.into())
    }
}

impl Sink for UnwindMaps {
    fn rules(&mut self, rules: &[(u16, Rule)]) -> io::Result<()> {
        let keys: Vec<u32> = rules.iter().map(|(number, _)| u32::from(*number)).collect();
        let values: Vec<RuleValue> = rules.iter().map(|(_, rule)| RuleValue(*rule)).collect();
        batch::update(self.rules.fd().as_fd(), &keys, &values)
    }

    fn blocks(&mut self, numbers: &[u32], blocks: &[Block]) -> io::Result<()> {
        let mut from = 0;
        while from < numbers.len() {
            let number = numbers[from] / CHUNK_BLOCKS;
            let count = numbers[from..].partition_point(|block| block / CHUNK_BLOCKS == number);
            let keys: Vec<u32> =
                numbers[from..from + count].iter().map(|block| block % CHUNK_BLOCKS).collect();
            let values: Vec<BlockValue> =
                blocks[from..from + count].iter().copied().map(BlockValue).collect();
            batch::update(self.chunk(number)?.fd().as_fd(), &keys, &values)?;
            from += count;
        }
        Ok(())
    }

    fn mappings(&mut self, first: u32, mappings: &[Mapping]) -> io::Result<()> {
        let keys: Vec<u32> = (first..first + mappings.len() as u32).collect();
        let values: Vec<MappingValue> = mappings.iter().copied().map(MappingValue).collect();
        batch::update(self.mappings.fd().as_fd(), &keys, &values)
    }

    fn space(&mut self, pid: u32, space: Space) -> io::Result<()> {
        self.spaces.insert(pid, SpaceValue(space), 0).map_err(io::Error::other)
    }

    fn forget(&mut self, pid: u32) {
        // The kernel side removes it too; an entry that is gone already is no error.
        let _: Result<(), MapError> = self.spaces.remove(&pid);
    }
}
