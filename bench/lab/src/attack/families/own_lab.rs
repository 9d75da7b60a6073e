//! Attacks that need ztunnels of their own.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::Failure;
use crate::attack::arena::Arena;
use crate::attack::catalog::Finding;
use crate::daemon::workspace_binary;
use crate::lab::{Lab, LabOptions};

/// Runs an attack in a lab of its own whose ztunnels have less of something than usual, so that
/// little is much: `line` of shell says what, before each of them is started.
pub(super) fn with_small_ztunnels(
    arena: &Arena,
    suffix: &str,
    line: &str,
    attack: impl FnOnce(&Arena) -> Finding,
) -> Finding {
    if !arena.is_own() {
        return Err(Failure::Skipped("brings up a lab of its own".to_owned()));
    }
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("ztunnel");
    let binary = workspace_binary("ztunnel")?;
    let text = format!("#!/bin/sh\n{line}\nexec '{}' \"$@\"\n", binary.display());
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let name = format!("{}-{suffix}", arena.lab.name());
    let lab = Lab::up(&LabOptions {
        name: name.clone(),
        redirect: arena.lab.redirect(),
        ztunnel: Some(program),
        ..LabOptions::default()
    })?;
    let small = Arena::new(lab, true, arena.quick).map_err(Failure::from);
    let finding = small.and_then(|small| attack(&small));
    Lab::down(&name)?;
    finding
}
