//! What `status` prints.

use std::io::Write as _;

use redirect::{BackEnd, EbpfStatus, PodStatus, Status, Uncaptured};
use serde::Serialize;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::{lock, sockmap};

/// What `status --json` prints: the redirection's status and the agent's process id.
#[derive(Debug, Serialize)]
struct Report {
    /// Process id of `node-agent run`, if it runs.
    agent_pid: Option<u32>,
    #[serde(flatten)]
    status: Status,
    /// Of the sockmap, if it is installed.
    sockmap: Option<redirect::sockmap::Status>,
}

/// `status`.
pub(crate) fn print(config: &Config, json: bool) -> Result<()> {
    let report = Report {
        agent_pid: lock::running(&config.state_dir),
        status: config.redirection()?.status()?,
        sockmap: sockmap::status(config)?,
    };
    let text = if json {
        serde_json::to_string_pretty(&report).map_err(|e| Error::Output(e.into()))?
    } else {
        describe(&report)
    };
    writeln!(std::io::stdout(), "{}", text.trim_end()).map_err(Error::Output)
}

fn describe(report: &Report) -> String {
    let status = &report.status;
    let yes = |is: bool| if is { "yes" } else { "no" };
    let agent = report.agent_pid.map(|pid| pid.to_string());
    let mut lines = vec![
        format!("redirection: {}", status.back_end.redirect()),
        format!("installed:   {}", yes(status.installed)),
        format!("agent:       {}", agent.as_deref().unwrap_or("not running")),
    ];
    match &status.back_end {
        BackEnd::IptablesTunnel(own) => {
            lines.push(format!("variant:     {:?}", own.variant));
            let driver = own.driver.iter();
            lines.extend(driver.map(|driver| format!("tunnels:     {driver}")));
        }
        BackEnd::Ebpf(own) => {
            let by = own.attached_by.iter();
            lines.extend(by.map(|by| format!("attached by: {}", by.name())));
        }
    }
    lines.extend(status.pods.iter().map(describe_pod));
    lines.extend(status.not_captured.iter().map(describe_uncaptured));
    lines.push(format!("dns capture: {}", yes(status.dns)));
    if let BackEnd::Ebpf(own) = &status.back_end {
        describe_older(own, &mut lines);
    }
    for (program, reasons) in &status.counters {
        for (reason, count) in reasons {
            lines.push(format!("packets:     {program} {reason} {count}"));
        }
    }
    let owned = status.owned.iter();
    lines.extend(owned.map(|owned| format!("owns:        {owned}")));
    if let Some(sockmap) = &report.sockmap {
        describe_sockmap(sockmap, &mut lines);
    }
    lines.join("\n")
}

fn describe_older(status: &EbpfStatus, lines: &mut Vec<String>) {
    let (alone, broke) = (status.older_connections, status.older_connections_broken);
    if alone > 0 {
        lines.push(format!("older:       {alone} connections left alone"));
    }
    if broke > 0 {
        lines.push(format!(
            "older:       {broke} connections found no place and broke"
        ));
    }
}

fn describe_pod(pod: &PodStatus) -> String {
    let addresses: Vec<_> = pod.addresses.iter().map(ToString::to_string).collect();
    let missing = if pod.present {
        ""
    } else {
        " (interface missing)"
    };
    let (uid, interface) = (&pod.uid, &pod.host_interface);
    let addresses = addresses.join(",");
    format!("pod:         {uid} {addresses} {interface}{missing}")
}

fn describe_uncaptured(pod: &Uncaptured) -> String {
    let Uncaptured { uid, reason, .. } = pod;
    let interface = pod.host_interface.as_deref().unwrap_or("-");
    let cut_off = if pod.cut_off { ", cut off" } else { "" };
    let why = pod.why.name();
    format!("not captured: {uid} {interface} ({why}{cut_off}): {reason}")
}

fn describe_sockmap(sockmap: &redirect::sockmap::Status, lines: &mut Vec<String>) {
    let state = match (sockmap.enabled, sockmap.forced) {
        (false, _) => "off",
        (true, false) => "on",
        (true, true) => "on by force: this kernel's FIONREAD is wrong",
    };
    lines.push(format!("sockmap:     {state}"));
    let bound = sockmap.memory_max.iter();
    lines.extend(bound.map(|max| format!("sockmap:     below {} MiB of TCP memory", max >> 20)));
    for (counter, count) in &sockmap.counters {
        lines.push(format!("sockmap:     {counter} {count}"));
    }
}
