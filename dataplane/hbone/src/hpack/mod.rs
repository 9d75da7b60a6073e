//! Header compression (RFC 7541): a complete, bounded decoder and a stateless encoder.

mod decode;
mod encode;
mod huffman;
mod table;

pub(crate) use decode::Decoder;
pub(crate) use encode::{literal, status, table_size_update};

use thiserror::Error;

/// Why a header block cannot be decoded. The compression state is lost with it.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum HpackError {
    /// The block ends inside a field.
    #[error("HPACK block ends inside a field (truncated or corrupt)")]
    Truncated,
    /// An integer does not fit 28 bits.
    #[error("HPACK integer exceeds 2^28-1 (corrupt or hostile)")]
    IntegerOverflow,
    /// An index names no table entry.
    #[error("HPACK index {index} is 0 or beyond the last entry {last}")]
    Index {
        /// The index found.
        index: u32,
        /// Highest valid index now.
        last: u32,
    },
    /// A string is not valid Huffman code: EOS inside, or wrong padding.
    #[error("HPACK string has invalid Huffman code or padding")]
    Huffman,
    /// A dynamic table size update is above our setting, missing, or not at the start of a block.
    #[error("HPACK table size update to {size} is misplaced, missing or above {max}")]
    TableSize {
        /// Size asked for (or in force, if an update was required).
        size: u32,
        /// SETTINGS_HEADER_TABLE_SIZE in force.
        max: u32,
    },
}
