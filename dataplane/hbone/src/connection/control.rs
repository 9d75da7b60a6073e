//! What the frames other than DATA and HEADERS do to the connection.

use std::collections::VecDeque;

use crate::config::Role;
use crate::error::{ConnectionError, ErrorCode};
use crate::event::{Event, StreamId};
use crate::frame::{self, FrameHeader, MAX_31, flag, setting};

use super::receive::protocol;
use super::send::SHUTDOWN_PING;
use super::{Connection, DEFAULT_WINDOW, Shutdown};

type Events = VecDeque<Event>;
type Outcome = Result<(), ConnectionError>;

impl Connection {
    pub(super) fn on_settings(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        events: &mut Events,
    ) -> Outcome {
        if self.peer_settings_received {
            self.charge(SETTINGS_COST, "SETTINGS")?;
        }
        self.peer_settings_received = true;
        let (entries, _) = payload.as_chunks::<6>();
        let mut window = None;
        for &[i0, i1, v0, v1, v2, v3] in entries {
            let value = u32::from_be_bytes([v0, v1, v2, v3]);
            match u16::from_be_bytes([i0, i1]) {
                setting::INITIAL_WINDOW_SIZE if value > MAX_31 => return Err(window_overflow(0)),
                setting::INITIAL_WINDOW_SIZE => window = Some(value),
                id => self.apply_setting(header, id, value)?,
            }
        }
        // Once for all of a frame: each time walks every stream.
        if let Some(value) = window {
            self.apply_initial_window(value)?;
        }
        frame::write_settings_ack(self.output.buffer());
        self.count_reply()?;
        events.push_back(Event::Settings);
        Ok(())
    }

    fn apply_setting(&mut self, header: FrameHeader, id: u16, value: u32) -> Outcome {
        match id {
            setting::HEADER_TABLE_SIZE => self.table_update_due = true,
            setting::ENABLE_PUSH if value > 1 || value == 1 && self.role == Role::Client => {
                return Err(protocol(
                    header,
                    "SETTINGS_ENABLE_PUSH has a forbidden value",
                ));
            }
            setting::MAX_CONCURRENT_STREAMS => self.peer.max_concurrent_streams = value,
            setting::MAX_FRAME_SIZE if !(16_384..1 << 24).contains(&value) => {
                return Err(protocol(
                    header,
                    "SETTINGS_MAX_FRAME_SIZE not within 2^14..2^24",
                ));
            }
            setting::MAX_FRAME_SIZE => self.peer.max_frame_size = value,
            setting::MAX_HEADER_LIST_SIZE => self.peer.max_header_list_size = value,
            _ => {}
        }
        Ok(())
    }

    /// Moves the windows of all open streams by the difference (RFC 9113 6.9.2).
    fn apply_initial_window(&mut self, value: u32) -> Outcome {
        let delta = i64::from(value) - i64::from(self.peer.initial_window);
        if delta == 0 {
            return Ok(());
        }
        self.peer.initial_window = value;
        #[cfg(test)]
        self.window_walks.set(self.window_walks.get() + 1);
        for stream in self.streams.iter_mut() {
            let id = stream.id;
            self.unblocked |= stream.send.adjust(delta).map_err(|_| window_overflow(id))?;
        }
        Ok(())
    }

    pub(super) fn on_settings_ack(&mut self) -> Outcome {
        if self.settings_acknowledged {
            return self.charge(1, "SETTINGS acknowledgements");
        }
        self.settings_acknowledged = true;
        self.decoder.acknowledged(self.config.header_table_size);
        if let Some(less) = DEFAULT_WINDOW.checked_sub(self.config.stream_window) {
            self.streams
                .iter_mut()
                .for_each(|stream| stream.recv.shrink(less));
        }
        Ok(())
    }

    pub(super) fn on_window_update(
        &mut self,
        header: FrameHeader,
        increment: u32,
        events: &mut Events,
    ) -> Outcome {
        self.charge(1, "WINDOW_UPDATE frames")?;
        let overflow = "WINDOW_UPDATE takes the window above 2^31-1";
        let id = header.stream;
        if id == 0 {
            if increment == 0 {
                return Err(protocol(header, "the increment is 0"));
            }
            match self.send.adjust(i64::from(increment)) {
                Ok(unblocked) => self.unblocked |= unblocked,
                Err(_) => {
                    return Err(ConnectionError::FlowControl {
                        stream: 0,
                        reason: overflow,
                    });
                }
            }
            return Ok(());
        }
        let Some(at) = self.streams.find(id) else {
            // After the end of a stream these are in flight legitimately.
            return match self.is_idle(id) {
                true => Err(protocol(header, "the stream was never opened")),
                false => Ok(()),
            };
        };
        if increment == 0 {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        }
        let role = self.role;
        let stream = self.streams.at(at);
        let Ok(unblocked) = stream.send.adjust(i64::from(increment)) else {
            return self.stream_error(id, ErrorCode::FLOW_CONTROL_ERROR, events);
        };
        let may_send = !stream.local_ended && (role == Role::Client || stream.answered);
        if unblocked && may_send && self.send.available() > 0 {
            events.push_back(Event::Writable { id: StreamId(id) });
        }
        Ok(())
    }

    pub(super) fn on_reset(
        &mut self,
        header: FrameHeader,
        code: ErrorCode,
        events: &mut Events,
    ) -> Outcome {
        let id = header.stream;
        match self.streams.remove(id) {
            Some(stream) => {
                if self.role == Role::Server && !stream.answered {
                    self.fruitless("streams reset before the response")?;
                }
                self.ended.add(id);
                events.push_back(Event::Reset {
                    id: StreamId(id),
                    code,
                });
                Ok(())
            }
            None if self.is_idle(id) => Err(protocol(header, "the stream was never opened")),
            None => self.charge(1, "resets of closed streams"),
        }
    }

    pub(super) fn on_ping(
        &mut self,
        header: FrameHeader,
        payload: [u8; 8],
        events: &mut Events,
    ) -> Outcome {
        self.charge(1, "PING frames")?;
        if !header.has(flag::ACK) {
            frame::write_ping(self.output.buffer(), true, payload);
            return self.count_reply();
        }
        if self.shutdown == Shutdown::Announced && payload == SHUTDOWN_PING {
            self.finish_shutdown();
        } else {
            events.push_back(Event::Pong(payload));
        }
        Ok(())
    }

    pub(super) fn on_go_away(
        &mut self,
        last: u32,
        code: ErrorCode,
        events: &mut Events,
    ) -> Outcome {
        self.charge(1, "GOAWAY frames")?;
        // A later GOAWAY may only lower the last stream; one that raises it changes nothing.
        let before = self.peer_go_away;
        let last = before.map_or(last, |before| before.min(last));
        self.peer_go_away = Some(last);
        events.push_back(Event::GoAway {
            last: StreamId(last),
            code,
        });
        if self.role == Role::Client && before != Some(last) {
            let refused: Vec<u32> = self
                .streams
                .iter()
                .map(|stream| stream.id)
                .filter(|&id| id > last)
                .collect();
            for id in refused {
                self.streams.remove(id);
                self.reset.add(id);
                let code = ErrorCode::REFUSED_STREAM;
                events.push_back(Event::Reset {
                    id: StreamId(id),
                    code,
                });
            }
        }
        Ok(())
    }

    /// The peer broke a rule on one stream: resets it and tells the caller, if it knows the stream.
    pub(super) fn stream_error(
        &mut self,
        id: u32,
        code: ErrorCode,
        events: &mut Events,
    ) -> Outcome {
        self.stream_errors += 1;
        self.fruitless("stream errors")?;
        if self.streams.get(id).is_some() {
            events.push_back(Event::Reset {
                id: StreamId(id),
                code,
            });
        }
        self.queue_reset(id, code);
        self.count_reply()
    }
}

/// What a SETTINGS frame after the first costs of the flood budget.
const SETTINGS_COST: u32 = 16;

fn window_overflow(stream: u32) -> ConnectionError {
    ConnectionError::FlowControl {
        stream,
        reason: "SETTINGS_INITIAL_WINDOW_SIZE takes a window above 2^31-1",
    }
}
