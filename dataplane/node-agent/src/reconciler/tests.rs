//! The reconciler on a node that is a table: pods whose capture fails, interfaces that come and
//! go, others that remove things, in any order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use redirect::{Counters, Failure, Pod, Status, Uncaptured, Why};

use super::*;
use crate::config::Config;
use crate::desired::{Desired, Entry};
use crate::reconcile::tests::{desired, entries, listed};
use crate::reconcile::{Observed, Plan};

const CONFIG: &str = "
redirect: ebpf
node: {interfaces: [und], address: 10.244.1.1, pod_cidrs: [10.244.0.0/16]}
ztunnel: {netns: /run/netns/z, interface: eth0, host_interface: vz, address: 10.244.1.2}
state_dir: /run/x
bpffs: /run/y
reconcile_s: 10
";

/// What is on the node, and what happens to it.
#[derive(Debug, Default)]
struct World {
    enrolled: BTreeMap<String, Pod>,
    cut_off: BTreeSet<String>,
    uncaptured: Vec<Uncaptured>,
    /// Whether the programs for the node are there.
    installed: bool,
    /// Objects of pods that others have removed.
    removed: BTreeSet<String>,
    /// UIDs that cannot be captured; whether that shows before anything is done.
    failing: BTreeMap<String, bool>,
    /// The node's side cannot be installed.
    broken: bool,
    missing_interfaces: BTreeSet<String>,
    /// Grows when something of the pods' side changes that is looked at.
    generation: u64,
    pins: u64,
    /// How often each pod was captured.
    captures: BTreeMap<String, usize>,
    installs: usize,
}

#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<World>>);

impl Shared {
    fn get(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

fn failure() -> redirect::Error {
    redirect::Error::Bpf {
        action: "attach",
        name: "app_outbound".into(),
        reason: "no".into(),
    }
}

/// As the trait promises, and no better.
impl Redirection for Shared {
    fn install(&mut self) -> redirect::Result<()> {
        let mut world = self.get();
        world.installs += 1;
        if world.broken {
            return Err(failure());
        }
        world.installed = true;
        Ok(())
    }

    fn try_pods(&mut self, pods: &[Pod]) -> redirect::Result<Vec<Failure>> {
        let mut world = self.get();
        let mut failures = Vec::new();
        for pod in pods {
            *world.captures.entry(pod.uid.clone()).or_default() += 1;
            if let Some(&early) = world.failing.get(&pod.uid) {
                let cut_off = !early && !world.enrolled.contains_key(&pod.uid);
                if cut_off {
                    world.cut_off.insert(pod.host_interface.clone());
                }
                failures.push(Failure {
                    uid: pod.uid.clone(),
                    error: failure(),
                    cut_off,
                });
                continue;
            }
            world.cut_off.remove(&pod.host_interface);
            world.removed.remove(&pod.uid);
            world.enrolled.insert(pod.uid.clone(), pod.clone());
        }
        Ok(failures)
    }

    fn cut_off(&mut self, interfaces: &[&str]) -> redirect::Result<Vec<(String, redirect::Error)>> {
        let mut world = self.get();
        for name in interfaces {
            assert!(!world.missing_interfaces.contains(*name), "{name} is gone");
            world.enrolled.retain(|_, pod| pod.host_interface != *name);
            world.cut_off.insert((*name).to_owned());
        }
        Ok(Vec::new())
    }

    fn interfaces_cut_off(&self) -> Vec<String> {
        self.get().cut_off.iter().cloned().collect()
    }

    fn let_go(&mut self, interfaces: &[&str]) -> redirect::Result<()> {
        let mut world = self.get();
        world
            .cut_off
            .retain(|name| !interfaces.contains(&name.as_str()));
        Ok(())
    }

    fn note_uncaptured(&mut self, pods: Vec<Uncaptured>) -> redirect::Result<()> {
        self.get().uncaptured = pods;
        Ok(())
    }

    fn uncaptured(&self) -> &[Uncaptured] {
        &[] // only for what is logged
    }

    fn remove_pods(&mut self, uids: &[&str]) -> redirect::Result<()> {
        let mut world = self.get();
        world
            .enrolled
            .retain(|uid, _| !uids.contains(&uid.as_str()));
        Ok(())
    }

    fn enrolled(&self) -> Vec<Pod> {
        self.get().enrolled.values().cloned().collect()
    }

    fn status(&self) -> redirect::Result<Status> {
        Err(failure()) // not asked for here
    }

    fn counters(&self) -> redirect::Result<Counters> {
        Ok(Counters::new())
    }

    fn inventory(&self) -> redirect::Result<BTreeSet<String>> {
        let world = self.get();
        let pods = world.enrolled.keys();
        let pods = pods.filter(|uid| !world.removed.contains(*uid));
        let pods = pods.map(|uid| format!("pod {uid}"));
        let programs = world.installed.then(|| "programs".to_owned());
        Ok(pods.chain(programs).collect())
    }

    fn cleanup(&mut self) -> redirect::Result<()> {
        *self.get() = World::default();
        Ok(())
    }
}

#[derive(Debug)]
struct Table {
    shared: Shared,
    remembered: u64,
}

impl Node for Table {
    fn redirection(&self, _: &Config) -> Result<Box<dyn Redirection + Send>> {
        Ok(Box::new(self.shared.clone()))
    }

    fn observe(&self, desired: &Desired) -> Observed {
        let mut observed = Observed::default();
        for entry in &desired.pods {
            if let Some(name) = entry.host_interface()
                && !self.has_interface(name)
            {
                observed
                    .interfaces
                    .insert(name.to_owned(), "not found".to_owned());
            }
        }
        observed
    }

    fn has_interface(&self, name: &str) -> bool {
        !self.shared.get().missing_interfaces.contains(name)
    }

    fn remember(&mut self, _: &Wanted) {
        self.remembered = self.shared.get().generation;
    }

    fn change(&self, _: &Wanted) -> Change {
        match self.shared.get().generation == self.remembered {
            true => Change::Nothing,
            false => Change::Pods,
        }
    }

    fn pins_changed(&self, _: &Config) -> Option<SystemTime> {
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(self.shared.get().pins))
    }
}

struct Site {
    shared: Shared,
    reconciler: Reconciler<Table>,
    now: Instant,
}

impl Site {
    fn new(pods: Desired) -> Self {
        let shared = Shared::default();
        shared.get().installed = true;
        let wanted = Wanted {
            config: Arc::new(Config::parse(Path::new("/c"), CONFIG).unwrap()),
            desired: Arc::new(pods),
        };
        let node = Table {
            shared: shared.clone(),
            remembered: 0,
        };
        let redirection = Box::new(shared.clone());
        let mut reconciler = Reconciler::new(node, wanted, redirection);
        let _ = reconciler.change_pods(true);
        Self {
            shared,
            reconciler,
            now: Instant::now(),
        }
    }

    fn list(&mut self, pods: Desired) {
        let mut wanted = self.reconciler.wanted().clone();
        wanted.desired = Arc::new(pods);
        let _ = self.reconciler.follow(wanted);
    }

    /// A second passes.
    fn poll(&mut self) {
        self.now += Duration::from_secs(1);
        let _ = self.reconciler.poll(self.now);
    }

    fn captured(&self) -> Vec<String> {
        self.shared.get().enrolled.keys().cloned().collect()
    }

    fn captures(&self, uid: &str) -> usize {
        self.shared.get().captures.get(uid).copied().unwrap_or(0)
    }
}

fn three() -> Desired {
    desired([
        listed("a", 11, "va1", None),
        listed("b", 12, "va2", None),
        listed("c", 13, "va3", None),
    ])
}

#[test]
fn a_pod_that_fails_is_tried_again_ever_more_rarely_and_costs_itself() {
    for early in [true, false] {
        let mut site = Site::new(Desired::default());
        site.shared.get().failing.insert("b".into(), early);
        site.list(three());
        assert_eq!(site.captured(), ["a", "c"]);
        assert_eq!(
            site.shared.get().cut_off,
            BTreeSet::from(["va2".to_owned()])
        );
        let mut attempts = vec![];
        for second in 1..=100 {
            let before = site.captures("b");
            site.poll();
            if site.captures("b") > before {
                attempts.push(second);
            }
        }
        assert_eq!(
            attempts,
            [1, 3, 7, 15, 31, 63, 95],
            "after 1, 2, 4 ... 32 polls"
        );
        assert_eq!((site.captures("a"), site.captures("c")), (1, 1));
        assert!(site.reconciler.is_behind());
        site.shared.get().failing.clear();
        for _ in 0..32 {
            site.poll();
        }
        assert_eq!(site.captured(), ["a", "b", "c"]);
        assert!(site.shared.get().cut_off.is_empty());
        assert!(!site.reconciler.is_behind());
        // The next failure begins anew.
        site.shared.get().failing.insert("d".into(), early);
        let mut pods = three();
        pods.pods
            .extend(desired([listed("d", 14, "va4", None)]).pods);
        site.list(pods);
        site.poll();
        assert_eq!(site.captures("d"), 2);
    }
}

#[test]
fn whom_a_change_does_not_concern_keeps_his_connections() {
    let mut site = Site::new(three());
    let mut pods = three();
    pods.pods.remove(1);
    pods.pods
        .extend(desired([listed("d", 14, "va4", None)]).pods);
    site.list(pods);
    assert_eq!(site.captured(), ["a", "c", "d"]);
    let captures = ["a", "b", "c", "d"].map(|uid| site.captures(uid));
    assert_eq!(captures, [1; 4], "nobody is captured a second time");
}

#[test]
fn an_interface_that_comes_has_its_pod_captured() {
    let mut site = Site::new(Desired::default());
    site.shared.get().missing_interfaces.insert("va2".into());
    site.list(three());
    assert_eq!(site.captured(), ["a", "c"]);
    assert!(
        site.shared.get().cut_off.is_empty(),
        "nothing is there to cut off"
    );
    {
        let mut world = site.shared.get();
        world.missing_interfaces.clear();
        world.generation += 1;
    }
    site.poll();
    assert_eq!(site.captured(), ["a", "b", "c"]);
}

#[test]
fn what_others_remove_comes_back_and_pins_do_not_wait_for_their_turn() {
    let mut site = Site::new(three());
    let remove = |site: &Site| site.shared.get().removed.insert("b".into());
    let is_back = |site: &Site| site.shared.get().removed.is_empty();
    remove(&site);
    let seconds = (1..).find(|_| {
        site.poll();
        is_back(&site)
    });
    assert_eq!(seconds, Some(10), "by `reconcile_s`");
    remove(&site);
    site.shared.get().pins += 1;
    site.poll();
    assert!(is_back(&site), "at the next poll");
}

#[test]
fn what_others_remove_just_before_a_change_comes_back_too() {
    let mut site = Site::new(three());
    site.shared.get().removed.insert("b".into());
    site.shared.get().installed = false;
    let mut pods = three();
    pods.pods.remove(0);
    site.list(pods);
    for _ in 0..10 {
        site.poll();
    }
    let world = site.shared.get();
    assert!(world.installed && world.removed.is_empty(), "{world:?}");
}

#[test]
fn a_node_that_cannot_be_installed_again_still_captures_pods_and_is_tried_again() {
    let mut site = Site::new(three());
    {
        let mut world = site.shared.get();
        (world.installed, world.broken) = (false, true);
        world.pins += 1;
    }
    site.poll();
    assert!(site.reconciler.is_behind());
    let mut pods = three();
    pods.pods
        .extend(desired([listed("d", 14, "va4", None)]).pods);
    site.list(pods);
    assert_eq!(site.captured(), ["a", "b", "c", "d"]);
    site.shared.get().broken = false;
    for _ in 0..32 {
        site.poll();
    }
    assert!(site.shared.get().installed && !site.reconciler.is_behind());
}

/// Something that happens to the node.
#[derive(Clone, Debug)]
enum Step {
    List(Vec<Entry>),
    Fails(u8, bool),
    Works(u8),
    InterfaceGone(u8),
    InterfaceBack(u8),
    Removed(u8),
    ProgramsRemoved,
    Broken(bool),
    Polls(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => entries().prop_map(Step::List),
        2 => (0..6_u8, any::<bool>()).prop_map(|(n, early)| Step::Fails(n, early)),
        2 => (0..6_u8).prop_map(Step::Works),
        1 => (1..6_u8).prop_map(Step::InterfaceGone),
        1 => (1..6_u8).prop_map(Step::InterfaceBack),
        1 => (0..6_u8).prop_map(Step::Removed),
        1 => Just(Step::ProgramsRemoved),
        1 => any::<bool>().prop_map(Step::Broken),
        3 => (1..5_u8).prop_map(Step::Polls),
    ];
    prop::collection::vec(step, 1..20)
}

fn happens(site: &mut Site, step: Step) {
    let shared = site.shared.clone();
    let mut world = shared.get();
    match step {
        Step::List(pods) => {
            drop(world);
            site.list(Desired { pods });
        }
        Step::Polls(count) => {
            drop(world);
            (0..count).for_each(|_| site.poll());
        }
        Step::Fails(n, early) => {
            world.failing.insert(format!("uid{n}"), early);
        }
        Step::Works(n) => {
            world.failing.remove(&format!("uid{n}"));
        }
        Step::InterfaceGone(n) => {
            world.missing_interfaces.insert(format!("va{n}"));
            world.generation += 1;
        }
        Step::InterfaceBack(n) => {
            world.missing_interfaces.remove(&format!("va{n}"));
            world.generation += 1;
        }
        Step::Removed(n) => {
            world.removed.insert(format!("uid{n}"));
        }
        Step::ProgramsRemoved => world.installed = false,
        Step::Broken(broken) => world.broken = broken,
    }
}

proptest! {
    #[test]
    fn whatever_happens_the_node_comes_to_what_is_wanted(steps in steps()) {
        let mut site = Site::new(Desired::default());
        for step in steps {
            happens(&mut site, step);
        }
        // Everything works from now on, except pods that never do.
        site.shared.get().broken = false;
        for _ in 0..80 {
            site.poll();
        }
        let wanted = site.reconciler.wanted().clone();
        let observed = site.reconciler.node.observe(&wanted.desired);
        let settings = wanted.config.settings();
        let ideal = Plan::new(&settings, &wanted.desired, &[], &observed, true);
        let world = site.shared.get();
        prop_assert!(world.installed);
        for pod in &ideal.capture {
            let failing = world.failing.contains_key(&pod.uid);
            let captured = world.enrolled.get(&pod.uid);
            if failing {
                // One that was captured may be as it was before.
                let cut_off = world.cut_off.contains(&pod.host_interface);
                prop_assert!(captured.is_some() || cut_off, "{} is open", pod.uid);
                let told = |one: &&Uncaptured| one.uid == pod.uid && one.why == Why::Failed;
                prop_assert!(captured == Some(pod) || world.uncaptured.iter().any(|p| told(&p)));
            } else {
                prop_assert_eq!(captured, Some(pod));
                prop_assert!(!world.cut_off.contains(&pod.host_interface));
                prop_assert!(!world.removed.contains(&pod.uid), "not put back");
            }
        }
        let wanted: BTreeSet<_> = ideal.capture.iter().map(|pod| &pod.uid).collect();
        for uid in world.enrolled.keys() {
            prop_assert!(wanted.contains(uid), "{} is still captured", uid);
        }
        for refused in &ideal.refused {
            prop_assert!(world.uncaptured.iter().any(|told| told.uid == refused.uid));
            if let Some(name) = &refused.host_interface
                && !world.missing_interfaces.contains(name)
                && ideal.capture.iter().all(|pod| pod.host_interface != *name)
            {
                prop_assert!(world.cut_off.contains(name), "{} is open", name);
            }
        }
        for name in &world.cut_off {
            let refused = world.uncaptured.iter();
            let mut names = refused.filter_map(|told| told.host_interface.as_ref());
            prop_assert!(names.any(|refused| refused == name), "{} for nobody", name);
        }
    }
}
