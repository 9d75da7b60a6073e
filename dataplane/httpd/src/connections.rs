//! The connections of one server: how many, whose, and which of them goes when there are too many.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The part of all connections that one address may have while there is no room for more.
const SHARE: usize = 4;

/// Open connections, by when they last asked for something: the longest idle comes first.
#[derive(Debug, Default)]
pub(crate) struct Connections(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    by_age: BTreeMap<u64, Entry>,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    peer: IpAddr,
    displaced: Arc<Notify>,
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    connections: Arc<Connections>,
    number: Mutex<u64>,
    displaced: Arc<Notify>,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a connection of `peer`. If there are `max` already another one has to go: of the
    /// address with more than its share, or else of all, the one that has been idle longest.
    pub(crate) fn enter(self: &Arc<Self>, peer: IpAddr, max: usize) -> Seat {
        let peer = peer.to_canonical();
        let displaced = Arc::<Notify>::default();
        let mut table = self.lock();
        while table.by_age.len() >= max.max(1) {
            let Some(number) = table.dispensable(max) else {
                break;
            };
            if let Some(entry) = table.by_age.remove(&number) {
                entry.displaced.notify_one();
            }
        }
        let number = table.insert(Entry {
            peer,
            displaced: Arc::clone(&displaced),
        });
        drop(table);
        Seat {
            connections: Arc::clone(self),
            number: Mutex::new(number),
            displaced,
        }
    }
}

impl Table {
    fn insert(&mut self, entry: Entry) -> u64 {
        let number = self.next;
        self.next += 1;
        self.by_age.insert(number, entry);
        number
    }

    fn dispensable(&self, max: usize) -> Option<u64> {
        let mut counts = HashMap::<IpAddr, usize>::new();
        for entry in self.by_age.values() {
            *counts.entry(entry.peer).or_default() += 1;
        }
        let greedy = counts.into_iter().max_by_key(|(_, count)| *count);
        let greedy = greedy.filter(|(_, count)| *count > max / SHARE);
        let mut oldest = self.by_age.iter();
        let found = match greedy {
            Some((peer, _)) => oldest.find(|(_, entry)| entry.peer == peer),
            None => oldest.next(),
        };
        found.map(|(number, _)| *number)
    }
}

impl Seat {
    /// It has asked for something.
    pub(crate) fn is_used(&self) {
        let mut number = self.number.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = self.connections.lock();
        if let Some(entry) = table.by_age.remove(&*number) {
            *number = table.insert(entry);
        }
    }

    /// Waits until it has to go.
    pub(crate) async fn displaced(&self) {
        self.displaced.notified().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let number = self.number.lock().unwrap_or_else(PoisonError::into_inner);
        self.connections.lock().by_age.remove(&*number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn peers(connections: &Connections) -> Vec<IpAddr> {
        let table = connections.lock();
        table.by_age.values().map(|entry| entry.peer).collect()
    }

    #[test]
    fn the_longest_idle_goes_and_first_of_an_address_with_too_many() {
        let connections = Arc::<Connections>::default();
        let mut seats: Vec<Seat> = (0..4).map(|n| connections.enter(address(n), 4)).collect();
        seats[0].is_used();
        seats.push(connections.enter(address(9), 4));
        assert_eq!(
            peers(&connections),
            [2, 3, 0, 9].map(address),
            "1 was idle longest"
        );
        // Two of one address are more than a quarter: it makes room for itself and others.
        seats.push(connections.enter(address(9), 4));
        assert_eq!(peers(&connections), [3, 0, 9, 9].map(address));
        seats.push(connections.enter(address(5), 4));
        assert_eq!(peers(&connections), [3, 0, 9, 5].map(address));
        drop(seats);
        assert!(peers(&connections).is_empty());
    }
}
