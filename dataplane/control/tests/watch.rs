//! Following a file: reload, keep the last good configuration, recover.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use control::{LocalConfig, SnapshotPublisher, watch};

const INTERVAL: Duration = Duration::from_millis(20);

fn mesh(ip: &str) -> String {
    format!("workloads:\n- {{uid: w, name: w, namespace: n, workloadIps: [{ip}]}}\n")
}

fn ip_of(publisher: &SnapshotPublisher) -> String {
    publisher.snapshot().workloads()[0].workload_ips[0].to_string()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "timed out waiting until {what}"
        );
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Runs `test` on a current-thread runtime beside a watcher of `path`.
fn watching<F: Future<Output = ()>>(path: &Path, test: impl FnOnce(SnapshotPublisher) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (publisher, watcher) = watch::open(&LocalConfig::File(path.into())).unwrap();
        let watcher = tokio::spawn(watcher.unwrap().with_interval(INTERVAL).run());
        test(publisher).await;
        assert!(!watcher.is_finished());
        watcher.abort();
    });
}

#[test]
fn changes_are_published_and_mistakes_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    fs::write(&path, mesh("10.0.0.1")).unwrap();
    watching(&path.clone(), |publisher| async move {
        let calls = Arc::new(AtomicU64::new(0));
        let counter = calls.clone();
        publisher.on_change(Box::new(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        assert_eq!(
            (ip_of(&publisher).as_str(), publisher.status().generation),
            ("10.0.0.1", 1)
        );

        fs::write(&path, mesh("10.0.0.2")).unwrap();
        until("the change is published", || {
            publisher.status().generation == 2
        })
        .await;
        assert_eq!(ip_of(&publisher), "10.0.0.2");

        fs::write(&path, mesh("10.0.0.2") + "nonsense: true\n").unwrap();
        until("the mistake is refused", || publisher.status().errors == 1).await;
        let error = publisher.status().last_error.unwrap();
        assert!(
            error.contains("mesh.yaml:3:1: unknown field `nonsense`"),
            "{error}"
        );
        assert_eq!(
            (ip_of(&publisher).as_str(), publisher.status().generation),
            ("10.0.0.2", 2)
        );

        // Reported once, not at every look.
        tokio::time::sleep(INTERVAL * 10).await;
        assert_eq!(publisher.status().errors, 1);

        fs::write(&path, mesh("10.0.0.3")).unwrap();
        until("the correction is published", || {
            publisher.status().generation == 3
        })
        .await;
        assert_eq!(publisher.status().last_error, None);
        assert_eq!(ip_of(&publisher), "10.0.0.3");
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    });
}

#[test]
fn a_file_may_be_replaced_removed_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    fs::write(&path, mesh("10.0.0.1")).unwrap();
    watching(&path.clone(), |publisher| async move {
        // Same length; renamed over, as editors and config maps do.
        let next = path.with_extension("new");
        fs::write(&next, mesh("10.0.0.2")).unwrap();
        fs::rename(&next, &path).unwrap();
        until("the replacement is published", || {
            publisher.status().generation == 2
        })
        .await;
        assert_eq!(ip_of(&publisher), "10.0.0.2");

        fs::remove_file(&path).unwrap();
        until("the loss is noticed", || publisher.status().errors == 1).await;
        assert_eq!(ip_of(&publisher), "10.0.0.2");

        fs::write(&path, "").unwrap();
        until("the empty file is refused", || {
            publisher.status().errors == 2
        })
        .await;
        assert_eq!(ip_of(&publisher), "10.0.0.2");

        fs::write(&path, mesh("10.0.0.4")).unwrap();
        until("the file is back", || publisher.status().generation == 3).await;
        assert_eq!(ip_of(&publisher), "10.0.0.4");
    });
}

#[test]
fn a_symbolic_link_may_be_switched() {
    let dir = tempfile::tempdir().unwrap();
    for (name, ip) in [("one", "10.0.0.1"), ("two", "10.0.0.2")] {
        fs::write(dir.path().join(name), mesh(ip)).unwrap();
    }
    let path = dir.path().join("mesh.yaml");
    std::os::unix::fs::symlink(dir.path().join("one"), &path).unwrap();
    let target = dir.path().join("two");
    watching(&path.clone(), |publisher| async move {
        let next = path.with_extension("new");
        std::os::unix::fs::symlink(target, &next).unwrap();
        fs::rename(&next, &path).unwrap();
        until("the other file is published", || {
            publisher.status().generation == 2
        })
        .await;
        assert_eq!(ip_of(&publisher), "10.0.0.2");
    });
}

#[test]
fn the_first_load_must_succeed() {
    let missing = LocalConfig::File("/nonexistent/mesh.yaml".into());
    assert!(watch::open(&missing).is_err());
    let (publisher, watcher) = watch::open(&LocalConfig::Inline(mesh("10.0.0.9"))).unwrap();
    assert!(watcher.is_none());
    assert_eq!(ip_of(&publisher), "10.0.0.9");
}
