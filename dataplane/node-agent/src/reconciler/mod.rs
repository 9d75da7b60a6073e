//! Keeps the node at what is wanted: applies it, tries again what failed, follows what others
//! change and puts back what they remove.

use std::time::{Instant, SystemTime};

use redirect::Redirection;

use crate::apply::apply;
use crate::error::{Error, Result};
use crate::node::{Change, Node};
use crate::reconcile::drift::{Drift, Inventory};
use crate::reconcile::retry::Retry;
use crate::source::Wanted;

/// One node's.
#[derive(Debug)]
pub(crate) struct Reconciler<N> {
    node: N,
    wanted: Wanted,
    redirection: Box<dyn Redirection + Send>,
    drift: Drift,
    retry: Option<Retry>,
    /// When to look for what others removed.
    next_look: Instant,
    /// When a pin was last made or removed, as far as that has been looked into.
    pins_seen: Option<SystemTime>,
}

impl<N: Node> Reconciler<N> {
    /// Installs everything but pods. If that fails and nothing was installed before, nothing is
    /// afterwards.
    pub(crate) fn install(node: N, wanted: Wanted) -> Result<Self> {
        let mut redirection = node.redirection(&wanted.config)?;
        let fresh = !redirection.status()?.installed;
        if let Err(error) = redirection.install() {
            if fresh && let Err(left) = redirection.cleanup() {
                tracing::error!(error = %left, "not everything could be removed");
            }
            return Err(error.into());
        }
        Ok(Self::new(node, wanted, redirection))
    }

    /// For what is installed.
    fn new(mut node: N, wanted: Wanted, redirection: Box<dyn Redirection + Send>) -> Self {
        node.remember(&wanted);
        Self {
            next_look: Instant::now() + wanted.config.reconcile(),
            pins_seen: node.pins_changed(&wanted.config),
            node,
            wanted,
            redirection,
            drift: Drift::default(),
            retry: None,
        }
    }

    pub(crate) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    pub(crate) fn redirection(&mut self) -> &mut dyn Redirection {
        self.redirection.as_mut()
    }

    /// Whether something has failed that is tried again.
    pub(crate) fn is_behind(&self) -> bool {
        self.retry.is_some()
    }

    /// Something else is wanted.
    pub(crate) fn follow(&mut self, next: Wanted) -> Result<()> {
        let same_settings = next.config.settings() == self.wanted.config.settings();
        if same_settings && self.retry.is_none_or(|retry| !retry.whole) {
            self.wanted = next;
            self.change_pods(false)?;
        } else {
            // A back end has its settings from the start; a new one adopts what is installed.
            self.redirection = self.node.redirection(&next.config)?;
            self.wanted = next;
            let missing = self.missing();
            self.apply_all(missing)?;
        }
        let captured = self.redirection.enrolled().len();
        let listed = self.wanted.desired.pods.len();
        tracing::info!(listed, captured, "configuration applied");
        Ok(())
    }

    /// Addresses of the node have come or gone: nothing else is touched.
    pub(crate) fn follow_node(&mut self) {
        if let Err(error) = self.redirection.follow_node() {
            tracing::error!(%error, "the node's addresses are those known before");
        }
    }

    /// To be called about once a second, with the time.
    pub(crate) fn poll(&mut self, now: Instant) -> Result<()> {
        self.follow_changes()?;
        self.try_again()?;
        self.put_back(now)
    }

    /// Follows interfaces and network namespaces.
    fn follow_changes(&mut self) -> Result<()> {
        match self.node.change(&self.wanted) {
            Change::Nothing => Ok(()),
            Change::Pods => {
                tracing::info!("interfaces or network namespaces of pods changed");
                self.change_pods(true)
            }
            Change::Node => {
                tracing::info!(
                    "interfaces or ztunnel's network namespace changed, installing anew"
                );
                let missing = self.missing();
                self.apply_all(missing)
            }
        }
    }

    fn try_again(&mut self) -> Result<()> {
        let Some(retry) = &mut self.retry else {
            return Ok(());
        };
        if !retry.is_due() {
            return Ok(());
        }
        if retry.whole {
            self.apply_all(self.drift.expected())?;
        } else {
            self.change_pods(false)?;
        }
        if self.retry.is_none() {
            tracing::info!("what had failed is applied now");
        }
        Ok(())
    }

    /// Puts back what someone else has removed, and forgets what has ended. Pins do not wait for
    /// their turn: without the programs they kept attached, packets go past ztunnel.
    fn put_back(&mut self, now: Instant) -> Result<()> {
        let pins = self.node.pins_changed(&self.wanted.config);
        if now < self.next_look && pins == self.pins_seen {
            return Ok(());
        }
        self.pins_seen = pins;
        self.next_look = now + self.wanted.config.reconcile();
        self.follow_node();
        let missing = self.drift.missing(&self.redirection.inventory()?);
        let Some(example) = missing.first() else {
            return self.redirection.expire().map_err(Error::from);
        };
        tracing::warn!(
            missing = example,
            others = missing.len() - 1,
            "removed by someone else, installing again"
        );
        self.drift.repairs(&missing);
        self.apply_all(self.drift.expected())
    }

    /// What others have removed and nobody has looked for yet. Nothing is taken for missing where
    /// that cannot be told.
    fn missing(&mut self) -> Inventory {
        let now = self.redirection.inventory().ok();
        now.map(|now| self.drift.missing(&now)).unwrap_or_default()
    }

    /// Installs everything again, in place; what is `kept` is to be there afterwards.
    fn apply_all(&mut self, kept: Inventory) -> Result<()> {
        let last = self.retry.take();
        let result = self.redirection.install();
        // Where the node's side cannot be brought up to date, pods are to be captured all the
        // same, as far as that goes.
        let pods = self.apply_pods(true, kept);
        let result = result.map_err(Error::from).and(pods);
        let failed = result.is_err() || self.retry.is_some();
        self.retry = failed.then(|| Retry::after(last, result.is_err()));
        result
    }

    /// Brings the node to the pods that are wanted; with `refresh`, those that are captured
    /// already, too.
    pub(crate) fn change_pods(&mut self, refresh: bool) -> Result<()> {
        let missing = self.missing();
        self.apply_pods(refresh, missing)
    }

    fn apply_pods(&mut self, refresh: bool, kept: Inventory) -> Result<()> {
        self.node.remember(&self.wanted);
        let last = self.retry.take();
        let redirection = self.redirection.as_mut();
        let result = apply(redirection, &self.node, &self.wanted, refresh);
        let failed = !matches!(result, Ok(false));
        self.retry = failed.then(|| Retry::after(last, result.is_err()));
        self.drift.applied(self.redirection.inventory()?, kept);
        result.map(drop)
    }
}

#[cfg(test)]
mod tests;
