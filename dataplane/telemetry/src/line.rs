//! One log line: the columns, then the fields, plain or as JSON.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use tracing::Level;

use crate::text::{
    LogFormat, Timestamps, append_address, append_bare, append_digits, append_json_string,
    append_quoted, infallible,
};

/// Builds lines in buffers that are reused from line to line.
#[derive(Debug, Default)]
pub(crate) struct LineBuffer {
    text: String,
    scratch: String,
    stamps: Timestamps,
}

impl LineBuffer {
    /// Starts a line. `scope` is the target, with spans after it where there are any.
    pub(crate) fn start(
        &mut self,
        format: LogFormat,
        now: SystemTime,
        level: Level,
        scope: fmt::Arguments<'_>,
        message: fmt::Arguments<'_>,
    ) -> Line<'_> {
        let Self {
            text,
            scratch,
            stamps,
        } = self;
        text.clear();
        match format {
            LogFormat::Plain => {
                stamps.append(text, now);
                text.push('\t');
                text.push_str(level_name(level));
                text.push('\t');
                append_display(text, scratch, &scope, append_bare);
                text.push('\t');
                append_display(text, scratch, &message, append_bare);
                text.push('\t');
            }
            LogFormat::Json => {
                text.push_str("{\"level\":\"");
                text.push_str(level_name(level));
                text.push_str("\",\"time\":\"");
                stamps.append(text, now);
                text.push_str("\",\"scope\":");
                append_display(text, scratch, &scope, append_json_string);
                text.push_str(",\"message\":");
                append_display(text, scratch, &message, append_json_string);
            }
        }
        Line {
            text,
            scratch,
            format,
            first: true,
        }
    }
}

/// A line under construction.
pub(crate) struct Line<'a> {
    text: &'a mut String,
    scratch: &'a mut String,
    format: LogFormat,
    first: bool,
}

impl<'a> Line<'a> {
    /// `key="value"`.
    pub(crate) fn string(&mut self, key: &str, value: &str) {
        self.key(key);
        match self.format {
            LogFormat::Plain => append_quoted(self.text, value),
            LogFormat::Json => append_json_string(self.text, value),
        }
    }

    /// `key="value"` of what `value` displays.
    pub(crate) fn quoted(&mut self, key: &str, value: &dyn fmt::Display) {
        self.key(key);
        match self.format {
            LogFormat::Plain => append_display(self.text, self.scratch, value, append_quoted),
            LogFormat::Json => append_display(self.text, self.scratch, value, append_json_string),
        }
    }

    /// `key=value`, without quotes when plain. A string in JSON.
    pub(crate) fn bare(&mut self, key: &str, value: &dyn fmt::Display) {
        self.key(key);
        match self.format {
            LogFormat::Plain => append_display(self.text, self.scratch, value, append_bare),
            LogFormat::Json => append_display(self.text, self.scratch, value, append_json_string),
        }
    }

    /// [`Line::bare`] of an address.
    pub(crate) fn address(&mut self, key: &str, value: SocketAddr) {
        self.key(key);
        let quote = self.format == LogFormat::Json;
        self.text.extend(quote.then_some('"'));
        append_address(self.text, value);
        self.text.extend(quote.then_some('"'));
    }

    /// [`Line::literal`] of a number.
    pub(crate) fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        append_digits(self.text, value, 1);
    }

    /// [`Line::quoted`] of a time in whole milliseconds.
    pub(crate) fn milliseconds(&mut self, key: &str, value: Duration) {
        self.key(key);
        self.text.push('"');
        let whole = u64::try_from(value.as_millis()).unwrap_or(u64::MAX);
        append_digits(self.text, whole, 1);
        self.text.push_str("ms\"");
    }

    /// `key=value` for numbers and truth values, which JSON writes without quotes as well.
    pub(crate) fn literal(&mut self, key: &str, value: fmt::Arguments<'_>) {
        self.key(key);
        infallible(self.text.write_fmt(value));
    }

    /// Ends the line.
    pub(crate) fn finish(self) -> &'a [u8] {
        if self.format == LogFormat::Json {
            self.text.push('}');
        }
        self.text.push('\n');
        self.text.as_bytes()
    }

    fn key(&mut self, key: &str) {
        match self.format {
            LogFormat::Plain => {
                if !self.first {
                    self.text.push(' ');
                }
                self.text.push_str(key);
                self.text.push('=');
            }
            LogFormat::Json => {
                self.text.push(',');
                append_json_string(self.text, key);
                self.text.push(':');
            }
        }
        self.first = false;
    }
}

/// The name of a level in the log.
pub(crate) fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

fn append_display(
    text: &mut String,
    scratch: &mut String,
    value: &dyn fmt::Display,
    append: fn(&mut String, &str),
) {
    scratch.clear();
    infallible(write!(scratch, "{value}"));
    append(text, scratch);
}
