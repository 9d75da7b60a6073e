//! Decoder of header blocks (RFC 7541 section 6). Memory: the dynamic table, bounded by our
//! setting, and two scratch buffers, bounded by the block the caller accepts.

use super::table::{DynamicTable, Entry, Field};
use super::{HpackError, huffman};

/// Decoding state of one connection.
#[derive(Debug)]
pub(crate) struct Decoder {
    table: DynamicTable,
    /// Highest size the peer may choose.
    limit: usize,
    scratch: Scratch,
}

impl Decoder {
    /// `setting` is the SETTINGS_HEADER_TABLE_SIZE we announce; until the peer acknowledges it, it
    /// may use the default.
    pub(crate) fn new(setting: u32) -> Self {
        Self {
            table: DynamicTable::new(DEFAULT_TABLE_SIZE),
            limit: DEFAULT_TABLE_SIZE.max(setting as usize),
            scratch: Scratch::default(),
        }
    }

    /// The peer acknowledged our setting. If its table is larger, its next block has to begin with
    /// a size update (RFC 7541 4.2).
    pub(crate) fn acknowledged(&mut self, setting: u32) {
        self.limit = setting as usize;
    }

    /// Decodes a complete block and hands each field, in order, to `sink`.
    pub(crate) fn decode(
        &mut self,
        block: &[u8],
        sink: &mut impl FnMut(&[u8], &[u8]),
    ) -> Result<(), HpackError> {
        let mut reader = Reader { rest: block };
        self.size_updates(&mut reader)?;
        while let Some(&first) = reader.rest.first() {
            match first {
                0x80.. => {
                    let (name, value) = entry(&self.table, reader.integer(7)?)?;
                    sink(name, value);
                }
                0x40.. => {
                    let (name, value) = reader.literal(6, &self.table, &mut self.scratch)?;
                    sink(name, value);
                    let entry = Entry::new(name, value);
                    self.table.insert(entry);
                }
                0x20.. => {
                    let size = reader.integer(5)?;
                    return Err(HpackError::TableSize {
                        size,
                        max: self.limit as u32,
                    });
                }
                _ => {
                    let (name, value) = reader.literal(4, &self.table, &mut self.scratch)?;
                    sink(name, value);
                }
            }
        }
        self.scratch.trim();
        Ok(())
    }

    /// Size updates are allowed at the start of a block only (RFC 7541 4.2).
    fn size_updates(&mut self, reader: &mut Reader<'_>) -> Result<(), HpackError> {
        let max = self.limit as u32;
        while let Some(&first) = reader.rest.first()
            && first & 0xe0 == 0x20
        {
            let size = reader.integer(5)?;
            if size > max {
                return Err(HpackError::TableSize { size, max });
            }
            self.table.set_max(size as usize);
        }
        if self.table.max() > self.limit {
            return Err(HpackError::TableSize {
                size: self.table.max() as u32,
                max,
            });
        }
        Ok(())
    }

    #[cfg(test)]
    fn table_size(&self) -> usize {
        self.table.size()
    }
}

/// Buffers for strings in Huffman code, reused by all blocks.
#[derive(Debug, Default)]
struct Scratch {
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Scratch {
    fn trim(&mut self) {
        for buffer in [&mut self.name, &mut self.value] {
            if buffer.capacity() > SCRATCH_KEPT {
                *buffer = Vec::new();
            }
        }
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Result<u8, HpackError> {
        let (&first, rest) = self.rest.split_first().ok_or(HpackError::Truncated)?;
        self.rest = rest;
        Ok(first)
    }

    /// Integer with a prefix of `bits` bits (RFC 7541 5.1), bounded.
    fn integer(&mut self, bits: u32) -> Result<u32, HpackError> {
        let prefix = (1u32 << bits) - 1;
        let mut value = u32::from(self.byte()?) & prefix;
        if value < prefix {
            return Ok(value);
        }
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += u32::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return if value <= INTEGER_MAX {
                    Ok(value)
                } else {
                    Err(HpackError::IntegerOverflow)
                };
            }
        }
        Err(HpackError::IntegerOverflow)
    }

    /// Literal field: name by index of `bits` bits or as a string, then the value.
    fn literal<'s>(
        &mut self,
        bits: u32,
        table: &'s DynamicTable,
        scratch: &'s mut Scratch,
    ) -> Result<Field<'s>, HpackError>
    where
        'a: 's,
    {
        let name = match self.integer(bits)? {
            0 => self.string(&mut scratch.name)?,
            index => entry(table, index)?.0,
        };
        Ok((name, self.string(&mut scratch.value)?))
    }

    fn string<'s>(&mut self, scratch: &'s mut Vec<u8>) -> Result<&'s [u8], HpackError>
    where
        'a: 's,
    {
        let huffman_coded = self.rest.first().is_some_and(|first| first & 0x80 != 0);
        let length = self.integer(7)? as usize;
        if length > self.rest.len() {
            return Err(HpackError::Truncated);
        }
        let (text, rest) = self.rest.split_at(length);
        self.rest = rest;
        if !huffman_coded {
            return Ok(text);
        }
        scratch.clear();
        huffman::decode(text, scratch)?;
        Ok(scratch)
    }
}

fn entry(table: &DynamicTable, index: u32) -> Result<Field<'_>, HpackError> {
    let unknown = HpackError::Index {
        index,
        last: table.last() as u32,
    };
    table.get(index as usize).ok_or(unknown)
}

/// Size of the table before our SETTINGS are acknowledged (RFC 9113 6.5.2).
const DEFAULT_TABLE_SIZE: usize = 4096;
/// Scratch larger than this is given back after a block.
const SCRATCH_KEPT: usize = 4096;
const INTEGER_MAX: u32 = (1 << 28) - 1;

#[cfg(test)]
mod tests;
