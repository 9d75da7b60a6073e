//! Loading programs on a machine that is busy.
//!
//! The kernel's verifier gives up with EAGAIN when a signal, or work that reaches a task as one
//! does, is pending for the thread that loads (kernel/bpf/verifier.c, `do_check`). That says
//! nothing about the program: the next try begins anew. Aya's own second try, for the verifier's
//! log, is not always enough.

use std::io;

use aya::programs::ProgramError;

use crate::error::{Error, Result};

/// How often a program is loaded at most: more than that is no accident.
const TRIES_MAX: usize = 10;
const EAGAIN: i32 = 11;

/// Loads the program called `name` with `load`, again where the verifier was interrupted.
pub(crate) fn load_program(
    name: &str,
    mut load: impl FnMut() -> std::result::Result<(), ProgramError>,
) -> Result<()> {
    let mut result = load();
    for tried in 1..TRIES_MAX {
        if !result.as_ref().is_err_and(was_interrupted) {
            break;
        }
        tracing::debug!(program = name, tried, "the verifier was interrupted: again");
        result = load();
    }
    result.map_err(|e| Error::bpf("load program", name, &e))
}

fn was_interrupted(error: &ProgramError) -> bool {
    let again = |error: &io::Error| error.raw_os_error() == Some(EAGAIN);
    match error {
        ProgramError::LoadError { io_error, .. } => again(io_error),
        ProgramError::IOError(error) => again(error),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a program is loaded whose first `failures` loads fail, and how that ends.
    fn tries(failures: usize, errno: i32) -> (usize, Result<()>) {
        let mut tries = 0;
        let result = load_program("app_outbound", || {
            tries += 1;
            match tries > failures {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(errno).into()),
            }
        });
        (tries, result)
    }

    #[test]
    fn an_interrupted_load_is_tried_again_a_bounded_number_of_times() {
        for failures in [0, 1, 2, TRIES_MAX - 1] {
            let (tries, result) = tries(failures, EAGAIN);
            assert_eq!(tries, failures + 1);
            result.unwrap();
        }
        let (tries, result) = tries(usize::MAX, EAGAIN);
        assert_eq!(tries, TRIES_MAX);
        let told = result.unwrap_err().to_string();
        assert!(
            told.starts_with("cannot load program app_outbound: "),
            "{told}"
        );
    }

    #[test]
    fn a_program_that_is_refused_is_not_tried_again() {
        let (tries, result) = tries(1, 22); // EINVAL
        assert_eq!(tries, 1);
        assert!(result.is_err());
    }
}
