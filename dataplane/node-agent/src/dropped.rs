//! Telling dropped packets in the log: who, what, why; a flood of them in few lines.

use std::collections::HashMap;
use std::fmt::Write as _;

use redirect::{Dropped, Redirection};

/// Most packets looked at each time; the rest is in the counters of `status`.
const PACKETS_MAX: usize = 2000;
/// Most lines each time.
const LINES_MAX: usize = 5;

/// Writes drops to the log, a few lines each time it is called.
#[derive(Debug, Default)]
pub(crate) struct DroppedLog {
    /// So that a failure that lasts is logged once.
    failed: bool,
}

impl DroppedLog {
    pub(crate) fn log(&mut self, redirection: &mut dyn Redirection) {
        match redirection.take_dropped(PACKETS_MAX) {
            Ok(dropped) => {
                self.failed = false;
                for line in summary(&dropped) {
                    tracing::warn!("dropped: {line}");
                }
            }
            Err(error) if !self.failed => {
                self.failed = true;
                tracing::warn!(%error, "drops cannot be told");
            }
            Err(_) => {}
        }
    }
}

/// The most frequent kinds, each with an example; kinds differ in who, to whom and why.
fn summary(dropped: &[Dropped]) -> Vec<String> {
    let mut kinds = HashMap::<_, (usize, usize)>::new();
    for (index, packet) in dropped.iter().enumerate() {
        let Dropped {
            program, reason, ..
        } = packet;
        let key = (program, reason, packet.source.ip(), packet.destination.ip());
        kinds.entry(key).or_insert((index, 0)).1 += 1;
    }
    let mut kinds: Vec<_> = kinds.into_values().collect();
    kinds.sort_by_key(|&(first, count)| (std::cmp::Reverse(count), first));
    let others: usize = kinds.iter().skip(LINES_MAX).map(|&(_, count)| count).sum();
    let mut lines: Vec<_> = kinds
        .iter()
        .take(LINES_MAX)
        .map(|&(first, count)| {
            let mut line = dropped[first].to_string();
            if count > 1 {
                let _ = write!(line, " ({count} like this)");
            }
            line
        })
        .collect();
    if others > 0 {
        lines.push(format!("{others} others"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(last: u8, port: u16) -> Dropped {
        Dropped {
            program: "app_outbound",
            reason: "spoofed",
            protocol: 6,
            source: ([10, 0, 0, last], port).into(),
            destination: ([10, 0, 1, 1], 80).into(),
            interface: "va1".into(),
        }
    }

    #[test]
    fn a_flood_is_a_few_lines() {
        let mut packets: Vec<_> = (0..200).map(|port| packet(1, port)).collect();
        packets.extend((2..20).map(|last| packet(last, 1)));
        let lines = summary(&packets);
        assert_eq!(lines.len(), LINES_MAX + 1);
        assert_eq!(
            lines[0],
            "app_outbound spoofed: protocol 6 10.0.0.1:0 -> 10.0.1.1:80 on va1 (200 like this)"
        );
        assert_eq!(lines[LINES_MAX], "14 others");
        assert!(summary(&[]).is_empty());
    }
}
