//! Authorization policies and how one of them matches a connection.
//!
//! Structure: a policy matches if any rule does; a rule if all its clauses do; a clause if any
//! of its matches does or it has none; a match if all its fields do. Values within a field are
//! alternatives. Each field has a `not_` twin that must hold too: an empty field holds, a
//! `not_` field holds if none of its values matches. A match without any field never matches.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::Cidr;
use crate::identity::Identity;

/// An authorization policy. Absent fields: scope and action as in the control plane's protocol
/// (`Global`, `Allow`), no rules, enforced.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    /// Name, unique in its namespace.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Which workloads it applies to.
    #[serde(default)]
    pub scope: PolicyScope,
    /// What a match means.
    #[serde(default)]
    pub action: Action,
    /// Report what the policy would do, but do not do it.
    #[serde(default)]
    pub dry_run: bool,
    /// Rules, each a list of clauses, each a list of matches.
    #[serde(default)]
    pub rules: Vec<Vec<Vec<Match>>>,
}

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum PolicyScope {
    /// All.
    #[default]
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it in their `authorizationPolicies`.
    WorkloadSelector,
}

/// What a policy's match means.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum Action {
    /// The connection is allowed.
    #[default]
    Allow,
    /// The connection is denied.
    Deny,
}

/// Conditions on one connection. Source addresses are those of the TCP peer (for tunnelled
/// connections: of the tunnel), destinations the application's own address and port.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Match {
    /// Source namespaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<StringMatch>,
    /// Excluded source namespaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<StringMatch>,
    /// Source service accounts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Excluded source service accounts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Source identities, without `spiffe://`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch>,
    /// Excluded source identities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch>,
    /// Source addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<Cidr>,
    /// Excluded source addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_source_ips: Vec<Cidr>,
    /// Destination addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ips: Vec<Cidr>,
    /// Excluded destination addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ips: Vec<Cidr>,
    /// Destination ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ports: Vec<u16>,
    /// Excluded destination ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ports: Vec<u16>,
}

/// A condition on text. Text that is absent (no identity) matches none of them.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Begins with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Not empty. Written `Presence: []`.
    Presence(),
}

/// A service account of a namespace, both exact.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountMatch {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
}

/// What is known of a connection when it is authorized.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionFacts<'a> {
    /// Identity the peer proved by mTLS; none for plain text.
    pub identity: Option<&'a Identity>,
    /// Address of the TCP peer.
    pub src: IpAddr,
    /// Address and port of the application.
    pub dst: SocketAddr,
}

/// Policies of a workload. Workloads with the same ones share a set.
#[derive(Debug, Default)]
pub(crate) struct PolicySet {
    pub(crate) deny: Vec<Arc<Policy>>,
    pub(crate) allow: Vec<Arc<Policy>>,
    /// Those in dry run, DENY first.
    pub(crate) dry_run: Vec<Arc<Policy>>,
}

impl PolicySet {
    pub(crate) fn new(policies: impl Iterator<Item = Arc<Policy>>) -> Self {
        let mut set = Self::default();
        for policy in policies {
            match (policy.dry_run, policy.action) {
                (true, _) => set.dry_run.push(policy),
                (false, Action::Deny) => set.deny.push(policy),
                (false, Action::Allow) => set.allow.push(policy),
            }
        }
        set.dry_run
            .sort_by_key(|policy| policy.action == Action::Allow);
        set
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.deny.is_empty() && self.allow.is_empty() && self.dry_run.is_empty()
    }
}

impl Policy {
    /// Whether the policy's rules match a connection.
    pub fn matches(&self, facts: &ConnectionFacts<'_>) -> bool {
        self.rules.iter().any(|clauses| {
            clauses
                .iter()
                .all(|matches| matches.is_empty() || matches.iter().any(|one| one.matches(facts)))
        })
    }

    /// `namespace/name`, as messages and workloads refer to it.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl Match {
    fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.not_namespaces.is_empty()
            && self.service_accounts.is_empty()
            && self.not_service_accounts.is_empty()
            && self.principals.is_empty()
            && self.not_principals.is_empty()
            && self.source_ips.is_empty()
            && self.not_source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.not_destination_ips.is_empty()
            && self.destination_ports.is_empty()
            && self.not_destination_ports.is_empty()
    }

    fn matches(&self, facts: &ConnectionFacts<'_>) -> bool {
        if self.is_empty() {
            return false;
        }
        let (src, dst, port) = (
            facts.src.to_canonical(),
            facts.dst.ip().to_canonical(),
            facts.dst.port(),
        );
        let namespace = facts.identity.map(Identity::namespace);
        let principal = facts.identity.map(Identity::principal);
        // Cheapest first: ports and addresses decide most policies.
        holds(&self.destination_ports, &self.not_destination_ports, |p| {
            *p == port
        }) && holds(&self.source_ips, &self.not_source_ips, |c| c.contains(src))
            && holds(&self.destination_ips, &self.not_destination_ips, |c| {
                c.contains(dst)
            })
            && holds(&self.namespaces, &self.not_namespaces, |m| {
                m.matches(namespace)
            })
            && holds(&self.principals, &self.not_principals, |m| {
                m.matches(principal)
            })
            && holds(&self.service_accounts, &self.not_service_accounts, |m| {
                facts.identity.is_some_and(|identity| m.matches(identity))
            })
    }
}

fn holds<T>(wanted: &[T], unwanted: &[T], matches: impl Fn(&T) -> bool) -> bool {
    (wanted.is_empty() || wanted.iter().any(&matches)) && !unwanted.iter().any(&matches)
}

impl StringMatch {
    fn matches(&self, text: Option<&str>) -> bool {
        text.is_some_and(|text| match self {
            Self::Exact(exact) => text == &**exact,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Presence() => !text.is_empty(),
        })
    }
}

impl ServiceAccountMatch {
    fn matches(&self, identity: &Identity) -> bool {
        *self.namespace == *identity.namespace()
            && *self.service_account == *identity.service_account()
    }
}
