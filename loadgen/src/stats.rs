//! Latency histograms and the tally each worker keeps, merged once at the end.

use std::io::Write as _;

use base64::Engine as _;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer as _, V2DeflateSerializer};

use crate::outcome::{Failures, Kind};

/// Longest latency told apart, in ns (60 s); longer ones count as this.
const HIGHEST: u64 = 60_000_000_000;

/// Latencies in ns, 1 ns to 60 s at three significant digits.
#[derive(Clone, Debug)]
pub struct Latency {
    histogram: Histogram<u64>,
}

impl Default for Latency {
    fn default() -> Self {
        Self::new()
    }
}

impl Latency {
    /// An empty histogram. Its memory (some 200 kB) is taken here; recording never allocates.
    #[must_use]
    pub fn new() -> Self {
        #[allow(
            clippy::expect_used,
            reason = "constant bounds: 1 <= HIGHEST / 2, 3 digits <= 5"
        )]
        let histogram = Histogram::new_with_bounds(1, HIGHEST, 3).expect("valid constant bounds");
        Self { histogram }
    }

    /// Counts one latency, in ns.
    pub fn record(&mut self, ns: u64) {
        self.histogram.saturating_record(ns.max(1));
    }

    /// Counts `count` latencies that fill the span from `shortest` to `longest` evenly, in ns.
    pub(crate) fn record_even(&mut self, shortest: u64, longest: u64, count: u64) {
        const PARTS: u64 = 1024;
        let (parts, span) = (count.min(PARTS), longest.saturating_sub(shortest));
        for part in 0..parts {
            let at = |edge: u64| (u128::from(count) * u128::from(edge) / u128::from(parts)) as u64;
            let middle = u128::from(span) * u128::from(2 * part + 1) / u128::from(2 * parts);
            let ns = shortest + middle as u64;
            let samples = at(part + 1) - at(part);
            self.histogram.saturating_record_n(ns.max(1), samples);
        }
    }

    /// Adds another worker's counts.
    pub fn merge(&mut self, other: &Self) {
        // Cannot fail: both have the same constant bounds.
        let _ = self.histogram.add(&other.histogram);
    }

    /// How many latencies were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The value in µs that a share `quantile` (0 to 1) of latencies does not exceed.
    #[must_use]
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        self.histogram.value_at_quantile(quantile) as f64 / 1e3
    }

    /// The shortest latency in µs, 0 if there is none.
    #[must_use]
    pub fn min_us(&self) -> f64 {
        self.histogram.min() as f64 / 1e3
    }

    /// The longest latency in µs, 0 if there is none.
    #[must_use]
    pub fn max_us(&self) -> f64 {
        self.histogram.max() as f64 / 1e3
    }

    /// The mean in µs.
    #[must_use]
    pub fn mean_us(&self) -> f64 {
        self.histogram.mean() / 1e3
    }

    /// The standard deviation in µs.
    #[must_use]
    pub fn sd_us(&self) -> f64 {
        self.histogram.stdev() / 1e3
    }

    /// Whether a quantile can be told from this many samples: at least 100 must lie above it.
    #[must_use]
    pub fn supports(&self, quantile: f64) -> bool {
        self.count() as f64 * (1.0 - quantile) >= 99.999
    }

    /// The percentile spectrum: quantile and value in µs, at quantiles that are even on a
    /// logarithmic axis of the share above, as far as ten samples lie above them.
    #[must_use]
    pub fn spectrum(&self) -> Vec<(f64, f64)> {
        let mut points = Vec::new();
        // Ten steps per power of ten, from all of the samples above to one in a million.
        for step in 0..=60 {
            let above = 10f64.powf(-f64::from(step) / 10.0);
            if self.count() as f64 * above < 10.0 {
                break;
            }
            points.push((1.0 - above, self.quantile_us(1.0 - above)));
        }
        points
    }

    /// The histogram in HdrHistogram's V2 encoding with deflate, as base64.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut bytes = Vec::new();
        // Writing to a Vec cannot fail, and the counts fit the format.
        let _ = V2DeflateSerializer::new().serialize(&self.histogram, &mut bytes);
        base64::engine::general_purpose::STANDARD.encode(bytes)
    }

    /// The percentile distribution as HdrHistogram plotters read it (`.hgrm`), values in µs.
    #[must_use]
    pub fn hgrm(&self) -> String {
        let mut text = Vec::new();
        // Writing to a Vec cannot fail.
        let _ = self.write_hgrm(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    fn write_hgrm(&self, out: &mut Vec<u8>) -> std::io::Result<()> {
        writeln!(
            out,
            "{:>12} {:>14} {:>10} {:>14}\n",
            "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
        )?;
        let mut total = 0;
        for step in self.histogram.iter_quantiles(5) {
            total += step.count_since_last_iteration();
            let value = step.value_iterated_to() as f64 / 1e3;
            let quantile = step.quantile_iterated_to();
            write!(out, "{value:12.3} {quantile:2.12} {total:10}")?;
            if quantile < 1.0 {
                writeln!(out, " {:14.2}", 1.0 / (1.0 - quantile))?;
            } else {
                writeln!(out)?;
            }
        }
        let h = &self.histogram;
        writeln!(
            out,
            "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]",
            self.mean_us(),
            self.sd_us()
        )?;
        writeln!(
            out,
            "#[Max     = {:12.3}, Total count    = {:12}]",
            self.max_us(),
            h.len()
        )?;
        writeln!(
            out,
            "#[Buckets = {:12}, SubBuckets     = {:12}]",
            h.buckets(),
            2048
        )
    }
}

/// What a worker counts while it runs. Times and bytes refer to the measured window unless said
/// otherwise.
///
/// A request that never finished has no latency, but it has an age, and its latency would have been
/// at least that: it counts with its age when it was given up, or a stall that lasts to the end
/// would not be in any figure.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// From the intended send time (in a closed loop the actual one) to the complete response.
    pub latency: Latency,
    /// From the actual send time to the complete response; filled in open loops only.
    pub service: Latency,
    /// Time to establish connections, the whole run.
    pub connecting: Latency,
    /// Requests (or connections, or streams) that succeeded.
    pub ok: u64,
    /// Samples in `latency` that are ages of requests which never finished.
    pub unfinished: u64,
    /// What failed, the whole run.
    pub failures: Failures,
    /// Completions inside the window: the throughput's numerator.
    pub completed: u64,
    /// Completions in the whole run, warm-up included.
    pub completed_total: u64,
    /// Bytes sent inside the window.
    pub sent: u64,
    /// Bytes received inside the window.
    pub received: u64,
    /// Bytes sent in the whole run.
    pub sent_total: u64,
    /// Bytes received in the whole run.
    pub received_total: u64,
    /// Open loop: requests whose intended time lies in the window.
    pub scheduled: u64,
    /// Open loop: those of them that were never sent.
    pub skipped: u64,
    /// Open loop: sent more than 1 ms after the intended time.
    pub late: u64,
    /// Connections dialled again after a failure.
    pub reconnects: u64,
    /// Connections that were made, the whole run.
    pub connected: u64,
}

impl Tally {
    /// Adds another worker's tally.
    pub fn merge(&mut self, other: &Self) {
        self.latency.merge(&other.latency);
        self.service.merge(&other.service);
        self.connecting.merge(&other.connecting);
        self.failures.merge(&other.failures);
        self.ok += other.ok;
        self.unfinished += other.unfinished;
        self.completed += other.completed;
        self.completed_total += other.completed_total;
        self.sent += other.sent;
        self.received += other.received;
        self.sent_total += other.sent_total;
        self.received_total += other.received_total;
        self.scheduled += other.scheduled;
        self.skipped += other.skipped;
        self.late += other.late;
        self.reconnects += other.reconnects;
        self.connected += other.connected;
    }

    /// Counts a failure.
    pub(crate) fn fail(&mut self, kind: Kind) {
        self.failures.add(kind);
    }

    /// Counts a connection that was made in `ns`; whether its time counts is the caller's matter.
    pub(crate) fn connect(&mut self, ns: u64, measured: bool) {
        self.connected += 1;
        if measured {
            self.connecting.record(ns);
        }
    }

    /// Counts the age, in ns, of a request that is given up.
    pub(crate) fn give_up(&mut self, age: u64) {
        self.latency.record(age);
        self.unfinished += 1;
    }

    /// Counts a completion.
    pub(crate) fn complete(&mut self, measured: bool) {
        self.completed_total += 1;
        self.completed += u64::from(measured);
    }

    /// Counts bytes that moved.
    pub(crate) fn moved(&mut self, sent: usize, received: usize, measured: bool) {
        let (sent, received) = (sent as u64, received as u64);
        self.sent_total += sent;
        self.received_total += received;
        if measured {
            self.sent += sent;
            self.received += received;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_keep_three_digits() {
        let mut latency = Latency::new();
        for us in 1..=10_000 {
            latency.record(us * 1000);
        }
        for (quantile, expected) in [(0.5, 5000.0), (0.9, 9000.0), (0.99, 9900.0)] {
            let value = latency.quantile_us(quantile);
            assert!(
                (value - expected).abs() / expected < 1.5e-3,
                "{quantile}: {value}"
            );
        }
        assert!(latency.supports(0.99) && !latency.supports(0.999));
    }

    #[test]
    fn an_even_span_is_counted_evenly_and_whole() {
        for count in [0, 1, 5, 1024, 5000, 10_000_000_000] {
            let mut latency = Latency::new();
            latency.record_even(1_000_000, 3_000_000, count);
            assert_eq!(latency.count(), count);
            if count > 1000 {
                for (quantile, us) in [(0.001, 1002.0), (0.5, 2000.0), (0.999, 2998.0)] {
                    let value = latency.quantile_us(quantile);
                    assert!(
                        (value / us - 1.0).abs() < 5e-3,
                        "{count} {quantile} {value}"
                    );
                }
            }
        }
    }

    #[test]
    fn values_outside_the_range_are_kept_at_its_ends() {
        let mut latency = Latency::new();
        latency.record(0);
        latency.record(u64::MAX);
        assert_eq!(latency.count(), 2);
        assert!(
            (59e6..61e6).contains(&latency.max_us()),
            "{}",
            latency.max_us()
        );
    }

    #[test]
    fn the_spectrum_ends_where_samples_are_few() {
        let mut latency = Latency::new();
        for us in 1..=10_000 {
            latency.record(us * 1000);
        }
        let spectrum = latency.spectrum();
        let (quantile, value) = spectrum[spectrum.len() - 1];
        assert!((quantile - 0.999).abs() < 1e-9, "{quantile}");
        assert!((9980.0..10_010.0).contains(&value), "{value}");
        assert!(spectrum.is_sorted());
        assert!(Latency::new().spectrum().is_empty());
    }

    #[test]
    fn the_text_form_counts_every_sample_and_ends_at_one() {
        let mut latency = Latency::new();
        for ns in 1..5000 {
            latency.record(ns);
        }
        let text = latency.hgrm();
        let rows: Vec<&str> = text
            .lines()
            .skip(2)
            .filter(|line| !line.starts_with('#'))
            .collect();
        let last: Vec<&str> = rows[rows.len() - 1].split_whitespace().collect();
        assert_eq!(last[1], "1.000000000000");
        assert_eq!(last[2], "4999");
        assert!(text.contains("Total count    =         4999"), "{text}");
    }

    #[test]
    fn the_encoded_form_is_read_back_by_the_library() {
        use hdrhistogram::serialization::Deserializer;
        let mut latency = Latency::new();
        latency.record(123_456);
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(latency.encode())
            .unwrap();
        let back: Histogram<u64> = Deserializer::new()
            .deserialize(&mut bytes.as_slice())
            .unwrap();
        assert_eq!(back.len(), 1);
        assert!(back.equivalent(back.max(), 123_456));
    }
}
