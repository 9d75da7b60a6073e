//! Cutting pods off: the program that drops everything, in the links or filters of the capturing
//! ones.

use super::attach::Hook;
use super::{Ebpf, entries, inventory, layout};
use crate::back_end::AttachedBy;
use crate::cut_off::{self, owner};
use crate::error::{Error, Result};
use crate::system::links::Links;
use crate::system::netns::Netns;

impl Ebpf {
    /// Cuts off each of these; returns those that could not be.
    pub(super) fn cut_off_all(
        &mut self,
        node: &Netns,
        interfaces: &[&str],
    ) -> Result<Vec<(String, Error)>> {
        if interfaces.is_empty() {
            return Ok(Vec::new());
        }
        let links = Links::read(node)?;
        let mut failures = Vec::new();
        for interface in interfaces {
            let done = cut_off::check(&self.settings, &links, interface)
                .and_then(|index| self.cut_off_one(node, interface, index));
            failures.extend(done.err().map(|error| ((*interface).to_owned(), error)));
        }
        Ok(failures)
    }

    /// Cuts one off. The pod that was captured there no longer is.
    pub(super) fn cut_off_one(&mut self, node: &Netns, interface: &str, index: u32) -> Result<()> {
        let owner = owner(interface);
        let pod = self.journal.pod_at(interface);
        let uid = pod.map(|pod| pod.uid.clone());
        self.journal.batch(|journal| {
            if let Some(uid) = &uid {
                journal.hand_over(uid, &owner)?;
            }
            journal.set_cut_off(interface, true)
        })?;
        let by_program = self.cut_off_by_program(node, interface, index, &owner);
        by_program.or_else(|error| {
            tracing::warn!(%error, interface, "cut off by filters instead");
            cut_off::by_filters(&mut self.journal, node, interface)
        })?;
        let Some(uid) = uid else {
            return Ok(());
        };
        let pins = &self.settings.back_end.bpffs;
        let forgotten = entries::forget(pins, self.journal.pods(), &[&uid]);
        self.journal.remove_pods(&[&uid]).and(forgotten)
    }

    fn cut_off_by_program(
        &mut self,
        node: &Netns,
        interface: &str,
        index: u32,
        owner: &str,
    ) -> Result<()> {
        let mut attacher = self.attacher(node)?;
        for program in [layout::APP_OUTBOUND, layout::APP_INBOUND] {
            attacher.attach(Hook {
                program,
                interface,
                index,
                owner: Some(owner),
                cut_off: true,
            })?;
        }
        Ok(())
    }

    /// Ends it for these.
    pub(super) fn end_cut_off(&mut self, interfaces: &[&str]) -> Result<()> {
        let journal = &mut self.journal;
        let known: Vec<String> = journal
            .cut_off()
            .filter(|name| interfaces.contains(name))
            .map(str::to_owned)
            .collect();
        let names: Vec<&str> = known.iter().map(String::as_str).collect();
        let ended = cut_off::end(journal, &names);
        if journal.attached_by() != Some(AttachedBy::Clsact) {
            inventory::wait_until_detached(&known);
        }
        ended
    }
}
