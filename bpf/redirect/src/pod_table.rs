//! Which pod has which address, from redirection to ztunnel: a file that is replaced in one step.
//!
//! The journal writes it whenever its pods change, which is before a pod is captured and after its
//! capture has ended. So whoever has a captured packet finds its sender here, and an address that
//! goes from one pod to another changes hands here before the new one is captured. ztunnel asks for
//! each connection it accepts; the file is read again only when it is another one.
//!
//! Whether it is another one is looked at by stat(2), unless that was done less than [`FRESH`] ago:
//! whoever writes waits for [`SETTLE`], which is longer, before anything is captured. So a reader
//! that still goes by the file before has no connection of the new pod to ask about.
//!
//! A file, not a BPF map: both back ends have it alike, it needs neither a bpffs nor privileges to
//! read, names in it are as long as Kubernetes allows, and it can be looked at.
//!
//! Form: `ztunnel-pods 1`, then for each address a line of address, namespace, name, service
//! account and UID with tabs between, then `end` and the number of those lines.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::settings::Pod;

/// Directory of the table below the state directory: of its own, so that it alone can be mounted
/// where ztunnel is.
const DIRECTORY: &str = "pods";
const FILE: &str = "table";
const HEADER: &str = "ztunnel-pods 1";
/// How long what stat(2) said counts: the look-ups of one connection, and of those that come while
/// it is set up, are one look.
const FRESH: Duration = Duration::from_millis(2);
/// How long a new table is there before anything else happens.
const SETTLE: Duration = Duration::from_millis(4);
/// A larger one is not read: some 80 times what a node's pods need.
const BYTES_MAX: u64 = 16 << 20;

/// Whose an address is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodIdentity {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
    /// What the agent's configuration calls it.
    pub uid: Arc<str>,
}

/// What the table says of an address; `P` is what its reader makes of a pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Lookup<P = PodIdentity> {
    /// A captured pod has it.
    Pod(Arc<P>),
    /// No captured pod has it.
    NotCaptured,
    /// There is no table yet, or the one there is cannot be read.
    NoTable,
}

/// The table of the agent whose state directory this is.
#[must_use]
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(DIRECTORY).join(FILE)
}

/// A reader of the table, for one thread.
#[derive(Debug)]
pub struct PodTable<P = PodIdentity> {
    path: PathBuf,
    /// What is made of each pod, once for all look-ups.
    make: fn(PodIdentity) -> P,
    /// The file that was read and its device and number; held open, so that no other file gets
    /// that number.
    read: Option<(File, (u64, u64))>,
    /// When it was last seen to be the one that is there.
    looked: Option<Instant>,
    /// None: what was read is not a table.
    pods: Option<HashMap<IpAddr, Arc<P>>>,
    /// Why the last attempt failed: told once.
    complaint: String,
}

impl PodTable {
    /// The one at `path`, which need not be there yet.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self::of(path, |pod| pod)
    }
}

impl<P> PodTable<P> {
    /// The one at `path`, whose look-ups answer with what `make` makes of a pod.
    #[must_use]
    pub fn of(path: &Path, make: fn(PodIdentity) -> P) -> Self {
        Self {
            path: path.to_owned(),
            make,
            read: None,
            looked: None,
            pods: None,
            complaint: String::new(),
        }
    }

    /// Who has `address` now. One stat(2) in 2 ms at most, and once after a change reading the
    /// file. One that was removed counts as it was: what it says is captured still is.
    pub fn get(&mut self, address: IpAddr) -> Lookup<P> {
        self.follow();
        match &self.pods {
            None => Lookup::NoTable,
            Some(pods) => match pods.get(&address.to_canonical()) {
                Some(pod) => Lookup::Pod(Arc::clone(pod)),
                None => Lookup::NotCaptured,
            },
        }
    }

    fn follow(&mut self) {
        let now = Instant::now();
        let is_fresh = |looked| now.duration_since(looked) < FRESH;
        if self.looked.is_some_and(is_fresh) {
            return;
        }
        let Ok(there) = fs::metadata(&self.path) else {
            return;
        };
        let there = (there.dev(), there.ino());
        if self.read.as_ref().is_some_and(|(_, read)| *read == there) {
            self.looked = Some(now);
            return;
        }
        match self.load() {
            Ok(()) => self.complaint.clear(),
            Err(error) => {
                let (path, error) = (self.path.display(), error.to_string());
                if self.complaint != error {
                    tracing::error!("pod table {path}: {error}: no pod is known until it is right");
                }
                self.complaint = error;
                self.pods = None;
            }
        }
    }

    fn load(&mut self) -> io::Result<()> {
        let file = File::open(&self.path)?;
        let metadata = file.metadata()?;
        let (file, _) = self.read.insert((file, (metadata.dev(), metadata.ino())));
        let mut text = String::new();
        file.take(BYTES_MAX).read_to_string(&mut text)?;
        let wrong = |reason| io::Error::new(io::ErrorKind::InvalidData, reason);
        self.pods = Some(parse(&text, self.make).map_err(wrong)?);
        Ok(())
    }
}

fn parse<P>(text: &str, make: fn(PodIdentity) -> P) -> Result<HashMap<IpAddr, Arc<P>>, String> {
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) {
        return Err(format!("the first line must be `{HEADER}`"));
    }
    let mut pods = HashMap::new();
    let mut last: Option<(&str, Arc<P>)> = None;
    for (line, number) in lines.by_ref().zip(2..) {
        if line == format!("end {}", pods.len()) {
            return match lines.next() {
                None => Ok(pods),
                Some(_) => Err(format!("line {}: nothing may follow the end", number + 1)),
            };
        }
        let fields: Vec<&str> = line.split('\t').collect();
        let [address, namespace, name, service_account, uid] = fields[..] else {
            return Err(format!("line {number}: must have five fields"));
        };
        let address: IpAddr = address
            .parse()
            .map_err(|_| format!("line {number}: no address at its start"))?;
        // A pod's addresses are side by side.
        let pod = match &last {
            Some((last, pod)) if *last == uid => Arc::clone(pod),
            _ => Arc::new(make(PodIdentity {
                namespace: namespace.into(),
                name: name.into(),
                service_account: service_account.into(),
                uid: uid.into(),
            })),
        };
        last = Some((uid, Arc::clone(&pod)));
        if pods.insert(address, pod).is_some() {
            return Err(format!("line {number}: {address} is there twice"));
        }
    }
    Err("it has no right end".to_owned())
}

/// The agent's side.
#[derive(Debug)]
pub(crate) struct Writer {
    path: PathBuf,
    /// What this process wrote last.
    written: Option<String>,
}

impl Writer {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            path: path(state_dir),
            written: None,
        }
    }

    /// Makes the table that of these pods, in one step. Pods without names, of an earlier version's
    /// journal, are left out: ztunnel does not know them until they are configured again.
    pub(crate) fn write(&mut self, pods: &[Pod]) -> Result<()> {
        let text = render(pods);
        if self.written.as_ref() == Some(&text) {
            return Ok(());
        }
        self.written = None;
        let directory = self.path.parent().unwrap_or_else(|| Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(|e| Error::file("make directory", directory, e))?;
        let new = self.path.with_extension("new");
        // A new file each time: an old one's bytes must not change under a reader.
        let _ = fs::remove_file(&new); // left over if an earlier process was killed right here
        let failed = |action| {
            let new = new.clone();
            move |error| Error::file(action, &new, error)
        };
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&new)
            .map_err(failed("make"))?;
        io::Write::write_all(&mut file, text.as_bytes()).map_err(failed("write"))?;
        fs::rename(&new, &self.path).map_err(|e| Error::file("replace", &self.path, e))?;
        thread::sleep(SETTLE);
        self.written = Some(text);
        Ok(())
    }

    /// Whether the table there is is that of these pods.
    pub(crate) fn is_current(&self, pods: &[Pod]) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text == render(pods))
    }

    /// As if nothing had been written: the next [`Writer::write`] does.
    pub(crate) fn forget(&mut self) {
        self.written = None;
    }

    /// Removes the table.
    pub(crate) fn remove(&mut self) -> Result<()> {
        self.written = None;
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("remove", &self.path, error));
            }
            _ => {}
        }
        if let Some(directory) = self.path.parent() {
            let _ = fs::remove_dir(directory); // somebody else's files keep it
        }
        Ok(())
    }
}

fn render(pods: &[Pod]) -> String {
    let mut text = format!("{HEADER}\n");
    let mut lines = 0;
    for pod in pods.iter().filter(|pod| !pod.name.is_empty()) {
        let (namespace, name, account) = (&pod.namespace, &pod.name, &pod.service_account);
        for address in &pod.addresses {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{address}\t{namespace}\t{name}\t{account}\t{}",
                pod.uid
            );
            lines += 1;
        }
    }
    let _ = writeln!(text, "end {lines}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, addresses: &[&str]) -> Pod {
        Pod {
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            name: name.into(),
            service_account: "robot".into(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            netns: "/x".into(),
            host_interface: "v".into(),
        }
    }

    fn names(table: &mut PodTable, addresses: &[&str]) -> Vec<String> {
        let name = |address: &&str| match table.get(address.parse().unwrap()) {
            Lookup::Pod(pod) => format!("{}/{}", pod.namespace, pod.name),
            other => format!("{other:?}"),
        };
        addresses.iter().map(name).collect()
    }

    #[test]
    fn a_reader_sees_each_table_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(directory.path());
        let mut table = PodTable::new(&path(directory.path()));
        let all = ["10.0.0.1", "fd00::1", "::ffff:10.0.0.1", "10.0.0.2"];
        assert_eq!(names(&mut table, &all), ["NoTable"; 4]);
        // An address that changes hands, a hundred times.
        for turn in 0..100 {
            let owner = format!("pod-{}", turn % 2);
            writer
                .write(&[pod(&owner, &["10.0.0.1", "fd00::1"])])
                .unwrap();
            let name = format!("default/{owner}");
            let expected = [&*name, &name, &name, "NotCaptured"];
            assert_eq!(names(&mut table, &all), expected);
        }
        writer.write(&[]).unwrap();
        assert_eq!(names(&mut table, &all), ["NotCaptured"; 4]);
        writer.remove().unwrap();
        assert!(!path(directory.path()).exists());
        assert_eq!(names(&mut table, &all), ["NotCaptured"; 4]);
        writer.write(&[pod("back", &["10.0.0.2"])]).unwrap();
        assert_eq!(names(&mut table, &["10.0.0.2"]), ["default/back"]);
    }

    #[test]
    fn a_file_that_is_not_a_whole_table_says_nothing() {
        let whole = render(&[pod("a", &["10.0.0.1", "10.0.0.2"])]);
        assert_eq!(parse(&whole, |pod| pod).unwrap().len(), 2);
        for cut in 0..whole.len() - 1 {
            assert!(
                parse(&whole[..cut], |pod| pod).is_err(),
                "{:?}",
                &whole[..cut]
            );
        }
        for (from, to) in [
            ("ztunnel-pods 1", "ztunnel-pods 2"),
            ("10.0.0.2", "10.0.0.1"),
            ("10.0.0.2", "10.0.0.256"),
            ("end 2", "end 3"),
            ("end 2\n", "end 2\nmore\n"),
            ("\trobot", ""),
        ] {
            let text = whole.replacen(from, to, 1);
            assert!(parse(&text, |pod| pod).is_err(), "{text:?}");
        }
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("table");
        let mut table = PodTable::new(&file);
        fs::write(&file, &whole).unwrap();
        assert_eq!(names(&mut table, &["10.0.0.1"]), ["default/a"]);
        let broken = directory.path().join("next");
        fs::write(&broken, "nonsense").unwrap();
        fs::rename(&broken, &file).unwrap();
        thread::sleep(SETTLE);
        assert_eq!(names(&mut table, &["10.0.0.1"]), ["NoTable"]);
    }
}
