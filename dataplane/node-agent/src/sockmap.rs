//! The sockmap beside the redirection: installed and kept up to date if the
//! configuration asks for it, removed if not. What fails is logged and costs only speed.

use redirect::Pod;
use redirect::sockmap::{self, Settings, Sockmap};

use crate::config::Config;
use crate::error::Result;

/// What the agent keeps of it.
#[derive(Debug, Default)]
pub(crate) struct Owner {
    installed: Option<(Settings, Sockmap)>,
    /// For which settings and pods it was last tried: what failed is not tried again and again.
    tried: Option<(Option<Settings>, Vec<Pod>)>,
    complaint: Option<String>,
}

impl Owner {
    /// Brings it to what the configuration, the namespaces and the captured pods are now.
    pub(crate) fn follow(&mut self, config: &Config, pods: &[Pod]) {
        let result = self.apply(config, pods);
        let text = result.err().map(|error| error.to_string());
        if let Some(text) = &text
            && self.complaint.as_ref() != Some(text)
        {
            tracing::warn!("sockmap, connections use TCP: {text}");
        }
        self.complaint = text;
    }

    fn apply(&mut self, config: &Config, pods: &[Pod]) -> Result<()> {
        let wanted = config.sockmap();
        let Some(settings) = wanted else {
            self.installed = None;
            return self.remove_once(config);
        };
        let current = self
            .installed
            .as_ref()
            .is_some_and(|(known, sockmap)| *known == settings && sockmap.is_current());
        let state = (Some(settings.clone()), pods.to_vec());
        if !current {
            if let Some((_, sockmap)) = &self.installed {
                sockmap.pin_again()?;
            }
            self.installed = None; // its thread ends before another begins
            if self.tried.as_ref() == Some(&state) && self.complaint.is_some() {
                return Ok(());
            }
            self.tried = Some(state);
            let sockmap = Sockmap::install(&settings)?;
            tracing::info!(cgroup = %settings.cgroup.display(), "sockmap installed");
            self.installed = Some((settings, sockmap));
        }
        match &mut self.installed {
            Some((_, sockmap)) => Ok(sockmap.set_pods(pods)?),
            None => Ok(()),
        }
    }

    fn remove_once(&mut self, config: &Config) -> Result<()> {
        let state = (None, Vec::new());
        if self.tried.as_ref() != Some(&state) {
            self.tried = Some(state);
            remove(config)?;
        }
        Ok(())
    }
}

/// Removes what is installed.
pub(crate) fn remove(config: &Config) -> Result<()> {
    match config.pins() {
        Some(bpffs) => Ok(sockmap::remove(bpffs)?),
        None => Ok(()),
    }
}

/// What is installed.
pub(crate) fn status(config: &Config) -> Result<Option<sockmap::Status>> {
    match config.pins() {
        Some(bpffs) => Ok(sockmap::status(bpffs)?),
        None => Ok(None),
    }
}
