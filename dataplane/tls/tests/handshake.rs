//! Handshakes between our own client and server, and whom they refuse.

mod common;

use common::{authority, handshake, identity, open, seal, workload};
use tls::{ClientSettings, ServerSettings};

#[test]
fn both_sides_learn_who_the_peer_is() {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let client = ClientSettings::new(&workload(&authority, &a)).unwrap();
    let server = ServerSettings::new(&workload(&authority, &b)).unwrap();
    for portion in [1, 7, 1000, usize::MAX] {
        let outcome = handshake(&client, &server, &b, portion);
        let (mut client, mut server) = (outcome.client.unwrap(), outcome.server.unwrap());
        assert_eq!(client.peer().identity(), Some(&b));
        assert_eq!(server.peer().identity(), Some(&a));
        assert_eq!(server.peer().uri(), a.uri());
        // No tickets: nothing may follow the server's flight.
        assert_eq!(outcome.to_client, []);
        let mut record = seal(&mut client, b"ping");
        assert_eq!(open(&mut server, &mut record).unwrap(), b"ping");
        let mut record = seal(&mut server, b"pong");
        assert_eq!(open(&mut client, &mut record).unwrap(), b"pong");
    }
}
