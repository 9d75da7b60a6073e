//! Results: the JSON file, the `.hgrm` text and the summary on the terminal.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::Path;

use serde_json::{Value, json};

use crate::error::Error;
use crate::stats::Latency;
use crate::worker::{Client, Outcome};

/// Version of the JSON layout; grows when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

const QUANTILES: [(f64, &str); 4] = [(0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p999")];

/// What a workload says of itself in a report. Implemented by the workloads' options.
pub(crate) trait Description {
    /// Its command.
    const COMMAND: &'static str;

    /// The settings that all workloads have.
    fn client(&self) -> &Client;

    /// Adds its own settings, and its figures.
    fn describe(&self, outcome: &Outcome, report: &mut Report);
}

/// What a client command measured.
#[derive(Clone, Debug)]
pub struct Report {
    command: &'static str,
    loop_kind: &'static str,
    workload: Value,
    metrics: BTreeMap<String, f64>,
    ok: u64,
    errors: BTreeMap<&'static str, u64>,
    saturated: bool,
    skipped: u64,
    interrupted: bool,
    measured_s: f64,
    /// Connections that were made, as far as they are told apart from requests.
    established: u64,
    /// Bytes sent and received in the whole run.
    bytes_total: u64,
    latency: Option<Latency>,
    service: Option<Latency>,
    generator_cpu_s: f64,
    /// What the generator itself costs: for the document, and in a line.
    floor: Option<(Value, String)>,
    search: Option<Value>,
}

impl Report {
    /// Requests, connections or streams that succeeded.
    #[must_use]
    pub fn ok(&self) -> u64 {
        self.ok
    }

    /// Failures by kind name, see [`crate::outcome::Kind`].
    #[must_use]
    pub fn errors_by_kind(&self) -> &BTreeMap<&'static str, u64> {
        &self.errors
    }

    /// Why nothing succeeded and what to look at, for a run of which that is true.
    #[must_use]
    pub fn nothing_succeeded(&self) -> String {
        let kinds: Vec<&str> = self.errors.keys().copied().collect();
        let kinds = match kinds.is_empty() {
            true => "nothing finished in time".to_owned(),
            false => kinds.join(", "),
        };
        if self.established == 0 {
            return format!("nothing succeeded ({kinds}); is the server listening there?");
        }
        let moved = self.bytes_total;
        format!(
            "nothing succeeded ({kinds}), although {} connections stood and {moved} bytes moved; \
             does the server answer and close, as `loadgen serve` does?",
            self.established
        )
    }

    /// One of the metrics of the JSON output.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metrics.get(name).copied()
    }

    /// Whether the generator or the server could not keep the set rate.
    #[must_use]
    pub fn saturated(&self) -> bool {
        self.saturated
    }

    /// Requests of the schedule that were never sent.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// CPU time of this process per request of the whole run, in µs.
    #[must_use]
    pub fn generator_cpu_us_per_request(&self) -> Option<f64> {
        let requests = self.metric("requests_total").filter(|&n| n > 0.0)?;
        Some(self.generator_cpu_s * 1e6 / requests)
    }

    /// Adds what the generator itself costs: for the document, and in a line.
    pub(crate) fn set_floor(&mut self, document: Value, line: String) {
        self.floor = Some((document, line));
    }

    /// Adds the steps of a search and the rate it found.
    pub(crate) fn set_search(&mut self, objective: &str, found: Option<f64>, steps: &[Value]) {
        if let Some(rate) = found {
            self.set("max_sustainable_per_s", rate);
        }
        self.search = Some(json!({"objective": objective, "found_per_s": found, "steps": steps}));
    }

    /// The JSON document.
    #[must_use]
    pub fn json(&self) -> Value {
        let errors: u64 = self.errors.values().sum();
        let mut document = json!({
            "schema": SCHEMA,
            "tool": {"name": "loadgen", "version": env!("CARGO_PKG_VERSION")},
            "command": self.command,
            "loop": self.loop_kind,
            "workload": self.workload,
            "metrics": self.metrics,
            "outcomes": {"ok": self.ok, "errors": errors, "errors_by_kind": self.errors},
            "saturated": self.saturated,
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "measured_s": self.measured_s,
            "generator": {"cpu_s": self.generator_cpu_s},
        });
        if let Some((floor, _)) = &self.floor {
            document["generator"]["calibration"] = floor.clone();
        }
        if let Some(search) = &self.search {
            document["search"] = search.clone();
        }
        for (name, latency) in [
            ("histogram", &self.latency),
            ("service_histogram", &self.service),
        ] {
            if let Some(latency) = latency {
                document[name] = json!({
                    "unit": "ns",
                    "encoding": "hdr-v2-deflate-base64",
                    "data": latency.encode(),
                });
            }
        }
        if let Some(latency) = &self.latency {
            document["spectrum_us"] = json!(latency.spectrum());
        }
        document
    }

    /// Writes the JSON document.
    ///
    /// # Errors
    ///
    /// [`Error::Output`] naming the file.
    pub fn write_json(&self, path: &Path) -> Result<(), Error> {
        write(path, &format!("{:#}\n", self.json()))
    }

    /// Writes the percentile distribution for HdrHistogram plotters, values in µs.
    ///
    /// # Errors
    ///
    /// [`Error::Output`] naming the file.
    pub fn write_hgrm(&self, path: &Path) -> Result<(), Error> {
        write(
            path,
            &self.latency.as_ref().map(Latency::hgrm).unwrap_or_default(),
        )
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(|source| Error::Output {
        path: path.to_owned(),
        source,
    })
}

impl fmt::Display for Report {
    /// The summary on the terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loop_kind = match self.loop_kind {
            "" => String::new(),
            kind => format!(", {kind} loop"),
        };
        writeln!(
            f,
            "{}{loop_kind}, {:.1} s measured",
            self.command, self.measured_s
        )?;
        for (name, unit) in [
            ("requests_per_s", "requests/s"),
            ("connections_per_s", "connections/s"),
            ("held", "connections held to the end"),
        ] {
            if let Some(value) = self.metric(name) {
                writeln!(f, "  {value:>12.0} {unit}")?;
            }
        }
        for (name, unit) in [
            ("bytes_per_s", "MB/s"),
            ("bytes_up_per_s", "MB/s up"),
            ("bytes_down_per_s", "MB/s down"),
        ] {
            if let Some(value) = self.metric(name) {
                writeln!(f, "  {:>12.1} {unit}", value / 1e6)?;
            }
        }
        if let Some(latency) = self.latency.as_ref().filter(|latency| latency.count() > 0) {
            write_latencies(f, latency, self.service.as_ref())?;
        }
        let errors: u64 = self.errors.values().sum();
        writeln!(f, "  {:>12} ok, {errors} failed", self.ok)?;
        for (kind, count) in &self.errors {
            writeln!(f, "  {count:>12} {kind}")?;
        }
        if let Some(unfinished) = self.metric("unfinished").filter(|&n| n > 0.0) {
            let what = "never finished, in the latencies with their age";
            writeln!(f, "  {unfinished:>12.0} {what}")?;
        }
        if self.loop_kind == "open" {
            writeln!(f, "  {:>12} skipped (due, never sent)", self.skipped)?;
        }
        if self.saturated {
            f.write_str("  SATURATED: the set rate was not reached")?;
            writeln!(f, "; latencies grow with the length of the run")?;
        }
        if let Some(search) = &self.search {
            let objective = search["objective"].as_str().unwrap_or_default();
            match self.metric("max_sustainable_per_s") {
                Some(rate) => writeln!(f, "  {rate:>12.0} requests/s sustained at {objective}")?,
                None => writeln!(f, "  no rate was sustained at {objective}")?,
            }
        }
        if let Some((_, floor)) = &self.floor {
            writeln!(f, "  {floor}")?;
        }
        if self.interrupted {
            writeln!(f, "  interrupted: results up to then")?;
        }
        Ok(())
    }
}

fn write_latencies(
    f: &mut fmt::Formatter<'_>,
    latency: &Latency,
    service: Option<&Latency>,
) -> fmt::Result {
    let cell = |l: &Latency, quantile: f64| match l.supports(quantile) {
        true => format!("{:>11.1}", l.quantile_us(quantile)),
        false => format!("{:>11}", "n/a"),
    };
    match service {
        None => writeln!(f, "  latency, us")?,
        Some(_) => writeln!(
            f,
            "  latency, us   from the intended send time, from the actual one"
        )?,
    }
    let mut line = |name: &str, value: &dyn Fn(&Latency) -> String| {
        let mut text = format!("  {name:>8} {}", value(latency));
        if let Some(service) = service {
            let _ = write!(text, " {}", value(service));
        }
        writeln!(f, "{text}")
    };
    line("min", &|l| format!("{:>11.1}", l.min_us()))?;
    for (quantile, name) in [
        (0.5, "50 %"),
        (0.75, "75 %"),
        (0.9, "90 %"),
        (0.99, "99 %"),
        (0.999, "99.9 %"),
        (0.9999, "99.99 %"),
    ] {
        line(name, &|l| cell(l, quantile))?;
    }
    line("max", &|l| format!("{:>11.1}", l.max_us()))?;
    line("mean", &|l| format!("{:>11.1}", l.mean_us()))?;
    line("sd", &|l| format!("{:>11.1}", l.sd_us()))
}

/// The part of the workload every command has.
fn workload(client: &Client) -> Value {
    json!({
        "to": client.to.to_string(),
        "bind": client.bind.map(|ip| ip.to_string()),
        "connections": client.connections,
        "duration_s": client.duration.as_secs_f64(),
        "warmup_s": client.warmup.as_secs_f64(),
        "threads": client.thread_count(),
        "cpus": client.cpus,
    })
}

impl Report {
    /// The report of a run with `options`.
    pub(crate) fn of<D: Description>(options: &D, outcome: &Outcome) -> Self {
        let tally = &outcome.tally;
        let mut report = Self {
            command: D::COMMAND,
            loop_kind: "",
            workload: workload(options.client()),
            metrics: BTreeMap::new(),
            ok: tally.ok,
            errors: tally.failures.by_kind(),
            saturated: false,
            skipped: tally.skipped,
            interrupted: outcome.interrupted,
            measured_s: outcome.measured_s,
            established: tally.connected,
            bytes_total: tally.sent_total + tally.received_total,
            latency: None,
            service: None,
            generator_cpu_s: outcome.cpu_s,
            floor: None,
            search: None,
        };
        options.describe(outcome, &mut report);
        report
    }

    /// Says which loop it was: `closed` or `open`.
    pub(crate) fn set_loop(&mut self, kind: &'static str) {
        self.loop_kind = kind;
    }

    /// Says that a set rate was not kept.
    pub(crate) fn set_saturated(&mut self, saturated: bool) {
        self.saturated = saturated;
    }

    /// Adds a setting of the workload.
    pub(crate) fn set_setting(&mut self, name: &str, value: impl Into<Value>) {
        self.workload[name] = value.into();
    }

    /// Sets what histogram and spectrum are of.
    pub(crate) fn set_distribution(&mut self, latency: &Latency) {
        self.latency = Some(latency.clone());
    }

    /// The same of latencies from when requests were sent.
    pub(crate) fn set_service_distribution(&mut self, service: &Latency) {
        self.service = Some(service.clone());
    }

    /// Sets a metric.
    pub(crate) fn set(&mut self, name: &str, value: f64) {
        self.metrics.insert(name.to_owned(), value);
    }

    /// Sets a rate over the measured window; 0 if the window was interrupted before it began.
    pub(crate) fn set_rate(&mut self, name: &str, count: u64) {
        let rate = if self.measured_s > 0.0 {
            count as f64 / self.measured_s
        } else {
            0.0
        };
        self.set(name, rate);
    }

    /// Sets the latency metrics, their names beginning with `prefix`.
    pub(crate) fn set_latency(&mut self, prefix: &str, latency: &Latency) {
        if latency.count() == 0 {
            return;
        }
        for (quantile, name) in QUANTILES {
            self.set(&format!("{prefix}{name}_us"), latency.quantile_us(quantile));
        }
        self.set(&format!("{prefix}min_us"), latency.min_us());
        self.set(&format!("{prefix}max_us"), latency.max_us());
        self.set(&format!("{prefix}mean_us"), latency.mean_us());
        self.set(&format!("{prefix}sd_us"), latency.sd_us());
        self.set(&format!("{prefix}count"), latency.count() as f64);
    }
}
