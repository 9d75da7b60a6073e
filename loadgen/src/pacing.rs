//! When requests are sent: as fast as responses come (closed loop) or on a schedule (open loop).

/// How the arrivals of an open loop are spaced.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Arrivals {
    /// Evenly spaced, the connections' phases staggered.
    Constant,
    /// Exponentially distributed gaps: independent arrivals, bursts included.
    Poisson,
}

impl Arrivals {
    /// The name in results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Poisson => "poisson",
        }
    }
}

/// The loop a run uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pacing {
    /// A connection's next request follows its last response.
    Closed,
    /// Requests have intended send times, independent of responses.
    Open {
        /// Requests per second over all connections.
        rate: f64,
        /// Spacing of the arrivals.
        arrivals: Arrivals,
    },
}

impl Pacing {
    /// The label results carry.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open { .. } => "open",
        }
    }
}

/// Intended send times of one connection, in ns of the run's clock.
///
/// The schedule does not know whether the connection is busy: a time that passes while it is stays
/// due, and the latency of that request counts from it.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    /// With its fraction: at high rates an interval is a few ns, and cutting each to whole ones
    /// would make the rate another one.
    next: f64,
    interval: f64,
    poisson: Option<u64>,
}

/// Requests that were due and not sent: how many, and the span their times fill evenly.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Backlog {
    pub(crate) count: u64,
    pub(crate) from: u64,
    pub(crate) until: u64,
}

/// Requests of a backlog that are told apart; the rest is counted by the mean interval.
const COUNTED_ONE_BY_ONE: u64 = 1 << 16;

impl Schedule {
    /// The schedule of connection `index` of `connections`, from `start` on.
    pub(crate) fn new(
        rate: f64,
        arrivals: Arrivals,
        index: usize,
        connections: usize,
        start: u64,
    ) -> Self {
        let interval = 1e9 * connections as f64 / rate;
        let mut schedule = Self {
            next: start as f64,
            interval,
            poisson: None,
        };
        match arrivals {
            Arrivals::Constant => {
                schedule.next += interval * index as f64 / connections as f64;
            }
            Arrivals::Poisson => {
                // Odd multiples of a large constant: distinct non-zero seeds, same in every run.
                let seed = (index as u64 * 2 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                schedule.poisson = Some(seed);
                schedule.advance();
            }
        }
        schedule
    }

    /// The intended time of the next request.
    pub(crate) fn next(&self) -> u64 {
        self.next as u64
    }

    /// Ends the schedule at `until`, telling of the times from `from` on that have come since the
    /// last request. The work does not grow with the rate: what is beyond a number that can be
    /// drawn one by one is counted by the mean interval.
    pub(crate) fn end(mut self, from: u64, until: u64, mut tell: impl FnMut(Backlog)) {
        if self.poisson.is_none() && self.next() < from {
            // Straight to the first time in the span.
            let steps = ((from as f64 - self.next) / self.interval).ceil();
            self.next += steps * self.interval;
        }
        for _ in 0..COUNTED_ONE_BY_ONE {
            let at = self.next();
            if at >= until {
                return;
            }
            if at >= from {
                tell(Backlog {
                    count: 1,
                    from: at,
                    until: at,
                });
            }
            self.advance();
        }
        let from = self.next().max(from);
        let count = (until.saturating_sub(from) as f64 / self.interval).ceil() as u64;
        if count > 0 {
            tell(Backlog { count, from, until });
        }
    }

    /// Moves on to the request after the next one.
    pub(crate) fn advance(&mut self) {
        let gap = match &mut self.poisson {
            None => self.interval,
            Some(state) => {
                *state ^= *state >> 12;
                *state ^= *state << 25;
                *state ^= *state >> 27;
                let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
                // In (0, 1]: the logarithm stays finite.
                let unit = (random + 1) as f64 / (1u64 << 53) as f64;
                -unit.ln() * self.interval
            }
        };
        self.next += gap;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(mut schedule: Schedule, until: u64) -> Vec<u64> {
        let mut times = Vec::new();
        while schedule.next() < until {
            times.push(schedule.next());
            schedule.advance();
        }
        times
    }

    #[test]
    fn constant_arrivals_of_all_connections_are_evenly_spaced() {
        let mut all: Vec<u64> = (0..4)
            .flat_map(|i| {
                times(
                    Schedule::new(1000.0, Arrivals::Constant, i, 4, 5),
                    1_000_000_000,
                )
            })
            .collect();
        all.sort_unstable();
        assert_eq!(all.len(), 1000);
        assert!(all.windows(2).all(|w| w[1] - w[0] == 1_000_000));
    }

    /// How many requests a schedule of `rate` has in the second from `FROM` on, by its end.
    fn backlog(rate: f64, arrivals: Arrivals, connections: usize) -> u64 {
        const FROM: u64 = 1_000_000_000;
        let mut count = 0;
        for i in 0..connections {
            let schedule = Schedule::new(rate, arrivals, i, connections, 0);
            schedule.end(FROM, 2 * FROM, |part| {
                assert!(FROM <= part.from && part.from <= part.until && part.until <= 2 * FROM);
                count += part.count;
            });
        }
        count
    }

    #[test]
    fn a_backlog_has_as_many_requests_as_the_rate_says_however_high_it_is() {
        for rate in [1e3, 3e5, 7e7, 3e8, 1e9] {
            for (arrivals, tolerance) in [(Arrivals::Constant, 1e-6), (Arrivals::Poisson, 0.1)] {
                for connections in [1, 3] {
                    let off = backlog(rate, arrivals, connections) as f64 / rate - 1.0;
                    let least = connections as f64 / rate;
                    assert!(off.abs() <= tolerance + least, "{rate} {arrivals:?}: {off}");
                }
            }
        }
    }

    #[test]
    fn intervals_keep_their_fractions() {
        // 3.33 ns: cut to 3 ns each, the rate would be a ninth higher.
        let fast = times(Schedule::new(3e8, Arrivals::Constant, 0, 1, 0), 1_000_000);
        assert_eq!(fast.len(), 300_000);
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_spread_of_the_distribution() {
        let all = times(
            Schedule::new(10_000.0, Arrivals::Poisson, 0, 1, 0),
            10_000_000_000,
        );
        assert!(
            (99_000..101_000).contains(&all.len()),
            "{} arrivals",
            all.len()
        );
        let gaps: Vec<f64> = all.windows(2).map(|w| (w[1] - w[0]) as f64).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        let variation = variance.sqrt() / mean;
        assert!(
            (0.97..1.03).contains(&variation),
            "coefficient of variation {variation}"
        );
    }
}
