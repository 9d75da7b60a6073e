//! The journal on disk.

use super::*;

fn journal(dir: &Path) -> Journal {
    let node = Netns::node().unwrap();
    let mut journal = Journal::open(dir, Redirect::Ebpf).unwrap();
    journal.begin(&node, &node).unwrap();
    journal
}

fn touch(path: &Path) -> Undo {
    fs::write(path, "").unwrap();
    Undo::Pin {
        path: path.to_owned(),
    }
}

#[test]
fn rollback_takes_back_only_what_is_newer() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut j = journal(dir.path());
    j.record(None, touch(&a)).unwrap();
    let mark = j.mark();
    j.record(Some("pod"), touch(&b)).unwrap();
    j.record(Some("pod"), Undo::Pin { path: a.clone() })
        .unwrap();
    j.rollback(mark);
    assert!(a.exists() && !b.exists());
    drop(j);
    // Another process finds the rest.
    let mut j = Journal::open(dir.path(), Redirect::Ebpf).unwrap();
    j.undo_all().unwrap();
    assert!(!a.exists() && !dir.path().join(FILE).exists());
}

#[test]
fn what_cannot_be_removed_stays_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    let mut j = journal(dir.path());
    j.record(None, Undo::Pin { path: full.clone() }).unwrap();
    assert!(j.undo_all().is_err());
    fs::remove_dir(&full).unwrap();
    fs::write(&full, "").unwrap();
    Journal::open(dir.path(), Redirect::Ebpf)
        .unwrap()
        .undo_all()
        .unwrap();
    assert!(!full.exists());
}

#[test]
fn a_directory_with_files_of_others_stays_and_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("theirs"), "").unwrap();
    let mut j = journal(dir.path());
    let path = shared.clone();
    j.record(None, Undo::Directory { path }).unwrap();
    j.undo_all().unwrap();
    assert!(shared.join("theirs").exists());
}

#[test]
fn another_back_end_and_damage_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    journal(dir.path());
    let node = Netns::node().unwrap();
    let mut other = Journal::open(dir.path(), Redirect::Tunnel).unwrap();
    let error = other.begin(&node, &node).unwrap_err();
    assert!(matches!(error, Error::OtherBackEnd { .. }), "{error}");
    fs::write(dir.path().join(FILE), "{").unwrap();
    let error = Journal::open(dir.path(), Redirect::Ebpf)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("damaged") && !error.contains('\n'),
        "{error}"
    );
}

#[test]
fn the_oldest_sysctl_value_is_kept() {
    let node = Netns::node().unwrap();
    let undo = |value: &str| Undo::Sysctl {
        netns: node.clone(),
        name: "net/x".into(),
        value: value.into(),
    };
    assert_eq!(undo("1").subject(), undo("0").subject());
    let dir = tempfile::tempdir().unwrap();
    let mut j = journal(dir.path());
    j.record(None, undo("1")).unwrap();
    j.record(None, undo("0")).unwrap();
    assert_eq!(j.mark(), 1);
    assert_eq!(j.content.as_ref().unwrap().entries[0].undo, undo("1"));
}

/// As the release before the enum of back ends wrote it, and one before that, which knew of
/// fewer fields.
fn earlier(redirect: &str, detail: &str) -> String {
    let inode = Netns::node().unwrap().inode();
    format!(
        r#"{{
  "redirect": "{redirect}",
  "node": {{ "path": null, "inode": {inode} }},
  "detail": {detail},
  "pods": [],
  "entries": [{{ "owner": null, "undo": "pin", "path": "/no/such" }}]
}}"#
    )
}

#[test]
fn journals_of_earlier_releases_are_read_and_written_alike() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(FILE);
    let node = Netns::node().unwrap();
    let vxlan = Tunnels {
        driver: crate::back_end::Driver::Vxlan,
        port: 6082,
    };
    let cases = [
        (Redirect::Ebpf, "\"tcx\"", Some(AttachedBy::Tcx), None),
        (Redirect::Ebpf, "\"clsact\"", Some(AttachedBy::Clsact), None),
        (Redirect::Ebpf, "null", None, None),
        (Redirect::Tunnel, "\"vxlan:6082\"", None, Some(vxlan)),
        (Redirect::Tunnel, "null", None, None),
    ];
    for (redirect, detail, attached_by, tunnels) in cases {
        fs::write(&file, earlier(redirect.name(), detail)).unwrap();
        let mut j = Journal::open(dir.path(), redirect).unwrap();
        assert!(j.is_installed());
        assert_eq!((j.attached_by(), j.tunnels()), (attached_by, tunnels));
        j.begin(&node, &node).unwrap();
        let written: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let detail: serde_json::Value = serde_json::from_str(detail).unwrap();
        assert_eq!(written["redirect"], redirect.name());
        assert_eq!(written["detail"], detail);
        assert_eq!(written["entries"][0]["undo"], "pin");
        assert_eq!(j.mark(), 1);
    }
    // What a later release may have found out does not keep this one from cleaning up.
    fs::write(&file, earlier("ebpf", "\"netkit\"")).unwrap();
    let mut j = Journal::open(dir.path(), Redirect::Ebpf).unwrap();
    assert_eq!(j.attached_by(), None);
    j.undo_all().unwrap();
    assert!(!file.exists());
}
