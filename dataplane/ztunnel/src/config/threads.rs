//! How many workers there are, and what they do their operations with.

use rt::Backend;

use super::ConfigError;
use crate::environment::{BadSetting, Environment};

/// Worker threads: `ZTUNNEL_WORKER_THREADS` as N, N% or 0 (all); else one per usable CPU.
///
/// Upstream's default is a quarter of the CPUs because its workers share work; here a worker is
/// the CPU its packets arrive on, so every CPU the process may use has one, within
/// `ZTUNNEL_CPU_LIMIT` or else the limit of the control group: more workers than that would only
/// take turns at being throttled. A number that is asked for may exceed the limit.
pub(super) fn workers(
    environment: &Environment<'_>,
    cpus: usize,
    group_limit: Option<usize>,
) -> Result<usize, ConfigError> {
    let limit = environment.number("ZTUNNEL_CPU_LIMIT", 1..=4096)?;
    let limit = limit.map(|limit| limit as usize).or(group_limit);
    let (usable, cpus) = (
        cpus.max(1),
        limit.map_or(cpus, |limit| cpus.min(limit)).max(1),
    );
    let Some(text) = environment.text("ZTUNNEL_WORKER_THREADS") else {
        return Ok(cpus);
    };
    let wanted = match text.strip_suffix('%') {
        Some(percent) => percent
            .parse::<usize>()
            .ok()
            .filter(|percent| *percent <= 100)
            .map(|percent| (cpus * percent).div_ceil(100).max(1)),
        None => text
            .parse::<usize>()
            .ok()
            .filter(|number| *number <= 4096)
            .map(|number| {
                if number == 0 {
                    cpus
                } else {
                    number.min(usable)
                }
            }),
    };
    wanted.ok_or_else(|| {
        let reason = "expected a number from 0 (all CPUs) to 4096, or 0% to 100%";
        BadSetting {
            name: "ZTUNNEL_WORKER_THREADS".to_owned(),
            value: text,
            reason: reason.to_owned(),
        }
        .into()
    })
}

/// What the data path does its operations with.
pub(super) fn backend(environment: &Environment<'_>) -> Result<Backend, ConfigError> {
    let backends = [
        ("auto", Backend::Auto),
        ("io_uring", Backend::IoUring),
        ("epoll", Backend::Epoll),
    ];
    let chosen = environment.one_of("ZTUNNEL_RUNTIME_BACKEND", &backends)?;
    Ok(chosen.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_by_number_and_percentage() {
        let count = |value: &str, cpus| {
            workers(
                &Environment::of(&[("ZTUNNEL_WORKER_THREADS", value)]),
                cpus,
                None,
            )
        };
        let cases = [
            ("", 8, 8),
            ("0", 8, 8),
            ("3", 8, 3),
            ("25%", 8, 2),
            ("1%", 8, 1),
            ("99", 4, 4),
        ];
        for (value, cpus, expected) in cases {
            assert_eq!(count(value, cpus).unwrap(), expected, "{value} of {cpus}");
        }
        for value in ["many", "-1", "101%", "%"] {
            assert!(count(value, 8).is_err(), "{value}");
        }
    }

    #[test]
    fn workers_follow_the_cpu_limit_unless_told_otherwise() {
        let count =
            |pairs: &[(&str, &str)], group| workers(&Environment::of(pairs), 8, group).unwrap();
        assert_eq!(count(&[], None), 8);
        assert_eq!(count(&[], Some(2)), 2);
        assert_eq!(count(&[], Some(64)), 8);
        assert_eq!(count(&[("ZTUNNEL_CPU_LIMIT", "3")], Some(2)), 3);
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "50%")], Some(4)), 2);
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "0")], Some(4)), 4);
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "6")], Some(2)), 6);
    }
}
