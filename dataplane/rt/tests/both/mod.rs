//! Runs the tests of a file on both back ends.

use rt::{Backend, RuntimeConfig};

/// Settings with one back end.
pub(crate) fn with(backend: Backend) -> RuntimeConfig {
    RuntimeConfig {
        backend,
        ..RuntimeConfig::default()
    }
}

#[allow(dead_code, reason = "some test programs need one back end only")]
/// Whether tests can run on `backend` here; says so if not.
pub(crate) fn is_available(name: &str, backend: Backend) -> bool {
    match rt::probe::check() {
        Err(refusal) if backend == Backend::IoUring => {
            eprintln!("skipped: {name}: {refusal}");
            false
        }
        _ => true,
    }
}

/// Makes a test on io_uring and one on epoll of each function of a back end.
#[allow(
    unused_macros,
    reason = "not every test program makes tests of functions"
)]
macro_rules! both_back_ends {
    ($($name:ident),* $(,)?) => {
        mod io_uring {
            $(#[test]
            fn $name() {
                if crate::both::is_available(stringify!($name), rt::Backend::IoUring) {
                    super::$name(rt::Backend::IoUring);
                }
            })*
        }
        mod epoll {
            $(#[test]
            fn $name() {
                super::$name(rt::Backend::Epoll);
            })*
        }
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use both_back_ends;
