//! Figures as people read them.

/// What figures of a metric are in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unit {
    /// Requests per second.
    RequestsPerS,
    /// Connections per second.
    ConnectionsPerS,
    /// Bytes per second.
    BytesPerS,
    /// µs, shown in the unit that suits.
    Latency,
    /// µs of CPU time for each request or connection.
    CpuUs,
    /// s of CPU time for each GB.
    CpuSPerGb,
    /// Bytes.
    Bytes,
    /// A share of 1, shown in percent.
    Share,
    /// A number.
    Count,
}

impl Unit {
    /// A figure in it, three significant digits.
    #[must_use]
    pub fn show(self, value: f64) -> String {
        match self {
            Self::RequestsPerS => format!("{} req/s", scaled(value)),
            Self::ConnectionsPerS => format!("{} conn/s", scaled(value)),
            Self::BytesPerS => format!("{}B/s", scaled_apart(value)),
            Self::Latency => latency(value),
            Self::CpuUs => format!("{} us", digits(value)),
            Self::CpuSPerGb => format!("{} s/GB", digits(value)),
            Self::Bytes => format!("{}B", scaled_apart(value)),
            Self::Share => format!("{:.0} %", value * 100.0),
            Self::Count => digits(value),
        }
    }
}

fn latency(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{} s", digits(us / 1e6)),
        us if us >= 1e3 => format!("{} ms", digits(us / 1e3)),
        us => format!("{} us", digits(us)),
    }
}

/// `1234567` as `1.23M`.
#[must_use]
pub fn scaled(value: f64) -> String {
    let (value, prefix) = prefixed(value);
    format!("{}{prefix}", digits(value))
}

/// `1234567` as `1.23 M`, for a unit to follow.
fn scaled_apart(value: f64) -> String {
    let (value, prefix) = prefixed(value);
    format!("{} {prefix}", digits(value))
}

fn prefixed(value: f64) -> (f64, &'static str) {
    match value.abs() {
        v if v >= 1e9 => (value / 1e9, "G"),
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e3 => (value / 1e3, "k"),
        _ => (value, ""),
    }
}

/// Three significant digits, trailing zeros kept: they were measured.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
