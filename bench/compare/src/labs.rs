//! The labs of a comparison, one for each path.

use anyhow::{Context as _, Result, bail};

use super::interrupt::Interrupt;
use super::peers::{self, Wanted};
use super::plan::{Arm, Cell, Plan};
use super::trial::Setup;
use lab::Redirect;
use lab::Services;
use lab::peers::ProxyKind;
use lab::{Lab, LabOptions};
use report::schema::{Peer, SkippedPeer};

/// Labs that are up, by the names of their paths; dropping takes them down.
#[derive(Debug, Default)]
pub(super) struct Labs {
    up: Vec<(String, Lab)>,
    /// The labs with listeners in the place of ztunnels, of paths that are measured so as well.
    listeners: Vec<(String, Lab)>,
    /// The peers among them.
    pub(super) peers: Vec<Peer>,
    /// Peers that could not be brought up.
    pub(super) skipped_peers: Vec<SkippedPeer>,
}

impl Labs {
    /// Brings up the labs of peers and adds them to the plan. Peers that do not work are
    /// noted and left out.
    pub(super) fn up_competitors(
        &mut self,
        prefix: &str,
        plan: &mut Plan,
        wanted: &[Wanted],
        setup: &Setup<'_>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        for peer in wanted {
            let name = format!("{prefix}-{}", peer.name);
            make_room(&name)?;
            match peers::up(&name, peer, setup) {
                Ok((lab, arm, about)) => {
                    self.up.push((arm.name.clone(), lab));
                    plan.add_competitor(arm);
                    self.peers.push(about);
                }
                Err(skipped) => {
                    eprintln!("lab: peer {} is skipped: {}", skipped.name, skipped.reason);
                    self.skipped_peers.push(skipped);
                }
            }
            if interrupt.came() {
                bail!("interrupted while labs came up");
            }
        }
        Ok(())
    }

    /// Brings up the labs of all other paths.
    pub(super) fn up(
        &mut self,
        prefix: &str,
        plan: &Plan,
        services: Services,
        interrupt: &Interrupt,
    ) -> Result<()> {
        for arm in plan.arms.iter().filter(|arm| arm.competitor.is_none()) {
            let name = format!("{prefix}-{}", arm.slug());
            if plan.needs_ztunnels(arm) {
                let lab = up(&name, arm, ProxyKind::Shared, services)?;
                self.up.push((arm.name.clone(), lab));
            }
            if plan.cells.iter().any(|cell| arm.needs_listener(cell)) {
                let lab = up(&format!("{name}-alone"), arm, ProxyKind::Listener, services)?;
                self.listeners.push((arm.name.clone(), lab));
            }
            if interrupt.came() {
                bail!("interrupted while labs came up");
            }
        }
        Ok(())
    }

    /// The lab of a path for what is measured at `cell`.
    pub(super) fn of(&self, arm: &Arm, cell: &Cell) -> Result<&Lab> {
        let labs = if arm.needs_listener(cell) {
            &self.listeners
        } else {
            &self.up
        };
        let lab = labs.iter().find(|(name, _)| *name == arm.name);
        lab.map(|(_, lab)| lab)
            .with_context(|| format!("path {} has no lab", arm.name))
    }

    fn all(&self) -> impl Iterator<Item = &(String, Lab)> {
        self.up.iter().chain(&self.listeners)
    }

    /// The driver of the `tunnel` path.
    pub(super) fn tunnel_driver(&self) -> Option<String> {
        let mut labs = self.all().map(|(_, lab)| lab);
        let tunnel = labs.find(|lab| lab.redirect() == Redirect::Tunnel)?;
        tunnel.tunnel_driver().map(str::to_owned)
    }
}

/// Brings up one lab of `arm`.
fn up(name: &str, arm: &Arm, proxy: ProxyKind, services: Services) -> Result<Lab> {
    make_room(name)?;
    let options = LabOptions {
        name: name.to_owned(),
        redirect: arm.redirect,
        sockmap: arm.sockmap,
        proxy,
        services,
        ..LabOptions::default()
    };
    Lab::up(&options).with_context(|| format!("bringing up path {}", arm.name))
}

/// Removes what a comparison that was killed left up: the lock says that none is running.
fn make_room(name: &str) -> Result<()> {
    Lab::down(name).with_context(|| format!("removing an old lab {name}"))?;
    eprintln!("bringing up lab {name}");
    Ok(())
}

impl Drop for Labs {
    fn drop(&mut self) {
        for (_, lab) in self.all() {
            if let Err(error) = Lab::down(lab.name()) {
                eprintln!("lab: taking lab {} down: {error}", lab.name());
            }
        }
    }
}
