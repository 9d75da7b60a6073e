//! Attaching of programs so that they outlive this process.
//!
//! tcx: a link, pinned in bpffs; a new program replaces the old one in the link atomically.
//! clsact: a filter with our own priority and handle, which stays until it is removed; replaced in
//! place too. The socket lookup: a pinned link; the new one is attached beside the old one and
//! renamed over its pin, and in between both choose the same listener from the same map.

use std::collections::HashSet;
use std::fs;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, SkLookup, TcAttachType};

use super::layout;
use crate::back_end::AttachedBy;
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::journal::undo::Undo;
use crate::settings::Attach;
use crate::system::netns::Netns;
use crate::system::program_load::load_program;
use crate::system::{pins, programs, tc};

const EEXIST: i32 = 17;
const EINVAL: i32 = 22;
const ENOTSUP: i32 = 95;

/// One program on one interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook<'a> {
    pub(crate) program: &'static str,
    pub(crate) interface: &'a str,
    pub(crate) index: u32,
    /// UID of the pod it is for.
    pub(crate) owner: Option<&'a str>,
    /// Whether what drops everything stands in the program's place.
    pub(crate) cut_off: bool,
}

impl Hook<'_> {
    /// What is attached, in the link or filter that is the program's.
    fn attached(&self) -> &'static str {
        if self.cut_off {
            layout::CUT_OFF
        } else {
            self.program
        }
    }

    pub(crate) fn egress(&self) -> bool {
        [layout::APP_INBOUND, layout::ZTUNNEL_GUARD].contains(&self.program)
    }

    pub(crate) fn attach_type(&self) -> TcAttachType {
        if self.egress() {
            TcAttachType::Egress
        } else {
            TcAttachType::Ingress
        }
    }

    /// File name of its pin. bpffs allows no dots, so interface names will not do.
    pub(crate) fn pin_name(&self) -> String {
        format!("{}_{}", self.program, self.index)
    }

    fn error(&self, error: &(dyn std::error::Error + 'static)) -> Error {
        Error::bpf(
            "attach program",
            format!("{} to {}", self.attached(), self.interface),
            error,
        )
    }
}

/// Loads all programs into the kernel.
pub(crate) fn load_programs(ebpf: &mut Ebpf) -> Result<()> {
    for name in layout::PROGRAMS {
        if name == layout::ZTUNNEL_INGRESS {
            let program = sk_lookup(ebpf)?;
            load_program(name, || program.load())?;
        } else {
            let program = classifier(ebpf, name)?;
            load_program(name, || program.load())?;
        }
    }
    Ok(())
}

fn absent(name: &str) -> Error {
    let missing = io::Error::new(io::ErrorKind::NotFound, "not in the object");
    Error::bpf("find program", name, &missing)
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).ok_or_else(|| absent(name))?;
    program
        .try_into()
        .map_err(|e: ProgramError| Error::bpf("use program", name, &e))
}

fn sk_lookup(ebpf: &mut Ebpf) -> Result<&mut SkLookup> {
    let name = layout::ZTUNNEL_INGRESS;
    let program = ebpf.program_mut(name).ok_or_else(|| absent(name))?;
    program
        .try_into()
        .map_err(|e: ProgramError| Error::bpf("use program", name, &e))
}

/// Attaches tc programs in the way the kernel and the settings allow.
pub(crate) struct Attacher<'a> {
    pub(crate) ebpf: &'a mut Ebpf,
    pub(crate) journal: &'a mut Journal,
    pub(crate) node: &'a Netns,
    pub(crate) pins: &'a Path,
    pub(crate) wanted: Attach,
    /// Interfaces with a clsact qdisc; read when first needed.
    pub(crate) clsact: Option<HashSet<String>>,
}

impl Attacher<'_> {
    /// Attaches, or replaces the program of an earlier process.
    pub(crate) fn attach(&mut self, hook: Hook<'_>) -> Result<()> {
        let use_tcx = match self.journal.attached_by() {
            Some(AttachedBy::Clsact) => false,
            Some(AttachedBy::Tcx) => true,
            None => self.wanted != Attach::Clsact,
        };
        if !use_tcx {
            self.journal.set_attached_by(AttachedBy::Clsact)?;
            return self.attach_filter(hook);
        }
        match self.attach_link(hook) {
            Ok(()) => self.journal.set_attached_by(AttachedBy::Tcx),
            Err(error) if self.journal.attached_by().is_none() && self.wanted == Attach::Auto => {
                let AttachError::Unsupported(reason) = error else {
                    return Err(error.into());
                };
                tracing::info!(%reason, "kernel without tcx, using clsact");
                self.journal.set_attached_by(AttachedBy::Clsact)?;
                self.attach_filter(hook)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn attach_link(&mut self, hook: Hook<'_>) -> Result<(), AttachError> {
        let pin = self.pins.join(hook.pin_name());
        check_own(self.journal, &pin)?;
        note_link(self.journal, self.pins, hook)?;
        let program = classifier(self.ebpf, hook.attached())?;
        if let Ok(old) = PinnedLink::from_pin(&pin) {
            let link = SchedClassifierLink::try_from(FdLink::from(old));
            let link = link.map_err(|e| hook.error(&e))?;
            let replaced = program
                .attach_to_link(link)
                // Dropping the link closes our descriptor; the pin keeps it attached.
                .and_then(|id| program.take_link(id).map(drop));
            match replaced {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let reason = hook.error(&error);
                    tracing::info!(%reason, "pinned link is dead, attaching anew");
                    fs::remove_file(&pin).map_err(|e| Error::file("remove pin", &pin, e))?;
                }
            }
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program
            .attach_with_options(hook.interface, hook.attach_type(), options)
            .map_err(|error| AttachError::classify(hook, &error))?;
        let link = program.take_link(id).map_err(|e| hook.error(&e))?;
        let link = FdLink::try_from(link).map_err(|e| hook.error(&e))?;
        link.pin(&pin).map_err(|e| hook.error(&e))?;
        Ok(())
    }

    fn attach_filter(&mut self, hook: Hook<'_>) -> Result<()> {
        let clsact = match self.clsact.take() {
            Some(known) => known,
            None => tc::clsact_interfaces()?,
        };
        let has_clsact = clsact.contains(hook.interface);
        self.clsact = Some(clsact);
        note_filter(self.journal, self.node, hook, has_clsact)?;
        if !has_clsact {
            qdisc_add_clsact(hook.interface).map_err(|e| hook.error(&e))?;
            self.clsact
                .get_or_insert_default()
                .insert(hook.interface.to_owned());
        }
        let program = classifier(self.ebpf, hook.attached())?;
        let options = NlOptions {
            priority: tc::PRIORITY,
            handle: tc::HANDLE,
            classid: None,
        };
        let options = TcAttachOptions::Netlink(options);
        let attached = program.attach_with_options(hook.interface, hook.attach_type(), options);
        let id = match attached {
            Err(error) if tc::os_error(&error) == Some(EEXIST) => {
                let link = tc::own(hook.interface, hook.egress()).map_err(|e| hook.error(&e))?;
                program.attach_to_link(link)
            }
            other => other,
        }
        .map_err(|e| hook.error(&e))?;
        let link = program.take_link(id).map_err(|e| hook.error(&e))?;
        // Dropping it would remove the filter, which is to outlive this process.
        std::mem::forget(link);
        Ok(())
    }

    /// Attaches the socket lookup to ztunnel's network namespace.
    pub(crate) fn attach_sk_lookup(&mut self, netns: &Path) -> Result<()> {
        let name = layout::ZTUNNEL_INGRESS;
        let failed = |e: &(dyn std::error::Error + 'static)| {
            Error::bpf(
                "attach program",
                format!("{name} to {}", netns.display()),
                e,
            )
        };
        let pin = self.pins.join(name);
        let next = self.pins.join(pins::next_name(name));
        check_own(self.journal, &pin)?;
        check_own(self.journal, &next)?;
        self.journal.record(None, Undo::Pin { path: pin.clone() })?;
        self.journal.record(None, Undo::Pin { path: next })?;
        let file = File::open(netns).map_err(|source| Error::Netns {
            path: netns.to_owned(),
            source,
        })?;
        let program = sk_lookup(self.ebpf)?;
        let id = program.attach(file).map_err(|e| failed(&e))?;
        let link = FdLink::from(program.take_link(id).map_err(|e| failed(&e))?);
        pins::replace_link(link, &pin)
    }
}

/// Tells a kernel that has no tcx from other failures.
enum AttachError {
    Unsupported(Error),
    Other(Error),
}

impl AttachError {
    fn classify(hook: Hook<'_>, error: &ProgramError) -> Self {
        let reason = hook.error(error);
        match tc::os_error(error) {
            Some(EINVAL | ENOTSUP) => Self::Unsupported(reason),
            _ => Self::Other(reason),
        }
    }
}

impl From<Error> for AttachError {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl From<AttachError> for Error {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Unsupported(error) | AttachError::Other(error) => error,
        }
    }
}

/// Notes in the journal what attaching by a link makes.
pub(crate) fn note_link(journal: &mut Journal, pins: &Path, hook: Hook<'_>) -> Result<()> {
    let path = pins.join(hook.pin_name());
    journal.record(hook.owner, Undo::Pin { path }).map(drop)
}

/// Notes in the journal what attaching by a filter makes.
pub(crate) fn note_filter(
    journal: &mut Journal,
    node: &Netns,
    hook: Hook<'_>,
    has_clsact: bool,
) -> Result<()> {
    let interface = hook.interface.to_owned();
    if !has_clsact {
        let undo = Undo::Clsact {
            netns: node.clone(),
            interface: interface.clone(),
        };
        journal.record(hook.owner, undo)?;
    }
    let undo = Undo::Filter {
        netns: node.clone(),
        interface,
        egress: hook.egress(),
    };
    journal.record(hook.owner, undo).map(drop)
}

/// The pins in `dir` that are of this crate for certain: the directory may be shared, and some of
/// the names are anybody's.
pub(crate) fn own_pins(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| is_own(path)).collect()
}

/// Whether what is pinned has one of our names, there and in the kernel, and a map our layout.
fn is_own(pin: &Path) -> bool {
    let name = pin.file_name().and_then(|name| name.to_str());
    let Some(name) = name else {
        return false;
    };
    if let Some(map) = layout::MAPS.iter().find(|map| map.name == name) {
        let called = pins::map_name(pin).is_some_and(|shown| programs::is_called(&shown, name));
        return called && pins::check_layout(pin, map).is_ok();
    }
    is_link_name(name)
        && pins::program_name(pin).is_some_and(|shown| programs::own(&shown).is_some())
}

/// `PROGRAM`, `PROGRAM_INDEX`, or one of these that is being replaced.
fn is_link_name(name: &str) -> bool {
    let name = name.strip_suffix(&pins::next_name("")).unwrap_or(name);
    layout::PROGRAMS.iter().any(|program| {
        let Some(rest) = name.strip_prefix(program) else {
            return false;
        };
        let index = rest.strip_prefix('_').unwrap_or_default();
        rest.is_empty() || (!index.is_empty() && index.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// Refuses what others have pinned under a name of ours.
pub(crate) fn check_own(journal: &mut Journal, pin: &Path) -> Result<()> {
    let known = journal.has(&Undo::Pin {
        path: pin.to_owned(),
    });
    let exists = fs::symlink_metadata(pin).is_ok();
    if exists && (pins::is_foreign(pin) || !(known || is_own(pin))) {
        return Err(Error::Foreign {
            path: pin.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_known_by_their_whole_names() {
        for own in [
            "app_outbound_7",
            "ztunnel_ingress",
            "ztunnel_ingress_next",
            "underlay_ingress_12_next",
        ] {
            assert!(is_link_name(own), "{own}");
        }
        for other in [
            "",
            "config",
            "app_outbound_policy",
            "app_outbound7",
            "app_outbound_",
            "app_outbound_7_old",
            "my_app_outbound_7",
            "cut_off_the_other",
        ] {
            assert!(!is_link_name(other), "{other}");
        }
    }
}
