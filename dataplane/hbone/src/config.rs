//! What one side of an HBONE connection announces and tolerates.

use thiserror::Error;

/// Which side of the connection we are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Opens streams with CONNECT.
    Client,
    /// Accepts streams.
    Server,
}

/// Limits and windows of a connection. Build with [`Config::client`] or [`Config::server`] and
/// change single fields; values outside the documented range are clamped into it by
/// [`crate::Connection::new`] and reported by [`Config::validate`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// SETTINGS_INITIAL_WINDOW_SIZE, in bytes: what a peer may send on one stream before we
    /// release any of it. 1..=2^31-1.
    pub stream_window: u32,
    /// Window of the whole connection, in bytes. 65535..=2^31-1 (it can only be raised).
    pub connection_window: u32,
    /// SETTINGS_MAX_FRAME_SIZE, in bytes: largest frame payload accepted. 16384..=2^24-1.
    pub max_frame_size: u32,
    /// SETTINGS_MAX_HEADER_LIST_SIZE, in bytes: RFC 9113 6.5.2 size (name + value + 32 per field)
    /// of the largest header list accepted, and of the encoded block. 256..=2^24.
    pub max_header_list_size: u32,
    /// SETTINGS_HEADER_TABLE_SIZE, in bytes: HPACK dynamic table the peer may use. 0..=65536.
    pub header_table_size: u32,
    /// Server: streams a peer may have open, advertised. Client: streams we open at most,
    /// lowered by what the peer advertises. 1..=2^31-1.
    pub max_concurrent_streams: u32,
    /// Units of work without progress accepted before ENHANCE_YOUR_CALM. A PING, an empty DATA
    /// frame, a WINDOW_UPDATE, a PRIORITY or an unknown frame costs 1, SETTINGS 16, and 32 streams
    /// that are told of a larger window 1. Progress gives
    /// units back, calls do not: a DATA frame with payload in either direction 2 and 1 more for
    /// each 512 bytes, and a second that has passed
    /// ([`pass_time`](crate::Connection::pass_time)) 32.
    ///
    /// Half as many streams may come to nothing: reset before they were answered, refused, or
    /// reset by us for what the peer did on them. One that is answered 2xx makes up for one, and a
    /// second for 32. Above that the connection takes no more streams (GOAWAY with
    /// ENHANCE_YOUR_CALM); those it has go on. At least 64.
    pub flood_budget: u32,
    /// Automatic replies (PING and SETTINGS acknowledgements, RST_STREAM) that may wait in the
    /// output. A peer that sends but does not read is stopped here. At least 16.
    pub queued_replies_max: u32,
}

/// A value of [`Config`] outside its range.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("hbone config: {field} is {value}, must be within {min}..={max}")]
pub struct ConfigError {
    /// Name of the field.
    pub field: &'static str,
    /// The value found.
    pub value: u32,
    /// Lowest accepted value.
    pub min: u32,
    /// Highest accepted value.
    pub max: u32,
}

impl Config {
    /// What ztunnel announces as a client.
    pub fn client() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            max_frame_size: 1 << 20,
            max_header_list_size: 16 << 10,
            header_table_size: 4096,
            max_concurrent_streams: 100,
            flood_budget: 1024,
            queued_replies_max: 1024,
        }
    }

    /// What ztunnel announces as a server.
    pub fn server() -> Self {
        Self {
            max_header_list_size: 64 << 10,
            max_concurrent_streams: 200,
            ..Self::client()
        }
    }

    /// Checks every field against its documented range.
    ///
    /// # Errors
    /// The first field out of range, with the range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let clamped = self.clamped();
        for (found, kept, (field, min, max)) in self
            .values()
            .into_iter()
            .zip(clamped.values())
            .zip(RANGES)
            .map(|((a, b), r)| (a, b, r))
        {
            if found != kept {
                return Err(ConfigError {
                    field,
                    value: found,
                    min,
                    max,
                });
            }
        }
        Ok(())
    }

    pub(crate) fn clamped(&self) -> Self {
        let mut values = self.values();
        for (value, (_, min, max)) in values.iter_mut().zip(RANGES) {
            *value = (*value).clamp(min, max);
        }
        let [
            stream_window,
            connection_window,
            max_frame_size,
            max_header_list_size,
            header_table_size,
            max_concurrent_streams,
            flood_budget,
            queued_replies_max,
        ] = values;
        Self {
            stream_window,
            connection_window,
            max_frame_size,
            max_header_list_size,
            header_table_size,
            max_concurrent_streams,
            flood_budget,
            queued_replies_max,
        }
    }

    fn values(&self) -> [u32; 8] {
        [
            self.stream_window,
            self.connection_window,
            self.max_frame_size,
            self.max_header_list_size,
            self.header_table_size,
            self.max_concurrent_streams,
            self.flood_budget,
            self.queued_replies_max,
        ]
    }
}

const WINDOW_MAX: u32 = i32::MAX as u32;

/// Name, lowest and highest value of each field, in the order of `Config::values`.
const RANGES: [(&str, u32, u32); 8] = [
    ("stream_window", 1, WINDOW_MAX),
    ("connection_window", 65_535, WINDOW_MAX),
    ("max_frame_size", 16_384, (1 << 24) - 1),
    ("max_header_list_size", 256, 1 << 24),
    ("header_table_size", 0, 65_536),
    ("max_concurrent_streams", 1, WINDOW_MAX),
    ("flood_budget", 64, u32::MAX),
    ("queued_replies_max", 16, u32::MAX),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_a_bad_value_is_named() {
        assert_eq!(Config::client().validate(), Ok(()));
        assert_eq!(Config::server().validate(), Ok(()));
        let bad = Config {
            max_frame_size: 100,
            ..Config::client()
        };
        let error = bad.validate().unwrap_err();
        assert_eq!(
            (error.field, error.value, error.min),
            ("max_frame_size", 100, 16_384)
        );
        assert_eq!(bad.clamped().max_frame_size, 16_384);
    }
}
