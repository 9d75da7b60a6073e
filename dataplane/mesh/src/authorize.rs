//! May this connection reach this workload?
//!
//! Order: an enforced DENY policy that matches denies; without any enforced ALLOW policy
//! everything else is allowed; otherwise one of them must match. Policies in dry run change
//! nothing and are reported.

use std::fmt;
use std::sync::Arc;

use crate::policy::{Action, ConnectionFacts, Policy, PolicySet};
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// The outcome of authorization.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// The connection may proceed.
    Allow,
    /// It may not.
    Deny(DenyReason),
}

/// Why a connection was denied; `Display` is the text for logs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DenyReason {
    /// This DENY policy matched.
    Policy(Arc<Policy>),
    /// ALLOW policies apply to the workload and none matched.
    NotAllowed,
    /// The destination is not (or no longer) part of the configuration.
    UnknownWorkload,
}

/// What a policy in dry run would have done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DryRun {
    /// The policy.
    pub policy: Arc<Policy>,
    /// Whether it matched: a DENY that matches would have denied, an ALLOW allowed.
    pub matched: bool,
}

/// A verdict and what the policies in dry run would have said.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Decision {
    /// The outcome.
    pub verdict: Verdict,
    /// Policies in dry run that were evaluated; DENY ones first. Empty, and not allocated,
    /// where none applies.
    pub dry_run: Vec<DryRun>,
}

impl Snapshot {
    /// Decides whether a connection may reach `destination`, by the policies of this snapshot
    /// (`destination` may come from an older one).
    pub fn authorize(&self, destination: &Workload, facts: &ConnectionFacts<'_>) -> Verdict {
        match self.current(destination) {
            Some(workload) => workload.policies.verdict(facts),
            None => Verdict::Deny(DenyReason::UnknownWorkload),
        }
    }

    /// As [`Snapshot::authorize`], with what policies in dry run would have said, for logging.
    pub fn evaluate(&self, destination: &Workload, facts: &ConnectionFacts<'_>) -> Decision {
        let verdict = self.authorize(destination, facts);
        let dry_run = self.current(destination).map_or_else(Vec::new, |workload| {
            workload.policies.dry_run(facts, &verdict)
        });
        Decision { verdict, dry_run }
    }

    /// Whether any policy, enforced or not, applies to `destination`. Where none does,
    /// connections need not be re-authorized when policies change.
    pub fn has_policies(&self, destination: &Workload) -> bool {
        self.current(destination)
            .is_some_and(|workload| !workload.policies.is_empty())
    }
}

impl PolicySet {
    fn verdict(&self, facts: &ConnectionFacts<'_>) -> Verdict {
        if let Some(policy) = self.deny.iter().find(|policy| policy.matches(facts)) {
            return Verdict::Deny(DenyReason::Policy(policy.clone()));
        }
        if self.allow.is_empty() || self.allow.iter().any(|policy| policy.matches(facts)) {
            return Verdict::Allow;
        }
        Verdict::Deny(DenyReason::NotAllowed)
    }

    /// DENY policies in dry run come before enforced ones, ALLOW ones after them: the latter are
    /// not reached by a connection that an enforced DENY rejects.
    fn dry_run(&self, facts: &ConnectionFacts<'_>, verdict: &Verdict) -> Vec<DryRun> {
        let denied = matches!(verdict, Verdict::Deny(DenyReason::Policy(_)));
        let reached = self
            .dry_run
            .iter()
            .filter(|policy| !(denied && policy.action == Action::Allow));
        reached
            .map(|policy| DryRun {
                policy: policy.clone(),
                matched: policy.matches(facts),
            })
            .collect()
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => {
                write!(
                    f,
                    "explicitly denied by: {}/{}",
                    policy.namespace, policy.name
                )
            }
            Self::NotAllowed => f.write_str("allow policies exist, but none allowed"),
            Self::UnknownWorkload => f.write_str("workload not found"),
        }
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let effect = match (self.policy.action, self.matched) {
            (Action::Deny, true) => "would deny",
            (Action::Allow, true) => "would allow",
            (_, false) => "would not match",
        };
        write!(
            f,
            "dry run: {}/{} {effect}",
            self.policy.namespace, self.policy.name
        )
    }
}
