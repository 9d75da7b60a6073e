//! A mesh described in YAML: `LOCAL_XDS_PATH` (file) or `LOCAL_XDS` (inline).
//!
//! Top-level lists `workloads`, `services` and `policies`, in the shape of upstream's local
//! configuration; unknown and duplicate keys are errors. An empty document is an error, too: it
//! is what a file looks like while an editor rewrites it, and would pass all traffic through in
//! plain text. `{}` is the empty mesh.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use mesh::{ItemKind, ModelError, Policy, ServiceConfig, Snapshot, WorkloadConfig};
use serde::Deserialize;
use serde_saphyr::{Location, Options, Spanned};

/// Largest configuration that is read, in bytes.
pub const CONFIG_LEN_MAX: u64 = 256 * 1024 * 1024;

/// Where a local configuration is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LocalConfig {
    /// In this file.
    File(PathBuf),
    /// It is this text.
    Inline(String),
}

/// Why a local configuration cannot be used: one line, with the place where it is known.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Both a file and inline text are given.
    #[error("LOCAL_XDS_PATH and LOCAL_XDS exclude each other: unset one of them")]
    Both,
    /// The file cannot be read.
    #[error("{path}: cannot read the mesh configuration: {source}; check LOCAL_XDS_PATH")]
    Read {
        /// The file.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// The file is too large.
    #[error(
        "{path}: the mesh configuration is larger than {CONFIG_LEN_MAX} bytes, the limit; \
         LOCAL_XDS_PATH probably names another file"
    )]
    TooLarge {
        /// The file.
        path: String,
    },
    /// There is nothing in it.
    #[error(
        "{origin}: the mesh configuration is empty: it was probably cut short; write `{{}}` for \
         a mesh of nothing"
    )]
    Empty {
        /// The file, or `LOCAL_XDS`.
        origin: String,
    },
    /// It is not YAML of the expected shape.
    #[error("{place}: {message}")]
    Syntax {
        /// File, line and column.
        place: String,
        /// What is wrong there.
        message: String,
    },
    /// It is not a valid mesh.
    #[error("{place}: {source}")]
    Model {
        /// File, line and column of the item.
        place: String,
        /// What is wrong with it.
        source: ModelError,
    },
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    workloads: Vec<Spanned<WorkloadConfig>>,
    services: Vec<Spanned<ServiceConfig>>,
    policies: Vec<Spanned<Policy>>,
}

impl LocalConfig {
    /// From the values of `LOCAL_XDS_PATH` and `LOCAL_XDS`; none if neither is set.
    ///
    /// # Errors
    /// Both are set.
    pub fn from_settings(
        path: Option<&str>,
        inline: Option<&str>,
    ) -> Result<Option<Self>, LoadError> {
        let set = |value: Option<&str>| value.filter(|text| !text.is_empty()).map(str::to_owned);
        match (set(path), set(inline)) {
            (Some(_), Some(_)) => Err(LoadError::Both),
            (Some(path), None) => Ok(Some(Self::File(path.into()))),
            (None, Some(text)) => Ok(Some(Self::Inline(text))),
            (None, None) => Ok(None),
        }
    }

    /// Reads the configuration and builds the mesh. Blocks.
    ///
    /// # Errors
    /// It cannot be read, is not YAML of the expected shape, or is not a valid mesh.
    pub fn load(&self) -> Result<Snapshot, LoadError> {
        match self {
            Self::File(path) => parse(&path.display().to_string(), &read(path)?),
            Self::Inline(text) => parse("LOCAL_XDS", text),
        }
    }
}

fn read(path: &Path) -> Result<String, LoadError> {
    let name = || path.display().to_string();
    let failed = |source| LoadError::Read {
        path: name(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    // One byte more than allowed, to tell a file of exactly the limit from a larger one.
    file.take(CONFIG_LEN_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > CONFIG_LEN_MAX {
        return Err(LoadError::TooLarge { path: name() });
    }
    String::from_utf8(bytes)
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))
}

/// Builds the mesh that `text` describes; `origin` names it in errors.
///
/// # Errors
/// It is not YAML of the expected shape, or not a valid mesh.
pub fn parse(origin: &str, text: &str) -> Result<Snapshot, LoadError> {
    let document: Option<Document> = serde_saphyr::from_str_with_options(text, options())
        .map_err(|error| syntax(origin, text, &error))?;
    let document = document.ok_or_else(|| LoadError::Empty {
        origin: origin.to_owned(),
    })?;
    let (workloads, workload_places) = split(document.workloads);
    let (services, service_places) = split(document.services);
    let (policies, policy_places) = split(document.policies);
    Snapshot::build(workloads, services, policies).map_err(|source| {
        let location = source.item().and_then(|item| {
            let places = match item.kind {
                ItemKind::Workload => &workload_places,
                ItemKind::Service => &service_places,
                ItemKind::Policy => &policy_places,
            };
            places.get(item.index as usize)
        });
        LoadError::Model {
            place: place(origin, location),
            source,
        }
    })
}

/// The reader's limits protect against hostile documents; this one is the operator's own and
/// bounded by its size, so only those on repetition stay.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
        },
        with_snippet: false,
    }
}

fn split<T>(items: Vec<Spanned<T>>) -> (Vec<T>, Vec<Location>) {
    items
        .into_iter()
        .map(|item| (item.value, item.referenced))
        .unzip()
}

fn place(origin: &str, location: Option<&Location>) -> String {
    match location {
        Some(at) => format!("{origin}:{}:{}", at.line(), at.column()),
        None => origin.to_owned(),
    }
}

fn syntax(origin: &str, text: &str, error: &serde_saphyr::Error) -> LoadError {
    let location = error.location();
    let mut message = error.without_snippet().to_string();
    if let Some(at) = &location {
        let suffix = format!(" at line {}, column {}", at.line(), at.column());
        message.truncate(message.strip_suffix(&suffix).unwrap_or(&message).len());
    }
    for (of_reader, of_operator) in WORDING {
        message = message.replace(of_reader, of_operator);
    }
    let mut message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let token = location.as_ref().map_or("", |at| token_at(text, at));
    if !token.is_empty() && !message.contains('`') {
        message = format!("`{}`: {message}", token.escape_debug());
    }
    LoadError::Syntax {
        place: place(origin, location.as_ref()),
        message,
    }
}

/// What the reader says in its own terms.
const WORDING: [(&str, &str); 4] = [
    (", set DuplicateKeyPolicy in Options if acceptable", ""),
    ("invalid u16", "must be a number from 0 to 65535"),
    ("invalid u32", "must be a number from 0 to 4294967295"),
    (
        "invalid IP address syntax",
        "must be an IPv4 or IPv6 address, such as 10.0.0.1 or fd00::1",
    ),
];

/// The text that stands at a place, up to the next space or punctuation of YAML.
fn token_at<'a>(text: &'a str, at: &Location) -> &'a str {
    let line = usize::try_from(at.line())
        .ok()
        .and_then(|n| n.checked_sub(1));
    let line = line.and_then(|n| text.lines().nth(n)).unwrap_or_default();
    let skipped = usize::try_from(at.column()).unwrap_or(0).saturating_sub(1);
    let start = line
        .char_indices()
        .nth(skipped)
        .map_or(line.len(), |(start, _)| start);
    let rest = &line[start..];
    let end = rest
        .char_indices()
        .take(TOKEN_LEN_MAX)
        .find(|(_, c)| c.is_whitespace() || ",{}[]".contains(*c));
    let all = || {
        rest.char_indices()
            .nth(TOKEN_LEN_MAX)
            .map_or(rest.len(), |(end, _)| end)
    };
    let token = &rest[..end.map_or_else(all, |(end, _)| end)];
    // The quotes of the file are not part of the value.
    token.trim_end_matches(':').trim_matches(['"', '\''])
}

/// Most characters of the configuration that an error repeats.
const TOKEN_LEN_MAX: usize = 60;
