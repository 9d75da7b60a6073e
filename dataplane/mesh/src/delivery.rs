//! How a connection reaches the first pod on its route.
//!
//! What leaves a node meets redirection again where it arrives: at a captured pod that is the
//! proxy of the pod's node, which authorizes it. A proxy that serves all pods of its node from a
//! namespace of its own reaches them past their redirection, so for those it must be that proxy,
//! too: the verdict is the same wherever the pod is.

use std::net::{IpAddr, SocketAddr};

use crate::route::{Authority, Route};

/// How a connection reaches the first pod on its route.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Delivery {
    /// By the network: to where no pod is captured by this proxy.
    Network,
    /// In plain text to a captured pod of this node: as what arrives on port 15006.
    Plain(SocketAddr),
    /// To this address of a captured pod of this node, in one hop: as a request for it in a tunnel
    /// of the source's, which the pod's certificate would have to be accepted for.
    OneHop(SocketAddr),
    /// By a tunnel whose TCP connection this proxy takes itself: as what arrives at a captured pod
    /// of this node, on whatever port.
    OwnTunnel,
}

impl Route {
    /// How this route's connection is to be delivered by a proxy that captures the pods of its node
    /// at the addresses `is_captured` tells, and reaches them past their redirection. With `tunnel`
    /// such pods are reached by tunnels, too.
    pub fn delivery(&self, is_captured: impl Fn(IpAddr) -> bool, tunnel: bool) -> Delivery {
        match self {
            Self::Passthrough { dst } | Self::Tcp { dst, .. } => match is_captured(dst.ip()) {
                true => Delivery::Plain(*dst),
                false => Delivery::Network,
            },
            Self::Hbone { gateway, .. } if !is_captured(gateway.ip()) => Delivery::Network,
            Self::Hbone {
                authority: Authority::Address(target),
                to_waypoint: false,
                ..
            } if !tunnel => Delivery::OneHop(*target),
            Self::Hbone { .. } => Delivery::OwnTunnel,
        }
    }
}
