//! The two text formats of metrics: Prometheus 0.0.4 and OpenMetrics 1.0.
//!
//! `prometheus-client` writes OpenMetrics only, and would take the 27 labels of every sample apart
//! again at every scrape; here they are text from the moment the label set is first seen.

use std::fmt::Write as _;

/// Which of the two text formats to write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exposition {
    /// Prometheus' classic text format, 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Exposition {
    /// What a scraper's `Accept` header asks for: OpenMetrics if it is named and not refused with
    /// `q=0`, text otherwise. Prometheus sends its preferred format first with the highest weight,
    /// and both formats carry the same data, so weights are not compared.
    pub fn from_accept(accept: &str) -> Self {
        let named = accept.split(',').any(|range| {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default();
            let refused = parts.any(|p| matches!(p, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"));
            kind.eq_ignore_ascii_case("application/openmetrics-text") && !refused
        });
        if named { Self::OpenMetrics } else { Self::Text }
    }

    /// The `Content-Type` of this format.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What a metric counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MetricKind {
    /// Only ever grows; the name ends in `_total`.
    Counter,
    /// May go up and down.
    Gauge,
}

/// Writes families into one page.
#[derive(Debug)]
pub struct Page {
    text: String,
    exposition: Exposition,
}

impl Page {
    /// An empty one.
    pub fn new(exposition: Exposition) -> Self {
        Self {
            text: String::with_capacity(16 << 10),
            exposition,
        }
    }

    /// Starts a family; its samples follow.
    pub fn family(&mut self, name: &str, help: &str, kind: MetricKind) {
        let (family, kind) = match (kind, self.exposition) {
            (MetricKind::Counter, Exposition::OpenMetrics) => {
                (name.strip_suffix("_total").unwrap_or(name), "counter")
            }
            (MetricKind::Counter, Exposition::Text) => (name, "counter"),
            (MetricKind::Gauge, _) => (name, "gauge"),
        };
        let _ = write!(self.text, "# HELP {family} "); // a String takes everything
        append_escaped(
            &mut self.text,
            help,
            self.exposition == Exposition::OpenMetrics,
        );
        let _ = write!(self.text, "\n# TYPE {family} {kind}\n"); // a String takes everything
    }

    /// One sample; `labels` is what [`append_label`] made, without braces.
    pub fn sample(&mut self, name: &str, labels: &str, value: u64) {
        self.text.push_str(name);
        if !labels.is_empty() {
            self.text.push('{');
            self.text.push_str(labels);
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}"); // a String takes everything
    }

    /// All of it.
    pub fn finish(mut self) -> String {
        if self.exposition == Exposition::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }
}

/// Appends `name="value"`, with a comma before it unless it is the first.
pub fn append_label(out: &mut String, name: &str, value: &str) {
    if !out.is_empty() {
        out.push(',');
    }
    out.push_str(name);
    out.push_str("=\"");
    append_escaped(out, value, true);
    out.push('"');
}

/// Labels for [`Page::sample`], which need not be known before.
pub fn labels(pairs: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        append_label(&mut text, name, value);
    }
    text
}

/// Escapes what both formats escape: backslash, line feed and, where asked, the quote.
fn append_escaped(out: &mut String, value: &str, quote: bool) {
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quote => out.push_str("\\\""),
            c => out.push(c),
        }
    }
}

/// Whether `name` is a metric name: `[a-zA-Z_:][a-zA-Z0-9_:]*`.
pub fn is_metric_name(name: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    name.starts_with(|c: char| valid(c) && !c.is_ascii_digit()) && name.chars().all(valid)
}

/// Whether `name` is a label name: `[a-zA-Z_][a-zA-Z0-9_]*`, and not reserved.
pub fn is_label_name(name: &str) -> bool {
    is_metric_name(name) && !name.contains(':') && !name.starts_with("__")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_decides_the_format() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.4";
        let cases = [
            (prometheus, Exposition::OpenMetrics),
            ("text/plain;version=0.0.4", Exposition::Text),
            (
                "application/openmetrics-text; q=0, text/plain",
                Exposition::Text,
            ),
            ("*/*", Exposition::Text),
            ("", Exposition::Text),
            ("Application/OpenMetrics-Text", Exposition::OpenMetrics),
        ];
        for (accept, expected) in cases {
            assert_eq!(Exposition::from_accept(accept), expected, "{accept}");
        }
    }

    #[test]
    fn pages_differ_as_the_formats_do() {
        let page = |exposition| {
            let mut page = Page::new(exposition);
            page.family("a_total", "help \"with\" \\ and\nmore", MetricKind::Counter);
            let mut labels = String::new();
            append_label(&mut labels, "x", "q\"b\\n\nend");
            append_label(&mut labels, "y", "");
            page.sample("a_total", &labels, u64::MAX);
            page.family("b", "b", MetricKind::Gauge);
            page.sample("b", "", 0);
            page.finish()
        };
        let labels = r#"{x="q\"b\\n\nend",y=""}"#;
        assert_eq!(
            page(Exposition::Text),
            format!(
                "# HELP a_total help \"with\" \\\\ and\\nmore\n# TYPE a_total counter\n\
                 a_total{labels} 18446744073709551615\n# HELP b b\n# TYPE b gauge\nb 0\n"
            )
        );
        assert_eq!(
            page(Exposition::OpenMetrics),
            format!(
                "# HELP a help \\\"with\\\" \\\\ and\\nmore\n# TYPE a counter\n\
                 a_total{labels} 18446744073709551615\n# HELP b b\n# TYPE b gauge\nb 0\n# EOF\n"
            )
        );
    }

    #[test]
    fn names_are_checked() {
        for good in ["a", "_a9", "a:b", "ztunnel_worker_x_total"] {
            assert!(is_metric_name(good), "{good}");
        }
        for bad in ["", "9a", "a-b", "a b", "é"] {
            assert!(!is_metric_name(bad), "{bad}");
        }
        assert!(is_label_name("worker") && !is_label_name("__name__") && !is_label_name("a:b"));
    }
}
