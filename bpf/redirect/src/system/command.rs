//! Running `ip`, `iptables-restore`, `ipset` and `tc`.

use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::error::{Error, Result, join_lines};

/// Where the tools are on the distributions we know, whatever the caller's PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs `program` in the calling thread's network namespace and returns its standard output.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String> {
    run_with_input(program, args, "")
}

/// As [`run`], with standard input.
pub(crate) fn run_with_input(program: &str, args: &[&str], input: &str) -> Result<String> {
    let failed = |outcome: String| Error::Command {
        command: format!("{program} {}", args.join(" ")),
        outcome,
    };
    let mut child = Command::new(program)
        .args(args)
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("{error}: is the tool installed?")))?;
    // The tools read their whole input before they write more than a pipe holds. One that ends
    // early gives EPIPE here; its exit status below says why.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = join_lines(&String::from_utf8_lossy(&output.stderr));
    Err(failed(format!("{}: {stderr}", output.status)))
}

/// `ip` with the words of `line`; no word may hold a blank.
pub(crate) fn ip(line: &str) -> Result<String> {
    run("ip", &line.split_whitespace().collect::<Vec<_>>())
}

/// Whether the error says that what was to be removed is not there.
pub(crate) fn is_missing(error: &Error) -> bool {
    const SIGNS: [&str; 10] = [
        "No such process",
        "No such file",
        "Cannot find device",
        "does not exist",
        "No chain/target/match",
        "No such device",
        "not found",
        "FIB table does not exist",
        // tc, of a qdisc that is gone.
        "doesn't exist",
        "Cannot find specified",
    ];
    match error {
        Error::Command { outcome, .. } => SIGNS.iter().any(|sign| outcome.contains(sign)),
        _ => false,
    }
}

/// Whether the error says that what was to be made is there already.
pub(crate) fn is_present(error: &Error) -> bool {
    matches!(error, Error::Command { outcome, .. } if outcome.contains("File exists"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_carry_the_command_and_its_stderr_on_one_line() {
        let error = run("sh", &["-c", "echo one >&2; echo two >&2; exit 3"]).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("sh -c"), "{text}");
        assert!(
            text.contains("exit status: 3") && text.ends_with("one; two"),
            "{text}"
        );
        assert!(!text.contains('\n'));
        let missing = run("no-such-tool", &[]).unwrap_err().to_string();
        assert!(missing.contains("is the tool installed"), "{missing}");
    }

    #[test]
    fn input_reaches_the_command() {
        assert_eq!(
            run_with_input("cat", &[], "some lines\n").unwrap(),
            "some lines\n"
        );
    }
}
