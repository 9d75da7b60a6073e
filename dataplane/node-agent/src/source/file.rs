//! The file that has both the node's configuration and its pods.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use super::{Publisher, Source, Wanted, entries};
use crate::config::{self, Config};
use crate::desired::{Desired, Entry};
use crate::error::{Error, Result};

/// How often the file is looked at.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// How long it must not change before it is believed.
const SETTLE: Duration = Duration::from_millis(100);

/// A file, and what it held when last looked at.
#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    /// Right or wrong.
    seen: String,
    /// What is in force.
    config: Arc<Config>,
    /// Last failure to read it, so that one that lasts is logged once.
    complaint: Option<String>,
}

impl File {
    /// Reads it for the first time.
    ///
    /// # Errors
    /// It cannot be read, or is wrong.
    pub(crate) fn open(path: &Path) -> Result<(Self, Wanted)> {
        let text = read(path)?;
        let wanted = parse(path, &text)?;
        let file = Self {
            path: path.to_owned(),
            seen: text,
            config: Arc::clone(&wanted.config),
            complaint: None,
        };
        Ok((file, wanted))
    }

    /// What the file says now, if that is new and right.
    fn look(&mut self) -> Result<Option<Wanted>> {
        let text = read(&self.path)?;
        if text == self.seen || !self.is_settled(&text) {
            return Ok(None);
        }
        self.seen.clone_from(&text);
        let next = match parse(&self.path, &text) {
            Ok(next) => next,
            Err(error) => {
                tracing::error!("{error}; the old configuration stays in force");
                return Ok(None);
            }
        };
        if !self.config.can_become(&next.config) {
            tracing::error!(
                "redirect, attach, state_dir and bpffs need cleanup and a restart; \
                 the old configuration stays in force"
            );
            return Ok(None);
        }
        self.config = Arc::clone(&next.config);
        Ok(Some(next))
    }

    /// Whether the file still holds `text` a moment later: one that is being written may look
    /// like a whole one with fewer pods.
    fn is_settled(&self, text: &str) -> bool {
        thread::sleep(SETTLE);
        read(&self.path).is_ok_and(|later| later == text)
    }

    fn complain(&mut self, error: Option<&Error>) {
        let text = error.map(ToString::to_string);
        if let Some(text) = &text
            && self.complaint.as_ref() != Some(text)
        {
            tracing::error!("{text}");
        }
        self.complaint = text;
    }
}

impl Source for File {
    fn follow(mut self, publisher: &Publisher) {
        while !publisher.is_closed() {
            thread::sleep(POLL_EVERY);
            let looked = self.look();
            self.complain(looked.as_ref().err());
            if let Ok(Some(next)) = looked {
                publisher.publish(|wanted| *wanted = next);
            }
        }
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::ReadConfig {
        path: path.to_owned(),
        source,
    })
}

/// The pods of a file; the rest of it is [`Config`]'s.
#[derive(Deserialize)]
struct Pods {
    #[serde(default, deserialize_with = "entries::list")]
    pods: Vec<Entry>,
}

fn parse(path: &Path, text: &str) -> Result<Wanted> {
    let config = Config::parse(path, text)?;
    let read: Pods = serde_saphyr::from_str(text).map_err(|error| config::wrong(path, &error))?;
    Ok(Wanted {
        config: Arc::new(config),
        desired: Arc::new(Desired { pods: read.pods }),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc;

    use super::*;
    use crate::config::tests::SOUND;
    use crate::events::{EVENTS_MAX, Event};

    fn without_pods() -> &'static str {
        &SOUND[..SOUND.find("pods:").unwrap() + "pods:".len()]
    }

    #[test]
    fn a_file_is_configuration_and_pods() {
        let wanted = parse(Path::new("/c.yaml"), SOUND).unwrap();
        assert_eq!(wanted.desired.pods.len(), 1);
        let fewer = parse(Path::new("/c.yaml"), without_pods()).unwrap();
        assert_eq!(fewer.desired.pods, []);
        assert_eq!(fewer.config, wanted.config, "pods are no configuration");
        let none = parse(
            Path::new("/c.yaml"),
            without_pods().trim_end_matches("pods:"),
        );
        assert_eq!(none.unwrap().desired.pods, []);
        let wrong = SOUND.replace("pods:\n-", "pods:\n ");
        let error = parse(Path::new("/c.yaml"), &wrong).unwrap_err().to_string();
        assert!(error.starts_with("configuration /c.yaml: "), "{error}");
        assert!(
            error.contains("sequence") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn what_is_new_and_right_is_taken_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.yaml");
        fs::write(&path, SOUND).unwrap();
        let (mut file, first) = File::open(&path).unwrap();
        assert!(file.look().unwrap().is_none(), "nothing new");
        for wrong in [
            "redirect: [".to_owned(),
            SOUND.replace("/run/x", "/run/elsewhere"),
            SOUND.replace("redirect: ebpf", "redirect: tunnel"),
        ] {
            fs::write(&path, wrong).unwrap();
            assert!(file.look().unwrap().is_none());
        }
        fs::write(&path, without_pods()).unwrap();
        let second = file.look().unwrap().unwrap();
        assert_eq!(second.config, first.config);
        assert_eq!(second.desired.pods, []);
        fs::remove_file(&path).unwrap();
        file.look().unwrap_err();
        fs::write(&path, SOUND).unwrap();
        assert_eq!(file.look().unwrap().unwrap().desired, first.desired);
    }

    #[test]
    fn the_newest_is_in_the_cell_and_its_reader_is_woken() {
        let wanted = parse(Path::new("/c.yaml"), SOUND).unwrap();
        let (sender, events) = mpsc::sync_channel(EVENTS_MAX);
        let (publisher, mut cell) = Publisher::new(wanted, sender);
        // More than the queue of events holds: a source never waits for the reader.
        for count in 0..EVENTS_MAX * 2 {
            let pods = vec![Entry::Unreadable(crate::desired::Unreadable {
                uid: count.to_string(),
                host_interface: None,
                reason: String::new(),
            })];
            publisher.publish(|wanted| wanted.desired = Arc::new(Desired { pods }));
        }
        assert!(matches!(events.try_recv(), Ok(Event::Wanted)));
        let newest = cell.borrow_and_update().desired.clone();
        let [Entry::Unreadable(newest)] = &newest.pods[..] else {
            panic!("{newest:?}");
        };
        assert_eq!(newest.uid, (EVENTS_MAX * 2 - 1).to_string());
        assert!(!publisher.is_closed());
        drop(cell);
        assert!(publisher.is_closed());
    }
}
