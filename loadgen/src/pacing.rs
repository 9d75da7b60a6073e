//! When requests are sent: as fast as responses come (closed loop) or on a schedule (open loop).

/// How the arrivals of an open loop are spaced.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Arrivals {
    /// Evenly spaced, the connections' phases staggered.
    Constant,
    /// Exponentially distributed gaps: independent arrivals, bursts included.
    Poisson,
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
    next: u64,
    interval: f64,
    poisson: Option<u64>,
}

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
            next: start,
            interval,
            poisson: None,
        };
        match arrivals {
            Arrivals::Constant => {
                schedule.next += (interval * index as f64 / connections as f64) as u64;
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
        self.next
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
        // At least 1 ns, so that counting a backlog ends whatever the rate.
        self.next += (gap as u64).max(1);
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
