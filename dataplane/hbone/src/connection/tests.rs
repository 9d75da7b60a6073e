//! Two connections back to back.

use super::*;
use crate::headers::ConnectRequest;

fn pump(from: &mut Connection, to: &mut Connection, events: &mut VecDeque<Event>) {
    let bytes = from.output().to_vec();
    from.consume_output(bytes.len());
    to.receive(&bytes, events).unwrap();
}

#[test]
fn a_tunnel_opens_carries_data_and_ends() {
    let mut client = Connection::new(Role::Client, &Config::client());
    let mut server = Connection::new(Role::Server, &Config::server());
    let (mut at_client, mut at_server) = (VecDeque::new(), VecDeque::new());
    let request = ConnectRequest {
        authority: "10.0.0.1:80",
        ..ConnectRequest::default()
    };
    let id = client.open(&request).unwrap();
    pump(&mut client, &mut server, &mut at_server);
    pump(&mut server, &mut client, &mut at_client);
    assert_eq!(at_server.pop_front(), Some(Event::Settings));
    let Some(Event::Request { id: seen, head }) = at_server.pop_front() else {
        panic!()
    };
    assert_eq!((seen, &*head.authority), (id, "10.0.0.1:80"));
    server.respond(id, 200, Some("a=b"), false).unwrap();
    pump(&mut server, &mut client, &mut at_client);
    assert_eq!(at_client.pop_front(), Some(Event::Settings));
    let response = Event::Response {
        id,
        status: 200,
        baggage: Some("a=b".into()),
    };
    assert_eq!(at_client.pop_front(), Some(response));

    let mut wire = client.data_header(id, 5, false).unwrap().to_vec();
    wire.extend_from_slice(b"hello");
    server.receive(&wire, &mut at_server).unwrap();
    assert_eq!(
        at_server.pop_front(),
        Some(Event::Data { id, range: 9..14 })
    );
    server.release(id, 5);
    let end = client.data_header(id, 0, true).unwrap();
    server.receive(&end, &mut at_server).unwrap();
    assert_eq!(at_server.pop_front(), Some(Event::End { id }));
    assert_eq!((client.active_streams(), server.active_streams()), (1, 1));
    let end = server.data_header(id, 0, true).unwrap();
    client.receive(&end, &mut at_client).unwrap();
    assert_eq!(at_client.pop_front(), Some(Event::End { id }));
    assert_eq!((client.active_streams(), server.active_streams()), (0, 0));
}
