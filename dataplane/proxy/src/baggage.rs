//! Headers that describe a connection to the other proxy.

use std::net::SocketAddr;

use mesh::{Service, Workload};

/// `baggage` of a workload: upstream's keys in upstream's order, empty values left out.
pub(crate) fn baggage(workload: &Workload) -> String {
    let name = match &*workload.workload_type {
        "deployment" => "k8s.deployment.name",
        "cronjob" => "k8s.cronjob.name",
        "job" => "k8s.job.name",
        _ => "k8s.pod.name",
    };
    let pairs: [(&str, &str); 7] = [
        ("k8s.cluster.name", &workload.cluster_id),
        ("k8s.namespace.name", &workload.namespace),
        (name, &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ];
    let mut text = String::with_capacity(224);
    for (key, value) in pairs {
        if value.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push(',');
        }
        for part in [key, "=", value] {
            text.push_str(part);
        }
    }
    text
}

/// `forwarded` (RFC 7239): the client, and the service it asked for.
pub(crate) fn forwarded(src: SocketAddr, service: Option<&Service>) -> String {
    match service {
        Some(service) => format!("for=\"{src}\";host={}", service.hostname),
        None => format!("for=\"{src}\""),
    }
}

/// `traceparent` (W3C Trace Context) with random identifiers, not sampled.
pub(crate) fn traceparent(random: [u64; 3]) -> String {
    let [high, low, parent] = random;
    let mut text = String::with_capacity(55);
    text.push_str("00-");
    hex(&mut text, high);
    hex(&mut text, low);
    text.push('-');
    hex(&mut text, parent | 1);
    text.push_str("-00");
    text
}

fn hex(text: &mut String, number: u64) {
    for shift in (0..16).rev() {
        let digit = (number >> (shift * 4)) & 0xf;
        text.push(char::from(b"0123456789abcdef"[digit as usize]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents_are_of_the_specified_form() {
        let random = [0x0af7_6519_16cd_43dd, 0x0448_eb21_1c80_319c, 0];
        let expected = "00-0af7651916cd43dd0448eb211c80319c-0000000000000001-00";
        assert_eq!(traceparent(random), expected);
        let random = [u64::MAX, 1, u64::MAX];
        let expected = format!("00-{:016x}{:016x}-{:016x}-00", u64::MAX, 1, u64::MAX);
        assert_eq!(traceparent(random), expected);
    }

    #[test]
    fn baggage_names_what_is_known() {
        let yaml = "workloads:\n- {uid: u, name: web-1, namespace: shop, serviceAccount: web, \
             workloadIps: [10.0.0.1], workloadType: WORKLOADTYPE, workloadName: web, \
             canonicalName: web, clusterId: c1, node: n}\n";
        for (kind, key) in [
            ("deployment", "k8s.deployment.name"),
            ("cronjob", "k8s.cronjob.name"),
            ("job", "k8s.job.name"),
            ("pod", "k8s.pod.name"),
        ] {
            let yaml = yaml.replace("WORKLOADTYPE", kind);
            let snapshot = control::local::parse("test", &yaml).unwrap();
            let ip = std::net::Ipv4Addr::new(10, 0, 0, 1).into();
            let workload = snapshot.workload_by_ip("", ip).unwrap();
            let text = baggage(workload);
            let expected =
                format!("k8s.cluster.name=c1,k8s.namespace.name=shop,{key}=web,service.name=web");
            assert!(text.starts_with(&expected), "{text}");
            assert!(!text.contains("cloud."), "{text}");
        }
    }
}
