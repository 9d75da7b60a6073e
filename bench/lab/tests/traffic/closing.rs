//! How connections end, and those that never begin.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use crate::MIB;
use crate::support::{PATIENCE, Pattern, TestLab, accept, at, eventually};

pub(super) fn client_closes_first(lab: &mut TestLab) {
    let (request, response) = (Pattern::new(5), Pattern::new(6));
    for server in ["server-b", "server-a"] {
        let listener = lab.listen(server, 8080);
        let client = lab.connect("client-a", at(server, 8080));
        thread::scope(|scope| {
            scope.spawn(|| {
                let (served, _) = accept(&listener);
                // Only after the client's end has arrived does the server begin.
                request.receive(&served, 100_000);
                response.send(&served, MIB, 5, 64 << 10);
            });
            request.send(&client, 100_000, 6, 8 << 10);
            client.shutdown(Shutdown::Write).unwrap();
            response.receive(&client, MIB);
        });
    }
}

pub(super) fn server_closes_first(lab: &mut TestLab) {
    let (request, response) = (Pattern::new(7), Pattern::new(8));
    for server in ["server-b", "server-a"] {
        let listener = lab.listen(server, 8080);
        let client = lab.connect("client-a", at(server, 8080));
        thread::scope(|scope| {
            scope.spawn(|| {
                let (served, _) = accept(&listener);
                response.send(&served, 100_000, 7, 8 << 10);
                served.shutdown(Shutdown::Write).unwrap();
                request.receive(&served, MIB);
            });
            response.receive(&client, 100_000);
            request.send(&client, MIB, 8, 64 << 10);
            client.shutdown(Shutdown::Write).unwrap();
        });
    }
}

/// What a client gets from a connection that leads nowhere: an error at connect, or the end
/// without a byte.
pub(super) fn outcome(
    lab: &TestLab,
    client: &str,
    to: SocketAddr,
    limit: Duration,
) -> io::Result<usize> {
    let mut stream = lab.try_connect(client, to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    // May fail already; the read says what happened.
    let _ = stream.write_all(b"hello?");
    stream.read(&mut [0; 64])
}

pub(super) fn refused_connection_surfaces(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        let mark = lab.log_length("ztunnel-a");
        match outcome(lab, "client-a", at(server, 7999), Duration::from_secs(5)) {
            Ok(0) => {}
            Ok(n) => panic!("{server}: {n} bytes from a port where nothing listens"),
            Err(error) if is_timeout(&error) => panic!("{server}: the client hangs: {error}"),
            Err(_) => {}
        }
        eventually("an access log line with the error", || {
            let lines = lab.log_since("ztunnel-a", mark);
            let told = |line: &&String| line.contains(":7999") && line.contains("error=");
            lines.iter().find(told).cloned()
        });
    }
}

pub(super) fn reset_by_the_server_surfaces(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        let listener = lab.listen(server, 8080);
        let mut client = lab.connect("client-a", at(server, 8080));
        client.write_all(b"unread").unwrap();
        let (mut served, _) = accept(&listener);
        served.read_exact(&mut [0; 3]).unwrap();
        // Closing with unread data in the queue resets the connection.
        drop(served);
        match client.read(&mut [0; 64]) {
            Ok(0) => {}
            Ok(n) => panic!("{server}: {n} bytes after a reset"),
            Err(error) => assert!(!is_timeout(&error), "{server}: the client hangs: {error}"),
        }
    }
}

pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// A client that reuses its source port while the old connection may still be in TIME_WAIT.
pub(super) fn source_port_reuse(lab: &mut TestLab) {
    let listener = lab.listen("server-b", 8080);
    let to = at("server-b", 8080);
    for round in 0..5 {
        let stream = lab
            .lab
            .on("client-a", || {
                let socket = socket2::Socket::new(
                    socket2::Domain::IPV4,
                    socket2::Type::STREAM,
                    Some(socket2::Protocol::TCP),
                )?;
                socket.set_reuse_address(true)?;
                // Closing then resets, so that the client itself holds no TIME_WAIT.
                socket.set_linger(Some(Duration::ZERO))?;
                socket.bind(&SocketAddr::from(([10, 244, 1, 11], 15999)).into())?;
                socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
                Ok::<_, io::Error>(TcpStream::from(socket))
            })
            .unwrap();
        let mut stream = stream.unwrap_or_else(|error| panic!("round {round}: {error}"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&[round]).unwrap();
        let (mut served, _) = accept(&listener);
        let mut byte = [0];
        served.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], round);
        served.write_all(b"!").unwrap();
        stream.read_exact(&mut byte).unwrap();
        drop(served);
    }
}
