//! What uses the sockmap and what does not.

use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use redirect::sockmap;

use crate::support::{Net, Peer, ZTUNNEL, ZTUNNEL6, can_run, connect, eventually, exchange};

#[test]
fn both_directions_of_both_families_take_the_sockmap() {
    if !can_run("both_directions_of_both_families_take_the_sockmap") {
        return;
    }
    let net = Net::up();
    let mut sent = 0;
    for address in [IpAddr::V4(ZTUNNEL), IpAddr::V6(ZTUNNEL6)] {
        let listener = net.listener(address);
        let (mut app, mut zt) = net.connect(&listener);
        for size in [1, 100, 5000, 60_000] {
            exchange(&mut app, &mut zt, &vec![7; size]);
            exchange(&mut zt, &mut app, &vec![8; size]);
            sent += size as u64;
        }
    }
    let counters = net.status().counters;
    assert_eq!(counters["to_ztunnel_bytes"], sent, "{counters:?}");
    assert_eq!(counters["to_pod_bytes"], sent, "{counters:?}");
    assert_eq!(counters["bypassed_bytes"], 0, "{counters:?}");
    assert_eq!(counters["sockets"], 4, "{counters:?}");
}

#[test]
fn strangers_and_blocking_applications_use_tcp() {
    if !can_run("strangers_and_blocking_applications_use_tcp") {
        return;
    }
    let mut net = Net::up();
    let listener = net.listener(IpAddr::V4(ZTUNNEL));
    let to = listener.local_addr().unwrap();
    // Blocks: not in the map at all, so that its recv(2) stays as it is.
    let mut app = Peer(net.on("pod", || connect(to, true)));
    let mut zt = Peer(listener.accept().unwrap().0);
    for _ in 0..20 {
        exchange(&mut app, &mut zt, b"question");
        exchange(&mut zt, &mut app, b"answer");
    }
    assert_eq!(net.counter("refused"), 2);
    // Not ztunnel: within the pod, with the pod's address on both ends.
    let own = net.on("pod", || {
        std::net::TcpListener::bind(("10.99.0.11", 0)).unwrap()
    });
    let to = own.local_addr().unwrap();
    let mut app = Peer(net.on("pod", || connect(to, false)));
    let mut other = Peer(own.accept().unwrap().0);
    exchange(&mut app, &mut other, b"private");
    net.sockmap.as_mut().unwrap().set_pods(&[]).unwrap();
    let (mut app, mut zt) = net.connect(&listener);
    exchange(&mut app, &mut zt, b"no pod of ours");
    let counters = net.status().counters;
    assert_eq!(counters["to_ztunnel_bytes"], 0, "{counters:?}");
    assert_eq!(counters["to_pod_bytes"], 0, "{counters:?}");
}

#[test]
fn a_connection_is_given_back_to_tcp_with_its_data_whole() {
    if !can_run("a_connection_is_given_back_to_tcp_with_its_data_whole") {
        return;
    }
    let net = Net::up();
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    exchange(&mut zt, &mut app, b"answer");
    assert_eq!(net.sockets_in_maps(), 2);
    // Unread sockmap data, then more than the budget, which goes by TCP, in this order.
    app.write_all(b"unread ").unwrap();
    let bulk = vec![9; 1 << 20];
    thread::scope(|scope| {
        scope.spawn(|| app.write_all(&bulk).unwrap());
        thread::sleep(Duration::from_millis(100));
        zt.expect(b"unread ");
        zt.expect(&bulk);
    });
    assert_eq!(net.counter("demoted_budget"), 1);
    // Both leave the map as they go on talking; nothing is lost meanwhile.
    eventually("both sockets leave the maps", || {
        exchange(&mut app, &mut zt, b"question");
        exchange(&mut zt, &mut app, b"answer");
        net.sockets_in_maps() == 0
    });
    let redirected = net.counter("to_ztunnel_bytes");
    exchange(&mut app, &mut zt, b"by TCP for ever");
    assert_eq!(net.counter("to_ztunnel_bytes"), redirected);
}

#[test]
fn removing_the_sockmap_loses_nothing() {
    if !can_run("removing_the_sockmap_loses_nothing") {
        return;
    }
    let mut net = Net::up();
    let (mut app, mut zt) = net.pair();
    let (mut idle, mut idle_zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    exchange(&mut zt, &mut app, b"answer");
    app.write_all(b"unread ").unwrap();
    drop(net.sockmap.take());
    sockmap::remove(&net.bpffs()).unwrap();
    // What has unread data keeps its pin.
    assert!(sockmap::status(&net.bpffs()).unwrap().is_none());
    zt.write_all(b"by TCP").unwrap();
    app.expect(b"by TCP");
    app.write_all(b"and this").unwrap();
    zt.expect(b"unread and this");
    exchange(&mut idle, &mut idle_zt, b"by TCP");
    drop((app, zt, idle, idle_zt));
    // Another test that starts a program holds copies of these sockets for a moment.
    eventually("the pin goes with its sockets", || {
        sockmap::remove(&net.bpffs()).unwrap();
        !net.bpffs().join("sockmap").exists()
    });
    // And it can be installed again.
    let net = net.install();
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    assert!(net.counter("to_ztunnel_bytes") > 0);
}

#[test]
fn installing_again_adopts_what_is_there() {
    if !can_run("installing_again_adopts_what_is_there") {
        return;
    }
    let mut net = Net::up();
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    app.write_all(b"unread ").unwrap();
    drop(net.sockmap.take());
    let net = net.install();
    app.write_all(b"and this").unwrap();
    zt.expect(b"unread and this");
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    let counters = net.status().counters;
    assert_eq!(counters["bypassed_bytes"], 0, "{counters:?}");
}

/// What another version has left cannot be taken over: it enters no more sockets, so that nobody
/// has to know by which rules it would.
#[test]
fn maps_of_another_version_turn_it_off() {
    if !can_run("maps_of_another_version_turn_it_off") {
        return;
    }
    let mut net = Net::up();
    drop(net.sockmap.take());
    let pins = net.bpffs().join("sockmap");
    let [senders, targets, kept] =
        ["shortcut_senders", "shortcut_targets", "kept"].map(|name| pins.join(name));
    std::fs::rename(&senders, &kept).unwrap();
    std::fs::hard_link(&targets, &senders).unwrap(); // four-byte values
    let error = sockmap::Sockmap::install(&net.settings()).unwrap_err();
    assert!(error.to_string().contains("another version"), "{error}");
    assert!(!net.status().enabled);
    let before = net.counter("sockets");
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    assert_eq!(net.counter("sockets"), before);
    std::fs::remove_file(&senders).unwrap();
    std::fs::rename(&kept, &senders).unwrap();
}

/// Somebody removes all pins while data is on its way: it arrives, and new connections get the
/// sockmap again.
#[test]
fn removed_pins_come_back_and_nothing_is_lost() {
    if !can_run("removed_pins_come_back_and_nothing_is_lost") {
        return;
    }
    let mut net = Net::up();
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    app.write_all(b"unread ").unwrap();
    let sockmap = net.sockmap.take().unwrap();
    assert!(sockmap.is_current());
    for entry in std::fs::read_dir(net.bpffs().join("sockmap")).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert!(!sockmap.is_current());
    sockmap.pin_again().unwrap();
    drop(sockmap);
    let net = net.install();
    assert!(net.sockmap.as_ref().unwrap().is_current());
    app.write_all(b"and this").unwrap();
    zt.expect(b"unread and this");
    let before = net.counter("to_ztunnel_bytes");
    assert!(before > 0);
    let (mut app, mut zt) = net.pair();
    exchange(&mut app, &mut zt, b"question");
    assert!(net.counter("to_ztunnel_bytes") > before);
}
