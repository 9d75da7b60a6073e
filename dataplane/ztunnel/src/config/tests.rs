use std::time::Duration;

use proxy::RedirectMode;
use rt::Backend;
use tls::RecordPath;

use super::*;

const LOCAL: [(&str, &str); 3] = [
    ("LOCAL_XDS", "workloads: []"),
    ("LOCAL_CA_CERT", "/a"),
    ("LOCAL_CA_KEY", "/b"),
];

fn with(extra: &[(&'static str, &'static str)]) -> Result<Settings, ConfigError> {
    let pairs: Vec<_> = LOCAL.iter().copied().chain(extra.iter().copied()).collect();
    read(&Environment::of(&pairs))
}

#[test]
fn defaults_are_upstreams() {
    let settings = with(&[]).unwrap();
    assert_eq!(settings.proxy.mode, RedirectMode::InPod);
    assert_eq!(settings.proxy.mark, Some(1337));
    assert_eq!(settings.proxy.client.stream_window, 4 << 20);
    assert_eq!(settings.proxy.server.connection_window, 16 << 20);
    assert_eq!(settings.proxy.client.max_concurrent_streams, 100);
    assert_eq!(settings.drain, Duration::from_secs(5));
    assert_eq!(settings.certificate_ttl, Duration::from_secs(86_400));
    assert_eq!(settings.tls_records, RecordPath::Own);
}

#[test]
fn tls_records_are_ours_or_rustls() {
    let name = "ZTUNNEL_TLS_RECORDS";
    let chosen = |value| with(&[(name, value)]).map(|settings| settings.tls_records);
    assert_eq!(chosen("own").unwrap(), RecordPath::Own);
    assert_eq!(chosen("rustls").unwrap(), RecordPath::Rustls);
    let error = chosen("ktls").unwrap_err().to_string();
    let expected = "ZTUNNEL_TLS_RECORDS=`ktls` is not valid: expected own or rustls";
    assert_eq!(error, expected);
}

#[test]
fn what_is_missing_or_not_supported_is_named() {
    let error = |pairs: &[(&str, &str)]| read(&Environment::of(pairs)).unwrap_err().to_string();
    assert!(error(&[]).contains("LOCAL_XDS_PATH"));
    assert!(error(&LOCAL[..1]).contains("LOCAL_CA_CERT"));
    assert!(error(&LOCAL[..2]).contains("LOCAL_CA_KEY"));
    for (name, value) in [
        ("XDS_ADDRESS", "https://istiod:15012"),
        ("SOCKMAP", "on"),
        ("SOCKMAP", "maybe"),
        ("TLS12_ENABLED", "true"),
        ("SAME_NODE_TUNNEL", "true"),
        ("SAME_NODE_TUNNEL", "perhaps"),
    ] {
        let text = with(&[(name, value)]).unwrap_err().to_string();
        assert!(
            text.contains(name) && text.contains(value) && !text.contains('\n'),
            "{text}"
        );
    }
    assert!(with(&[("XDS_ADDRESS", ""), ("SOCKMAP", "off")]).is_ok());
    let node = ("REDIRECT_MODE", "node");
    let map = ("ZTUNNEL_LISTENER_MAP", "/sys/fs/bpf/listeners");
    let sockmap = with(&[node, map, ("SOCKMAP", "on")]).unwrap();
    assert!(sockmap.proxy.sockmap.is_some());
    assert!(!sockmap.proxy.same_node_tunnel);
    let plain = with(&[node, map]).unwrap();
    assert!(plain.proxy.sockmap.is_none());
    let lacking = with(&[node, ("SOCKMAP", "on")]).unwrap_err().to_string();
    assert!(lacking.contains("ZTUNNEL_LISTENER_MAP"), "{lacking}");
    let tunnel = with(&[("REDIRECT_MODE", "node"), ("SAME_NODE_TUNNEL", "true")]);
    assert!(tunnel.unwrap().proxy.same_node_tunnel);
    let table = ("ZTUNNEL_POD_TABLE", "/run/agent/pods/table");
    assert!(with(&[node, table]).unwrap().proxy.pods.is_some());
    assert!(with(&[node]).unwrap().proxy.pods.is_none());
    let elsewhere = with(&[table]).unwrap_err().to_string();
    assert!(elsewhere.contains("REDIRECT_MODE=node"), "{elsewhere}");
}

#[test]
fn a_dedicated_proxy_knows_its_workload_and_takes_the_fake_ca() {
    let read = |extra: &[(&'static str, &'static str)]| {
        let base = [
            ("LOCAL_XDS", "workloads: []"),
            ("PROXY_MODE", "dedicated"),
            ("FAKE_CA", "true"),
            ("XDS_ADDRESS", ""),
        ];
        let pairs: Vec<_> = base.iter().chain(extra).copied().collect();
        read(&Environment::of(&pairs))
    };
    let workload = ("PROXY_WORKLOAD_INFO", "ns/pod/account");
    let settings = read(&[workload, ("ENABLE_ORIG_SRC", "true")]).unwrap();
    assert_eq!(settings.authority, AuthoritySource::Fake);
    assert_eq!(settings.transparent, Transparent::Required);
    assert_eq!(settings.proxy.mark, None);
    let name = settings.proxy.node.dedicated_to.clone().unwrap();
    assert_eq!((&*name.namespace, &*name.name), ("ns", "pod"));
    assert_eq!(&*name.service_account, "account");
    let files = read(&[workload, ("LOCAL_CA_CERT", "/a"), ("LOCAL_CA_KEY", "/b")]).unwrap();
    assert_eq!(files.transparent, Transparent::IfAllowed);
    assert_eq!(
        files.authority,
        AuthoritySource::Files("/a".into(), "/b".into())
    );
    let error = |extra: &[(&'static str, &'static str)]| read(extra).unwrap_err().to_string();
    assert!(error(&[]).contains("PROXY_WORKLOAD_INFO is not set"));
    for wrong in ["ns/pod", "ns//account", "a/b/c/d"] {
        let text = error(&[("PROXY_WORKLOAD_INFO", wrong)]);
        assert!(text.contains(wrong) && text.contains("expected"), "{text}");
    }
    assert!(error(&[workload, ("REDIRECT_MODE", "node")]).contains("REDIRECT_MODE"));
    let text = with(&[("FAKE_CA", "true")]).unwrap_err().to_string();
    assert!(text.contains("only PROXY_MODE=dedicated"), "{text}");
    assert!(with(&[workload]).is_err());
    assert!(with(&[("PROXY_MODE", "sidecar")]).is_err());
}

#[test]
fn the_back_end_can_be_forced() {
    let chosen = |value| with(&[("ZTUNNEL_RUNTIME_BACKEND", value)]).map(|s| s.backend);
    assert_eq!(with(&[]).unwrap().backend, Backend::Auto);
    assert_eq!(chosen("epoll").unwrap(), Backend::Epoll);
    assert_eq!(chosen("io_uring").unwrap(), Backend::IoUring);
    let text = chosen("kqueue").unwrap_err().to_string();
    assert!(text.contains("auto or io_uring or epoll"), "{text}");
}

#[test]
fn busy_polling_is_off_and_bounded() {
    let chosen = |value| with(&[("ZTUNNEL_BUSY_POLL_US", value)]).map(|s| s.runtime());
    assert_eq!(with(&[]).unwrap().runtime().busy_poll, Duration::ZERO);
    assert_eq!(chosen("50").unwrap().busy_poll, Duration::from_micros(50));
    let text = chosen("1001").unwrap_err().to_string();
    assert!(text.contains("from 0 to 1000"), "{text}");
}

#[test]
fn drain_time_follows_the_grace_period() {
    for (grace, seconds) in [("30", 25), ("11", 6), ("10", 9), ("1", 1), ("0", 1)] {
        let settings = with(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap();
        assert_eq!(settings.drain, Duration::from_secs(seconds), "{grace}");
    }
}
