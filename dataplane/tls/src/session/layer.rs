//! What a session asks of whoever seals and opens its records.

use std::ops::Range;

use super::error::{OpenError, SealError};

/// What a record held.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Opened {
    /// Application data: this range of the record, possibly empty.
    Data(Range<usize>),
    /// Nothing for the application. There may be control output now.
    Handled,
    /// The peer sends nothing any more (close_notify). Further records are ignored.
    Closed,
}

/// What is left of one direction of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Direction {
    Open,
    Closed,
    Failed,
}

/// The records of one connection, both directions. The contract of each function is that of the
/// function of the same name of [`Session`](crate::Session).
pub(crate) trait RecordLayer {
    fn seal(&mut self, record: &mut [u8]) -> Result<(), SealError>;
    /// Opens a record; the peer's direction is known to be open.
    fn try_open(&mut self, record: &mut [u8]) -> Result<Opened, OpenError>;
    /// What is left of the peer's direction.
    fn reading(&self) -> Direction;
    fn fail(&mut self, error: &OpenError);
    fn has_control_output(&self) -> bool;
    fn take_control_output(&mut self, output: &mut Vec<u8>);
    fn close_notify(&mut self, output: &mut Vec<u8>);
    fn update_keys(&mut self, ask_peer: bool);
    fn set_key_update_after(&mut self, records: u64);

    #[inline]
    fn open(&mut self, record: &mut [u8]) -> Result<Opened, OpenError> {
        match self.reading() {
            Direction::Open => {}
            Direction::Closed => return Ok(Opened::Closed),
            Direction::Failed => return Err(OpenError::Failed),
        }
        let opened = self.try_open(record);
        match &opened {
            Ok(_) | Err(OpenError::Incomplete { .. }) => {}
            Err(error) => self.fail(error),
        }
        opened
    }

    fn received_close_notify(&self) -> bool {
        self.reading() == Direction::Closed
    }
}
