//! `cleanup`: removes everything that was ever installed.

use std::time::Duration;

use redirect::Redirect;

use crate::config::Config;
use crate::error::Result;
use crate::lock::Lock;
use crate::sockmap;

/// How long to wait for a `run` that is just ending.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Refuses while `run` is running.
pub(crate) fn cleanup(config: &Config) -> Result<()> {
    redirect::check_privileges(config.redirect == Redirect::Ebpf)?;
    let lock = Lock::take(&config.state_dir, LOCK_PATIENCE)?;
    sockmap::remove(config)?;
    config.redirection()?.cleanup()?;
    lock.remove()
}
