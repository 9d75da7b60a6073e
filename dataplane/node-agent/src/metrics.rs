//! Counters for Prometheus: `GET /metrics` on `stats_address`, if the configuration has one.
//!
//! One request at a time, on a thread of its own that only reads what `status` reads, too. A
//! client that dawdles or talks nonsense is cut off; nothing else waits for it.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use redirect::{Counters, Outcome, Redirect, Uncaptured, Why, sockmap};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::shortcut;

/// How soon the thread notices that it is to end.
const PATIENCE_MS: u16 = 200;
/// For one request and its answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
const REQUEST_BYTES_MAX: usize = 4096;

/// The endpoint. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    config: Arc<Mutex<Config>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts it if the configuration asks for it.
    pub(crate) fn start(config: &Config) -> Result<Option<Self>> {
        let Some(address) = config.stats_address else {
            return Ok(None);
        };
        let failed = |source| Error::Stats { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let config = Arc::new(Mutex::new(config.clone()));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, current) = (Arc::clone(&stop), Arc::clone(&config));
        let thread = thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || {
                while !told.load(Ordering::Relaxed) {
                    turn(&listener, &current);
                }
            })
            .map_err(failed)?;
        Ok(Some(Self {
            address,
            config,
            stop,
            thread: Some(thread),
        }))
    }

    /// Brings `server` to what the configuration is now.
    pub(crate) fn follow(server: &mut Option<Self>, config: &Config) -> Result<()> {
        match server {
            Some(current) if Some(current.address) == config.stats_address => {
                let mut known = lock(&current.config);
                if *known != *config {
                    known.clone_from(config);
                }
                Ok(())
            }
            None if config.stats_address.is_none() => Ok(()),
            _ => {
                *server = None; // another may have the same port
                *server = Self::start(config)?;
                Ok(())
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic in it was reported by its hook
        }
    }
}

fn lock(config: &Mutex<Config>) -> std::sync::MutexGuard<'_, Config> {
    config.lock().unwrap_or_else(PoisonError::into_inner)
}

fn turn(listener: &TcpListener, config: &Mutex<Config>) {
    let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut waiting, PollTimeout::from(PATIENCE_MS)); // a signal: look anyway
    match listener.accept() {
        Ok((stream, _)) => {
            let config = lock(config).clone();
            // The client is gone, or not one of ours.
            let _ = serve(&stream, || render(&config));
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        // No descriptors, say.
        Err(_) => thread::sleep(Duration::from_millis(PATIENCE_MS.into())),
    }
}

fn serve(mut stream: &TcpStream, metrics: impl FnOnce() -> Result<String>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let (status, body) = match target(stream)?.as_deref() {
        Some("/metrics") => match metrics() {
            Ok(text) => ("200 OK", text),
            Err(error) => ("503 Service Unavailable", format!("{error}\n")),
        },
        Some(_) => ("404 Not Found", "only /metrics is here\n".to_owned()),
        None => ("400 Bad Request", "GET /metrics, please\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// What is asked for by GET; None if it is not a request.
fn target(mut stream: &TcpStream) -> io::Result<Option<String>> {
    let deadline = Instant::now() + CLIENT_PATIENCE;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > REQUEST_BYTES_MAX {
            return Ok(None);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer)? {
            0 => return Ok(None),
            count => request.extend_from_slice(&buffer[..count]),
        }
    }
    Ok(parse_target(&request))
}

fn parse_target(request: &[u8]) -> Option<String> {
    let line = request.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let target = (words.next()? == "GET").then(|| words.next())??;
    words.next()?.starts_with("HTTP/1.").then_some(())?;
    Some(target.split('?').next().unwrap_or(target).to_owned())
}

fn render(config: &Config) -> Result<String> {
    let redirection = config.redirection()?;
    let mut text = Text::default();
    let pods = redirection.enrolled().len() as u64;
    text.family("node_agent_pods", "gauge", "Captured pods of this node.");
    text.sample("node_agent_pods", &[], pods);
    text.uncaptured(redirection.uncaptured());
    text.family(
        "node_agent_older_connections_broken_total",
        "counter",
        "Connections older than their pod's capture that found no place in the map.",
    );
    let broken = redirection.older_broken();
    text.sample("node_agent_older_connections_broken_total", &[], broken);
    let counters = redirection.counters()?;
    match config.redirect {
        Redirect::Ebpf => text.programs(&counters),
        Redirect::Tunnel => text.rules(&counters),
    }
    let status = shortcut::status(config)?;
    text.family(
        "node_agent_sockmap_enabled",
        "gauge",
        "Whether new connections may use sockmap.",
    );
    let enabled = status.as_ref().is_some_and(|status| status.enabled);
    text.sample("node_agent_sockmap_enabled", &[], enabled.into());
    if let Some(status) = status {
        text.sockmap(&status);
    }
    Ok(text.0)
}

/// The exposition format.
#[derive(Debug, Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        self.0 += name;
        for (index, (label, content)) in labels.iter().enumerate() {
            let content = content.replace('\\', "\\\\").replace('"', "\\\"");
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{label}=\"{content}\"");
        }
        let after = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{after} {value}");
    }

    fn uncaptured(&mut self, pods: &[Uncaptured]) {
        let name = "node_agent_pods_not_captured";
        let help = "Listed pods that are not captured, by reason and whether they are cut off.";
        self.family(name, "gauge", help);
        for why in Why::ALL {
            for (cut_off, text) in [(true, "true"), (false, "false")] {
                let alike = pods.iter();
                let alike = alike.filter(|pod| pod.why == why && pod.cut_off == cut_off);
                let labels = [("reason", why.name()), ("cut_off", text)];
                self.sample(name, &labels, alike.count() as u64);
            }
        }
    }

    fn programs(&mut self, counters: &Counters) {
        let name = "node_agent_packets_total";
        let help =
            "Packets by BPF program and what became of them; connections for ztunnel_ingress.";
        self.family(name, "counter", help);
        for (program, reasons) in counters {
            for (reason, count) in reasons {
                let labels = [
                    ("program", program.as_str()),
                    ("outcome", Outcome::of(reason).name()),
                    ("reason", reason),
                ];
                self.sample(name, &labels, *count);
            }
        }
    }

    fn rules(&mut self, counters: &Counters) {
        let name = "node_agent_rule_packets_total";
        self.family(name, "counter", "Packets by iptables rule that saw any.");
        for (place, rules) in counters {
            for (rule, count) in rules {
                self.sample(name, &[("place", place), ("rule", rule)], *count);
            }
        }
    }

    fn sockmap(&mut self, status: &sockmap::Status) {
        let count = |name: &str| status.counters.get(name).copied().unwrap_or(0);
        let families = [
            (
                "node_agent_sockmap_bytes_total",
                "Bytes of sockets in the maps: from socket to socket, or past it, by TCP.",
                "way",
                &[
                    ("to_ztunnel", "to_ztunnel_bytes"),
                    ("to_pod", "to_pod_bytes"),
                    ("bypassed", "bypassed_bytes"),
                ][..],
            ),
            (
                "node_agent_sockmap_messages_total",
                "Messages that went from socket to socket.",
                "way",
                &[
                    ("to_ztunnel", "to_ztunnel_messages"),
                    ("to_pod", "to_pod_messages"),
                ],
            ),
            (
                "node_agent_sockmap_sockets_total",
                "Sockets put into the maps, and those not: they block, use MPTCP, maps full.",
                "result",
                &[("entered", "sockets"), ("refused", "refused")],
            ),
            (
                "node_agent_sockmap_demotions_total",
                "Connections given back to TCP, by reason.",
                "reason",
                &[
                    ("budget", "demoted_budget"),
                    ("pressure", "demoted_pressure"),
                    ("blocking", "demoted_blocking"),
                    ("no_peer", "demoted_no_peer"),
                    ("closed", "demoted_closed"),
                ],
            ),
        ];
        for (name, help, label, samples) in families {
            self.family(name, "counter", help);
            for (content, counter) in samples {
                self.sample(name, &[(label, content)], count(counter));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_are_read() {
        let target = |text: &str| parse_target(text.as_bytes());
        assert_eq!(target("GET /metrics HTTP/1.1\r\n").unwrap(), "/metrics");
        assert_eq!(target("GET /metrics?x=1 HTTP/1.0\r\n").unwrap(), "/metrics");
        for wrong in [
            "",
            "GET\r\n",
            "POST /metrics HTTP/1.1\r\n",
            "GET /metrics\r\n",
            "\u{1}",
        ] {
            assert_eq!(target(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn counters_become_samples() {
        let mut text = Text::default();
        let of_program = [("spoofed".to_owned(), 3), ("dns".to_owned(), 4)];
        let counters = Counters::from([("app_outbound".to_owned(), of_program.into())]);
        text.programs(&counters);
        text.sample("x", &[("rule", r#"a "b" \c"#)], 1);
        let lines: Vec<_> = text.0.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                r#"node_agent_packets_total{program="app_outbound",outcome="redirected",reason="dns"} 4"#,
                r#"node_agent_packets_total{program="app_outbound",outcome="dropped",reason="spoofed"} 3"#,
                r#"x{rule="a \"b\" \\c"} 1"#,
            ]
        );
    }

    #[test]
    fn every_counter_of_the_short_cut_is_told() {
        let counters = (1..).zip(sockmap::COUNTER_NAMES);
        let counters = counters.map(|(value, name)| (name.to_owned(), 1000 + value));
        let status = sockmap::Status {
            enabled: true,
            forced: false,
            memory_max: None,
            counters: counters.collect(),
        };
        let mut text = Text::default();
        text.sockmap(&status);
        for value in status.counters.values() {
            assert!(
                text.0.contains(&format!("}} {value}\n")),
                "{value}: {}",
                text.0
            );
        }
    }
}
