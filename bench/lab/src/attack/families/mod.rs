//! The attacks, a file for each family or a few that belong together.

mod around;
mod connect;
mod crowds;
mod floods;
mod handshakes;
mod http2;
mod own_lab;
mod packets;
mod records;
mod resets;
mod silence;
mod slow;
mod spending;

use std::net::TcpListener;
use std::time::Duration;

use super::arena::{Arena, PATIENCE, VICTIM, accept_all, victim};
use super::catalog::{Attack, Bounds, Failure, Finding, Run, got};
use super::frames::hello;
use super::session::Session;
use super::who::Who;

/// Every attack: first what takes long side by side, so that the others run beside it.
pub(super) fn all() -> Vec<Attack> {
    [
        slow::attacks(),
        http2::attacks(),
        connect::attacks(),
        floods::attacks(),
        records::attacks(),
        handshakes::attacks(),
        around::attacks(),
        packets::attacks(),
        resets::attacks(),
        crowds::attacks(),
        silence::attacks(),
        spending::attacks(),
    ]
    .concat_all()
}

trait ConcatAll {
    fn concat_all(self) -> Vec<Attack>;
}

impl<const N: usize> ConcatAll for [Vec<Attack>; N] {
    fn concat_all(self) -> Vec<Attack> {
        self.into_iter().flatten().collect()
    }
}

/// The family whose attacks choose the mesh themselves.
pub(super) const AROUND: &str = "around";

/// The certificate of most attackers: a workload's, that has gone bad.
const INSIDER: Who = Who::Workload("client-a");

/// An attack that is refused at once.
fn small(name: &str, family: &'static str, must_not: &str, run: Run) -> Attack {
    Attack {
        name: name.to_owned(),
        family,
        must_not: must_not.to_owned(),
        bounds: Bounds::SMALL,
        long: false,
        alone: false,
        run,
    }
}

/// How a tunnel must take what an insider sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Expect {
    /// The tunnel ends.
    End,
    /// The stream is reset or answered with a refusal, or the tunnel ends.
    Refuse,
    /// This answer, and the tunnel goes on.
    Status(u16),
    /// Nothing: it has no meaning, and the tunnel goes on.
    Ignore,
}

/// An application of the victim that no attacker may reach: each attack has its own.
#[derive(Debug)]
struct Application {
    listener: TcpListener,
    port: u16,
}

impl Application {
    fn on_victim(arena: &Arena) -> Result<Self, Failure> {
        let listener = arena.listen(VICTIM, 0)?;
        let port = listener.local_addr()?.port();
        Ok(Self { listener, port })
    }

    /// As a tunnel's target.
    fn authority(&self) -> Result<String, Failure> {
        Ok(victim(self.port)?.to_string())
    }

    /// Fails if more connections than `allowed` came.
    fn reached(&self, allowed: usize) -> Result<(), Failure> {
        let reached = accept_all(&self.listener)?.len();
        if reached > allowed {
            return got(format!("{reached} connections to the application"));
        }
        Ok(())
    }
}

/// Makes what is sent from the target of an honest request.
type Bytes = Box<dyn Fn(&str) -> Vec<u8> + Send + Sync>;

/// What an insider sends on a fresh tunnel.
struct Input {
    name: &'static str,
    family: &'static str,
    expect: Expect,
    /// Connections that the application may see: of streams opened honestly first.
    reaches: usize,
    /// Begin with what an honest client begins with.
    greet: bool,
    bytes: Bytes,
}

impl Input {
    fn new(
        (name, family): (&'static str, &'static str),
        expect: Expect,
        bytes: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            family,
            expect,
            reaches: 0,
            greet: true,
            bytes: Box::new(bytes),
        }
    }

    /// With streams that are opened honestly first.
    fn reaching(mut self, connections: usize) -> Self {
        self.reaches = connections;
        self
    }

    /// Without the preface.
    fn ungreeted(mut self) -> Self {
        self.greet = false;
        self
    }

    fn attack(self) -> Attack {
        let must_not = match self.expect {
            Expect::End => "a tunnel that goes on, or the application",
            Expect::Refuse | Expect::Status(_) => "the application",
            Expect::Ignore => "any effect",
        };
        let (name, family) = (self.name, self.family);
        small(
            name,
            family,
            must_not,
            Box::new(move |arena| self.send(arena)),
        )
    }

    fn send(&self, arena: &Arena) -> Finding {
        let application = Application::on_victim(arena)?;
        let mut session = arena.session(INSIDER)?;
        if self.greet {
            session.send(&hello())?;
        }
        // A tunnel that ends while it is written to has ended.
        let _ = session.send(&(self.bytes)(&application.authority()?));
        let finding = judge(&mut session, self.expect);
        application.reached(self.reaches)?;
        finding
    }
}

fn judge(session: &mut Session, expect: Expect) -> Finding {
    let heard = session.hear(patience_of(expect), |heard| match expect {
        Expect::End => heard.over(),
        Expect::Refuse => refused(heard) || heard.over(),
        Expect::Status(status) => heard.statuses.iter().any(|(_, s)| *s == status) || heard.over(),
        Expect::Ignore => heard.over(),
    });
    let words = heard.words();
    let as_expected = match expect {
        Expect::End => heard.over(),
        Expect::Refuse => refused(heard) || heard.over(),
        Expect::Status(status) => heard.statuses.iter().any(|(_, s)| *s == status),
        Expect::Ignore => !heard.over(),
    };
    if !as_expected {
        return got(format!("{expect:?} was expected, but: {words}"));
    }
    let goes_on = matches!(expect, Expect::Status(_) | Expect::Ignore);
    if goes_on && !session.lives(PATIENCE) {
        return got(format!("the end of a tunnel that should go on: {words}"));
    }
    Ok(words)
}

fn patience_of(expect: Expect) -> Duration {
    match expect {
        // The PING afterwards says whether it goes on.
        Expect::Ignore => Duration::from_millis(50),
        _ => PATIENCE,
    }
}

fn refused(heard: &super::session::Heard) -> bool {
    !heard.resets.is_empty() || heard.statuses.iter().any(|(_, status)| *status >= 400)
}
