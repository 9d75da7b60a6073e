//! The open streams: a hash table for keys that only grow, and what is remembered of closed ones.

use super::flow::{RecvWindow, SendWindow};

/// State of one open stream. A stream leaves the table when both directions have ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    /// 0 marks a free slot.
    pub(super) id: u32,
    pub(super) send: SendWindow,
    pub(super) recv: RecvWindow,
    /// We have sent END_STREAM.
    pub(super) local_ended: bool,
    /// The peer has sent END_STREAM.
    pub(super) remote_ended: bool,
    /// The final response has been sent (server) or received (client).
    pub(super) answered: bool,
    /// Only DATA may follow: the request is a CONNECT (server), or it was answered 2xx (client).
    pub(super) tunnel: bool,
}

/// Open streams by identifier. Open addressing with linear probing: identifiers are consecutive
/// odd numbers, so half of the identifier is a perfect hash while few streams are long-lived.
#[derive(Debug)]
pub(super) struct Streams {
    /// Power of two, at most half full.
    slots: Vec<Stream>,
    len: usize,
}

impl Streams {
    pub(super) fn new() -> Self {
        Self {
            slots: vec![FREE; INITIAL_SLOTS],
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(super) fn find(&self, id: u32) -> Option<usize> {
        if id == 0 {
            return None;
        }
        let mut at = self.home(id);
        loop {
            match self.slots[at].id {
                found if found == id => return Some(at),
                0 => return None,
                _ => at = (at + 1) & (self.slots.len() - 1),
            }
        }
    }

    #[inline]
    pub(super) fn get(&self, id: u32) -> Option<&Stream> {
        self.find(id).map(|at| &self.slots[at])
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Stream> {
        self.find(id).map(|at| &mut self.slots[at])
    }

    /// The stream at an index that `find` has just returned.
    pub(super) fn at(&mut self, index: usize) -> &mut Stream {
        &mut self.slots[index]
    }

    /// Adds a stream that is not in the table.
    pub(super) fn insert(&mut self, stream: Stream) {
        debug_assert!(stream.id != 0 && self.find(stream.id).is_none());
        if (self.len + 1) * 2 > self.slots.len() {
            self.grow();
        }
        self.place(stream);
        self.len += 1;
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<Stream> {
        let mask = self.slots.len() - 1;
        let mut hole = self.find(id)?;
        let removed = std::mem::replace(&mut self.slots[hole], FREE);
        self.len -= 1;
        // Close the gap: whoever probed across it has to move back.
        let mut at = (hole + 1) & mask;
        while self.slots[at].id != 0 {
            let home = self.home(self.slots[at].id);
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                self.slots[hole] = std::mem::replace(&mut self.slots[at], FREE);
                hole = at;
            }
            at = (at + 1) & mask;
        }
        Some(removed)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Stream> {
        self.slots.iter().filter(|stream| stream.id != 0)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Stream> {
        self.slots.iter_mut().filter(|stream| stream.id != 0)
    }

    /// All streams, beginning at a different one for each `turn`.
    pub(super) fn iter_from(&self, turn: usize) -> impl Iterator<Item = &Stream> {
        let (head, tail) = self.slots.split_at(turn & (self.slots.len() - 1));
        tail.iter().chain(head).filter(|stream| stream.id != 0)
    }

    fn home(&self, id: u32) -> usize {
        (id >> 1) as usize & (self.slots.len() - 1)
    }

    fn place(&mut self, stream: Stream) {
        let mut at = self.home(stream.id);
        while self.slots[at].id != 0 {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = stream;
    }

    fn grow(&mut self) {
        let larger = vec![FREE; self.slots.len() * 2];
        for stream in std::mem::replace(&mut self.slots, larger) {
            if stream.id != 0 {
                self.place(stream);
            }
        }
    }
}

/// The last identifiers added, in constant memory.
#[derive(Debug)]
pub(super) struct RecentIds {
    ids: [u32; RECENT],
    next: usize,
}

impl RecentIds {
    pub(super) fn new() -> Self {
        Self {
            ids: [0; RECENT],
            next: 0,
        }
    }

    pub(super) fn add(&mut self, id: u32) {
        self.ids[self.next] = id;
        self.next = (self.next + 1) % RECENT;
    }

    pub(super) fn contains(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }
}

const INITIAL_SLOTS: usize = 16;
const RECENT: usize = 64;
const FREE: Stream = Stream {
    id: 0,
    send: SendWindow::ZERO,
    recv: RecvWindow::ZERO,
    local_ended: false,
    remote_ended: false,
    answered: false,
    tunnel: false,
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(ops in prop::collection::vec((any::<bool>(), 1u32..200), 1..400)) {
            let mut streams = Streams::new();
            let mut model = BTreeSet::new();
            for (insert, id) in ops {
                if insert && model.insert(id) {
                    streams.insert(Stream { id, ..FREE });
                } else if !insert {
                    prop_assert_eq!(streams.remove(id).map(|s| s.id), model.take(&id));
                }
                prop_assert_eq!(streams.len(), model.len());
                let found: BTreeSet<_> = streams.iter_from(id as usize).map(|s| s.id).collect();
                prop_assert_eq!(&found, &model);
                for id in 1..200 {
                    prop_assert_eq!(streams.get(id).is_some(), model.contains(&id));
                }
            }
        }
    }

    #[test]
    fn recent_ids_forget_the_oldest() {
        let mut recent = RecentIds::new();
        for id in 1..=RECENT as u32 + 1 {
            recent.add(id);
        }
        assert!(!recent.contains(1));
        assert!(recent.contains(2) && recent.contains(RECENT as u32 + 1));
    }
}
