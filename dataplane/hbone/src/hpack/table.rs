//! The static table (RFC 7541 appendix A) and the dynamic table of the decoder.

use std::collections::VecDeque;

/// A header field: name and value.
pub(super) type Field<'a> = (&'a [u8], &'a [u8]);

/// What RFC 7541 4.1 adds to name and value for the bookkeeping of an entry.
const ENTRY_OVERHEAD: usize = 32;

/// Entries inserted by the peer, newest first; never larger than `max` (RFC 7541 4.1 size).
#[derive(Debug)]
pub(super) struct DynamicTable {
    entries: VecDeque<Entry>,
    size: usize,
    max: usize,
}

/// A field as the table keeps it.
#[derive(Debug)]
pub(super) struct Entry {
    /// Name, then value.
    bytes: Box<[u8]>,
    name_len: usize,
}

impl Entry {
    pub(super) fn new(name: &[u8], value: &[u8]) -> Self {
        Self {
            bytes: [name, value].concat().into_boxed_slice(),
            name_len: name.len(),
        }
    }

    fn size(&self) -> usize {
        self.bytes.len() + ENTRY_OVERHEAD
    }
}

impl DynamicTable {
    pub(super) fn new(max: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            size: 0,
            max,
        }
    }

    pub(super) fn max(&self) -> usize {
        self.max
    }

    pub(super) fn set_max(&mut self, max: usize) {
        self.max = max;
        self.evict(max);
    }

    /// The field at `index` of the common address space: 1..=61 static, then dynamic.
    pub(super) fn get(&self, index: usize) -> Option<Field<'_>> {
        if let Some(&(name, value)) = STATIC.get(index.checked_sub(1)?) {
            return Some((name.as_bytes(), value.as_bytes()));
        }
        let entry = self.entries.get(index - STATIC.len() - 1)?;
        Some(entry.bytes.split_at(entry.name_len))
    }

    /// Highest valid index.
    pub(super) fn last(&self) -> usize {
        STATIC.len() + self.entries.len()
    }

    /// Inserts a field. One larger than the table empties it (RFC 7541 4.4).
    pub(super) fn insert(&mut self, entry: Entry) {
        let size = entry.size();
        if size > self.max {
            self.evict(0);
            return;
        }
        self.evict(self.max - size);
        self.entries.push_front(entry);
        self.size += size;
    }

    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.size
    }

    fn evict(&mut self, target: usize) {
        while self.size > target {
            let Some(entry) = self.entries.pop_back() else {
                break;
            };
            self.size -= entry.size();
        }
    }
}

const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_entries_leave_and_an_oversized_one_empties_the_table() {
        let mut table = DynamicTable::new(100);
        table.insert(Entry::new(b"a", b"1"));
        table.insert(Entry::new(b"b", b"2"));
        assert_eq!((table.size(), table.last()), (68, 63));
        assert_eq!(table.get(62), Some((&b"b"[..], &b"2"[..])));
        table.insert(Entry::new(b"c", b"3"));
        assert_eq!((table.size(), table.last()), (68, 63), "a was evicted");
        assert_eq!(table.get(63), Some((&b"b"[..], &b"2"[..])));
        table.set_max(40);
        assert_eq!(table.last(), 62);
        table.insert(Entry::new(b"long", &[0; 60]));
        assert_eq!((table.size(), table.last()), (0, 61));
        assert_eq!(table.get(0), None);
        assert_eq!(table.get(62), None);
    }
}
