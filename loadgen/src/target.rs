//! Where to connect: an address, or a name with several of which some may not answer.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::str::FromStr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// The addresses a server was given by.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    addresses: Vec<SocketAddr>,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = text.to_socket_addrs().map_err(|e| {
            format!("must be ADDRESS:PORT ([ADDRESS]:PORT for IPv6) or a name that resolves: {e}")
        })?;
        Self::new(found).ok_or_else(|| "the name has no address".to_owned())
    }
}

impl Target {
    /// A server that has any of `addresses`, each once; `None` if there is none.
    pub fn new(addresses: impl IntoIterator<Item = SocketAddr>) -> Option<Self> {
        let mut known = Vec::new();
        for address in addresses {
            if !known.contains(&address) {
                known.push(address);
            }
        }
        (!known.is_empty()).then_some(Self { addresses: known })
    }

    /// The first address that accepts a connection from `bind` within `timeout`, as any client of
    /// a name tries them, and what became of those before it, a line each.
    ///
    /// A single address is not tried, so that its server sees the run's connections only. If none
    /// answers it is the first one: the run will tell why in its results.
    #[must_use]
    pub fn choose(&self, bind: Option<IpAddr>, timeout: Duration) -> (SocketAddr, Vec<String>) {
        let first = self.addresses[0];
        let mut refused = Vec::new();
        if self.addresses.len() == 1 {
            return (first, refused);
        }
        for &address in &self.addresses {
            match connect(address, bind, timeout) {
                Ok(_) => return (address, refused),
                Err(error) => refused.push(format!("{address} does not answer: {error}")),
            }
        }
        (first, refused)
    }
}

fn connect(to: SocketAddr, bind: Option<IpAddr>, timeout: Duration) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(ip) = bind {
        socket.bind(&SocketAddr::new(ip, 0).into())?;
    }
    socket.connect_timeout(&to.into(), timeout)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// An address that nobody listens on.
    fn free() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    }

    #[test]
    fn the_first_address_that_answers_is_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        let second = Duration::from_secs(1);
        let closed = free();
        let target = Target::new([closed, closed, open]).unwrap();
        let (chosen, refused) = target.choose(None, second);
        assert_eq!(chosen, open);
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(refused[0].contains(&closed.to_string()), "{refused:?}");
        // A source address of the other family fits none of the first kind.
        let other: SocketAddr = "[::1]:9".parse().unwrap();
        let target = Target::new([other, open]).unwrap();
        assert_eq!(target.choose(Some([127, 0, 0, 1].into()), second).0, open);
    }

    #[test]
    fn without_an_answer_it_is_the_first_and_all_are_told() {
        let (one, two) = (free(), free());
        let target = Target::new([one, two]).unwrap();
        let (chosen, refused) = target.choose(None, Duration::from_secs(1));
        assert_eq!((chosen, refused.len()), (one, 2));
    }

    #[test]
    fn a_single_address_is_not_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let to = listener.local_addr().unwrap();
        let target: Target = to.to_string().parse().unwrap();
        assert_eq!(
            target.choose(None, Duration::from_secs(1)),
            (to, Vec::new())
        );
        assert!(listener.accept().is_err());
        assert!("nowhere".parse::<Target>().is_err());
    }
}
