//! Figures as people read them.

/// A figure of `metric` with its unit, three significant digits; `n/a` if there is none.
#[must_use]
pub fn with_unit(metric: &str, value: Option<f64>) -> String {
    let Some(value) = value.filter(|value| value.is_finite()) else {
        return "n/a".to_owned();
    };
    match metric {
        "requests_per_s" => format!("{} req/s", scaled(value)),
        "connections_per_s" => format!("{} conn/s", scaled(value)),
        "bytes_per_s" => format!("{}B/s", scaled_apart(value)),
        "ztunnel_rss_bytes" => format!("{}B", scaled_apart(value)),
        "machine_busy_share" | "skipped_share" => format!("{:.0} %", value * 100.0),
        name if name.ends_with("_us") => latency(value),
        name if name.contains("_us_per_") => format!("{} us", digits(value)),
        name if name.ends_with("_s_per_gb") => format!("{} s/GB", digits(value)),
        _ => digits(value),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_metric_reads_well() {
        let cases = [
            ("requests_per_s", 12_345.0, "12.3k req/s"),
            ("bytes_per_s", 1.214e9, "1.21 GB/s"),
            ("p50_us", 85.21, "85.2 us"),
            ("p99_us", 12_345.0, "12.3 ms"),
            ("ztunnel_cpu_us_per_request", 9.876, "9.88 us"),
            ("ztunnel_cpu_s_per_gb", 0.4123, "0.41 s/GB"),
            ("ztunnel_rss_bytes", 45.6e6, "45.6 MB"),
            ("machine_busy_share", 0.934, "93 %"),
            ("errors", 0.0, "0"),
        ];
        for (metric, value, text) in cases {
            assert_eq!(with_unit(metric, Some(value)), text);
        }
        assert_eq!(with_unit("p999_us", None), "n/a");
        assert_eq!(with_unit("p50_us", Some(f64::NAN)), "n/a");
    }
}
