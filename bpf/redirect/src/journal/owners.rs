//! Which captured pod has which address.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::error::{Error, Result};
use crate::settings::Pod;

/// Who has which address.
#[derive(Debug, Default)]
pub(crate) struct Owners(HashMap<IpAddr, String>);

impl Owners {
    /// Notes the pod's addresses.
    pub(crate) fn add(&mut self, pod: &Pod) {
        let addresses = pod.addresses.iter();
        self.0
            .extend(addresses.map(|address| (*address, pod.uid.clone())));
    }

    /// Refuses a pod that has an address of another one.
    pub(crate) fn check_free(&self, pod: &Pod) -> Result<()> {
        for address in &pod.addresses {
            if let Some(other) = self.0.get(address).filter(|other| **other != pod.uid) {
                return Err(Error::Setting {
                    field: "pods.addresses",
                    value: address.to_string(),
                    reason: format!("belongs to pod {other}"),
                });
            }
        }
        Ok(())
    }
}
