//! The process log: `tracing` events in Istio's format, into the same sink as the access log, and
//! the filter that decides what is logged and may change while the process runs.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry, reload};

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::access::{AccessLevel, AccessLog, TARGET};
use crate::line::{Line, LineBuffer};
use crate::sink::{LogQueue, LogSink};
use crate::text::{LogFormat, append_bare, infallible};

/// What is logged when `RUST_LOG` does not say.
pub const FILTER_DEFAULT: &str = "hickory_server::server=off,info";

/// Longest filter accepted, in bytes; it may come from a request and is kept.
const FILTER_LEN_MAX: usize = 4096;

/// Why logging is not set up, or its filter not changed.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// A part of the filter is not understood.
    #[error(
        "log filter `{0}` must be a level or target=level, several separated by commas, with the \
         level one of off, error, warn, info, debug, trace"
    )]
    Filter(String),
    /// The filter is too long.
    #[error("log filter of {0} bytes is longer than {FILTER_LEN_MAX} bytes")]
    FilterLength(usize),
    /// `LOG_FORMAT` has another value.
    #[error("LOG_FORMAT `{0}` must be `plain` or `json`")]
    Format(String),
    /// A subscriber is there already.
    #[error("logging is set up already in this process")]
    Installed,
    /// The subscriber is gone.
    #[error("log filter not changed: logging has been shut down")]
    Gone,
    /// The thread that writes the log did not start.
    #[error("log writer thread not started: {0}")]
    Thread(#[from] std::io::Error),
}

impl LogFormat {
    /// The format that `LOG_FORMAT` asks for; plain if it is not set.
    ///
    /// # Errors
    /// It is neither `plain` nor `json`.
    pub fn from_setting(setting: Option<&str>) -> Result<Self, LoggingError> {
        match setting.unwrap_or("plain") {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            other => Err(LoggingError::Format(other.to_owned())),
        }
    }
}

/// The process's logging: its sink and its filter. Clones share both.
#[derive(Clone, Debug)]
pub struct Logging {
    sink: LogSink,
    access_level: AccessLevel,
    handle: reload::Handle<Targets, Registry>,
    initial: Arc<str>,
    /// What the filter was made from last.
    current: Arc<Mutex<String>>,
}

impl Logging {
    /// Makes logging to `sink` and a subscriber for it. `filter` is what `RUST_LOG` says.
    ///
    /// # Errors
    /// The filter is not understood.
    pub fn new(
        sink: LogSink,
        filter: Option<&str>,
    ) -> Result<(Self, impl Subscriber + Send + Sync), LoggingError> {
        let filter = filter.unwrap_or(FILTER_DEFAULT);
        let targets = parse(filter)?;
        let access_level = AccessLevel::new(access_level(&targets));
        let layer = ProcessLog {
            queue: Arc::clone(sink.process_queue()),
            format: sink.format(),
        };
        let (reloadable, handle) = reload::Layer::new(targets);
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(reloadable));
        let logging = Self {
            sink,
            access_level,
            handle,
            initial: filter.into(),
            current: Arc::new(Mutex::new(filter.to_owned())),
        };
        Ok((logging, subscriber))
    }

    /// Makes logging to standard output and installs it for the whole process.
    ///
    /// `filter` is what `RUST_LOG` says, `format` what `LOG_FORMAT` says.
    ///
    /// # Errors
    /// Either is not understood, the writer thread does not start, or logging is installed.
    pub fn install(filter: Option<&str>, format: Option<&str>) -> Result<Self, LoggingError> {
        parse(filter.unwrap_or(FILTER_DEFAULT))?;
        let sink = LogSink::stdout(LogFormat::from_setting(format)?)?;
        let (logging, subscriber) = Self::new(sink, filter)?;
        tracing::subscriber::set_global_default(subscriber)
            .map_err(|_installed| LoggingError::Installed)?;
        Ok(logging)
    }

    /// The access log of one more worker.
    pub fn access_log(&self) -> AccessLog {
        AccessLog::new(&self.sink, self.access_level.clone())
    }

    /// Where lines go.
    pub fn sink(&self) -> &LogSink {
        &self.sink
    }

    /// The filter in force.
    pub fn current(&self) -> String {
        self.handle
            .with_current(ToString::to_string)
            .unwrap_or_default()
    }

    /// Puts `directives` on top of the filter in force, or with `reset` of the initial one.
    /// Returns the filter in force then.
    ///
    /// # Errors
    /// The directives are not understood; nothing has changed then.
    pub fn change(&self, reset: bool, directives: &str) -> Result<String, LoggingError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        parse_if_any(directives)?;
        let base = if reset {
            &*self.initial
        } else {
            current.as_str()
        };
        let wanted = match directives {
            "" => base.to_owned(),
            _ => format!("{base},{directives}"),
        };
        let targets = parse(&wanted)?;
        self.access_level.set(access_level(&targets));
        // What it displays has every target once, so it does not grow with every change.
        *current = targets.to_string();
        self.handle
            .reload(targets)
            .map_err(|_gone| LoggingError::Gone)?;
        Ok(current.clone())
    }
}

/// The most verbose level at which `targets` let access log lines through.
fn access_level(targets: &Targets) -> LevelFilter {
    [
        Level::TRACE,
        Level::DEBUG,
        Level::INFO,
        Level::WARN,
        Level::ERROR,
    ]
    .into_iter()
    .find(|level| targets.would_enable(TARGET, level))
    .map_or(LevelFilter::OFF, LevelFilter::from_level)
}

fn parse_if_any(directives: &str) -> Result<(), LoggingError> {
    if directives.is_empty() {
        Ok(())
    } else {
        parse(directives).map(drop)
    }
}

fn parse(filter: &str) -> Result<Targets, LoggingError> {
    if filter.len() > FILTER_LEN_MAX {
        return Err(LoggingError::FilterLength(filter.len()));
    }
    let error = || LoggingError::Filter(filter.to_owned());
    for directive in filter.split(',').map(str::trim) {
        // A bare word that is no level would be taken for a target to log everything of.
        let level = directive
            .rsplit_once('=')
            .map_or(directive, |(_, level)| level);
        level.parse::<LevelFilter>().map_err(|_| error())?;
        if level.is_empty() || level.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(error());
        }
    }
    filter.parse().map_err(|_| error())
}

/// Writes events to the sink's shared queue.
struct ProcessLog {
    queue: Arc<LogQueue>,
    format: LogFormat,
}

/// A span's fields, as text.
struct SpanFields(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for ProcessLog {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = String::new();
            attributes.record(&mut SpanVisitor(&mut fields));
            span.extensions_mut().insert(SpanFields(fields));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<SpanFields>()
        {
            values.record(&mut SpanVisitor(&mut fields.0));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        thread_local! {
            static LINE: RefCell<LineBuffer> = RefCell::default();
        }
        let target = event.metadata().target();
        let mut scope = target
            .strip_prefix("ztunnel::")
            .unwrap_or(target)
            .to_owned();
        for span in context
            .event_scope(event)
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            scope.push(':');
            scope.push_str(span.name());
            if let Some(fields) = span.extensions().get::<SpanFields>()
                && !fields.0.is_empty()
            {
                infallible(fmt::write(&mut scope, format_args!("{{{}}}", fields.0)));
            }
        }
        let mut message = MessageVisitor::default();
        event.record(&mut message);
        let level = *event.metadata().level();
        LINE.with(|buffer| {
            // A value that logs while it is being formatted would come back here: it is left out.
            let Ok(mut buffer) = buffer.try_borrow_mut() else {
                return;
            };
            let (scope, message) = (format_args!("{scope}"), format_args!("{}", message.0));
            let mut line = buffer.start(self.format, SystemTime::now(), level, scope, message);
            event.record(&mut FieldVisitor(&mut line));
            // A full queue has counted it.
            let _queued = self.queue.push_shared(line.finish());
        });
    }
}

/// Finds the message among an event's fields.
#[derive(Default)]
struct MessageVisitor(String);

impl Visit for MessageVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            infallible(fmt::write(&mut self.0, format_args!("{value:?}")));
        }
    }
}

/// Writes the fields that are not the message.
struct FieldVisitor<'a, 'b>(&'a mut Line<'b>);

impl FieldVisitor<'_, '_> {
    fn literal(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        self.0.literal(field.name(), value);
    }
}

impl Visit for FieldVisitor<'_, '_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != "message" {
            self.0.string(field.name(), value);
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.literal(field, format_args!("{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.literal(field, format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.literal(field, format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.0.bare(field.name(), &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // `log.*` is what the bridge from the `log` crate says about itself.
        if field.name() != "message" && !field.name().starts_with("log.") {
            self.0.bare(field.name(), &format_args!("{value:?}"));
        }
    }
}

/// Writes a span's fields as `k=v k=v`.
struct SpanVisitor<'a>(&'a mut String);

impl Visit for SpanVisitor<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        self.0.push_str(field.name());
        self.0.push('=');
        append_bare(self.0, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::TestOutput;
    use std::time::Duration;

    fn logging(format: LogFormat, filter: Option<&str>) -> (Logging, impl Subscriber, TestOutput) {
        let output = TestOutput::default();
        let sink = LogSink::new(format, 1 << 20, output.clone()).unwrap();
        let (logging, subscriber) = Logging::new(sink, filter).unwrap();
        (logging, subscriber, output)
    }

    /// The lines without their time stamps.
    fn lines(logging: &Logging, output: &TestOutput) -> Vec<String> {
        assert!(logging.sink().flush(Duration::from_secs(20)));
        output
            .text()
            .lines()
            .map(|line| line[27..].to_owned())
            .collect()
    }

    #[test]
    fn plain_lines_are_as_upstream_writes_them() {
        let (logging, subscriber, output) = logging(LogFormat::Plain, None);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "ztunnel::proxy", "marking server ready");
            let span = tracing::info_span!("xds", id = 7, peer = tracing::field::Empty);
            let _entered = span.enter();
            span.record("peer", "a\nb");
            let address: std::net::SocketAddr = "10.0.0.1:80".parse().unwrap();
            let (port, name) = (15_008_u16, "web \"1\"");
            tracing::warn!(target: "xds::client", %address, port, name, ok = true, "lost");
            tracing::debug!("not at this level");
        });
        assert_eq!(
            lines(&logging, &output),
            [
                "\tinfo\tproxy\tmarking server ready\t",
                "\twarn\txds::client:xds{id=7 peer=\"a\\nb\"}\tlost\t\
                 address=10.0.0.1:80 port=15008 name=\"web \\\"1\\\"\" ok=true",
            ]
        );
        assert!(output.text().starts_with("20"));
    }

    #[test]
    fn json_lines_have_istio_keys_in_order() {
        let (logging, subscriber, output) = logging(LogFormat::Json, None);
        tracing::subscriber::with_default(subscriber, || {
            let error = std::io::Error::other("no \"way\"");
            let error: &dyn std::error::Error = &error;
            tracing::error!(target: "proxy", error, n = -3_i64, "two\nlines");
        });
        assert!(logging.sink().flush(Duration::from_secs(20)));
        let text = output.text();
        let start = "{\"level\":\"error\",\"time\":\"";
        let end = "\",\"scope\":\"proxy\",\"message\":\"two\\nlines\",\
                   \"error\":\"no \\\"way\\\"\",\"n\":-3}\n";
        assert!(text.starts_with(start) && text.ends_with(end), "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["time"].as_str().unwrap().len(), 27);
    }

    #[test]
    fn the_filter_changes_while_running() {
        let (logging, subscriber, output) = logging(LogFormat::Plain, None);
        let say = |what: &str| tracing::debug!(target: "some", "{what}");
        tracing::subscriber::with_default(subscriber, || {
            assert_eq!(logging.current(), FILTER_DEFAULT);
            say("hidden");
            let changed = logging.change(false, "debug").unwrap();
            assert_eq!(changed, "hickory_server::server=off,debug");
            say("shown");
            let changed = logging.change(true, "access=debug,info").unwrap();
            assert_eq!(changed, "hickory_server::server=off,access=debug,info");
            say("hidden again");
            let changed = logging.change(false, "some=trace").unwrap();
            assert!(changed.contains("some=trace") && changed.contains("access=debug"));
            say("shown again");
            assert_eq!(logging.change(true, "").unwrap(), FILTER_DEFAULT);
            say("hidden for good");
        });
        assert_eq!(
            lines(&logging, &output),
            ["\tdebug\tsome\tshown\t", "\tdebug\tsome\tshown again\t"]
        );
    }

    #[test]
    fn a_filter_that_is_none_is_refused_and_changes_nothing() {
        let (logging, subscriber, _output) = logging(LogFormat::Plain, Some("warn"));
        tracing::subscriber::with_default(subscriber, || {
            for bad in [
                "verbose",
                "a=b=c",
                "=",
                "info,",
                "access=9",
                "info,access",
                "a=",
                "3",
            ] {
                let error = logging.change(false, bad).unwrap_err();
                assert!(matches!(error, LoggingError::Filter(_)), "{bad}: {error}");
                assert!(!error.to_string().contains('\n'));
            }
            let long = "a".repeat(5000) + "=info";
            assert!(matches!(
                logging.change(false, &long),
                Err(LoggingError::FilterLength(5005))
            ));
            assert_eq!(logging.current(), "warn");
        });
        assert!(matches!(
            LogFormat::from_setting(Some("xml")),
            Err(LoggingError::Format(_))
        ));
        assert_eq!(LogFormat::from_setting(None).unwrap(), LogFormat::Plain);
        assert_eq!(
            LogFormat::from_setting(Some("json")).unwrap(),
            LogFormat::Json
        );
    }

    #[test]
    fn the_access_level_follows_the_filter() {
        let cases = [
            (FILTER_DEFAULT, LevelFilter::INFO),
            ("off", LevelFilter::OFF),
            ("access=debug,warn", LevelFilter::DEBUG),
            ("access=off,info", LevelFilter::OFF),
            ("error", LevelFilter::ERROR),
            ("other=trace", LevelFilter::OFF),
        ];
        for (filter, level) in cases {
            assert_eq!(access_level(&parse(filter).unwrap()), level, "{filter}");
        }
    }
}
