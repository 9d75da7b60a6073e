//! Bringing a lab up and handling it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::unistd::geteuid;

use crate::agent;
use crate::ca::CertificateAuthority;
use crate::daemon::{Daemon, workspace_binary};
use crate::error::{Error, Result};
use crate::kinds::{ProxyKind, Redirect, Services, Variant};
use crate::lock::Lock;
use crate::mesh_file::{TRUST_DOMAIN, default_mesh};
use crate::network::namespace::HostCommand;
use crate::network::{self, namespace, netns_path};
use crate::services;
use crate::state::{Phase, State, ca_paths, check_name, directory, mesh_path};
use crate::status::{self, Status};
use crate::steering;
use crate::teardown;
use crate::topology::{Host, Node};
use crate::ztunnel;

/// What lab to bring up.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// Name of the lab: prefix of its namespaces. 1 to 32 of a-z, 0-9 and `-`.
    pub name: String,
    /// Redirection.
    pub redirect: Redirect,
    /// Whether ztunnel uses sockmap short-cuts.
    pub sockmap: bool,
    /// Whose rules for services the nodes have.
    pub services: Services,
    /// Mesh file instead of the generated one.
    pub mesh: Option<PathBuf>,
    /// ztunnel binary instead of the workspace's, or the program of another kind of proxy.
    pub ztunnel: Option<PathBuf>,
    /// What that program is, and so how it is run.
    pub proxy: ProxyKind,
    /// Rule set of the `tunnel` redirection.
    pub variant: Variant,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            name: Self::DEFAULT_NAME.to_owned(),
            redirect: Redirect::default(),
            sockmap: false,
            services: Services::None,
            mesh: None,
            ztunnel: None,
            proxy: ProxyKind::default(),
            variant: Variant::default(),
        }
    }
}

impl LabOptions {
    /// The name of a lab whose name was not given.
    pub const DEFAULT_NAME: &'static str = "zt";
}

/// A lab that is up. Dropping it leaves the lab up; see [`Self::down`].
#[derive(Debug)]
pub struct Lab {
    state: State,
}

impl Lab {
    /// Brings a lab up. What an earlier `up` of the same name left when it was killed is removed
    /// first, with a note on standard error. If any step fails everything is removed again.
    ///
    /// # Errors
    /// [`Error::AlreadyUp`] if there is one of this name; otherwise what step failed and why.
    pub fn up(options: &LabOptions) -> Result<Self> {
        check_name(&options.name)?;
        preflight(options)?;
        let state = initial_state(options)?;
        let lock = Lock::acquire(&options.name)?;
        if let Err(error) = make_room(&options.name, &lock) {
            if !directory(&options.name).exists() {
                lock.remove();
            }
            return Err(error);
        }
        let mut lab = Self { state };
        match lab.build(options, &lock) {
            Ok(()) => Ok(lab),
            Err(error) => {
                if let Err(second) = teardown::remove(&options.name, &lock) {
                    eprintln!("lab: removing what was made failed too: {second}");
                } else {
                    lock.remove();
                }
                Err(error)
            }
        }
    }

    /// The lab `name`, which is up.
    ///
    /// # Errors
    /// [`Error::NotUp`] if it is not.
    pub fn attach(name: &str) -> Result<Self> {
        check_name(name)?;
        match State::load(name)? {
            Some(state) if state.phase == Phase::Up => Ok(Self { state }),
            _ => Err(Error::NotUp {
                name: name.to_owned(),
            }),
        }
    }

    /// Removes the lab `name` and everything that belongs to it, whatever state it is in; fine if
    /// there is none. Returns whether there was anything to remove.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn down(name: &str) -> Result<bool> {
        check_name(name)?;
        require_root()?;
        let lock = Lock::acquire(name)?;
        let existed = teardown::remove(name, &lock)?;
        lock.remove();
        Ok(existed)
    }

    /// Names of all labs that are up, or were left half way.
    #[must_use]
    pub fn names() -> Vec<String> {
        teardown::names()
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// The redirection in use.
    #[must_use]
    pub fn redirect(&self) -> Redirect {
        self.state.redirect
    }

    /// Whose rules for services the nodes have.
    #[must_use]
    pub fn services(&self) -> Services {
        self.state.services
    }

    /// `geneve` or `vxlan` on the `tunnel` path.
    #[must_use]
    pub fn tunnel_driver(&self) -> Option<&str> {
        self.state.tunnel_driver.as_deref()
    }

    /// Hosts, processes and readiness as they are now.
    #[must_use]
    pub fn status(&self) -> Status {
        status::observe(&self.state)
    }

    /// Address of the host named `host`: a pod's own, a node's on the underlay.
    ///
    /// # Errors
    /// [`Error::UnknownHost`].
    pub fn address(host: &str) -> Result<IpAddr> {
        Ok(host.parse::<Host>()?.address())
    }

    /// IPv6 address of the host named `host`, which it has if the machine has IPv6.
    ///
    /// # Errors
    /// [`Error::UnknownHost`].
    pub fn address_v6(host: &str) -> Result<IpAddr> {
        Ok(host.parse::<Host>()?.address_v6().into())
    }

    /// File of `host`'s network namespace.
    ///
    /// # Errors
    /// [`Error::UnknownHost`].
    pub fn netns(&self, host: &str) -> Result<PathBuf> {
        Ok(netns_path(self.name(), host.parse()?))
    }

    /// A command that will run `program` in `host`'s network namespace.
    ///
    /// # Errors
    /// [`Error::UnknownHost`].
    pub fn command(&self, host: &str, program: impl AsRef<OsStr>) -> Result<HostCommand> {
        Ok(HostCommand::new(self.netns(host)?, program))
    }

    /// Runs `f` on a thread in `host`'s network namespace; sockets it makes belong there.
    ///
    /// # Errors
    /// [`Error::UnknownHost`] or [`Error::Enter`].
    pub fn on<T: Send>(&self, host: &str, f: impl FnOnce() -> T + Send) -> Result<T> {
        namespace::in_namespace(&self.netns(host)?, f)
    }

    /// Process ids of the ztunnels, node A's first.
    #[must_use]
    pub fn ztunnel_pids(&self) -> Vec<u32> {
        let ztunnels = self
            .state
            .processes
            .iter()
            .filter(|p| p.program == "ztunnel");
        ztunnels.map(|process| process.pid).collect()
    }

    /// The log of what runs on `host`: of the node agent on a node, else of the node's ztunnel.
    ///
    /// # Errors
    /// [`Error::UnknownHost`].
    pub fn log_path(&self, host: &str) -> Result<PathBuf> {
        let host: Host = host.parse()?;
        let node = host.node();
        Ok(if host == node.host() {
            agent::log_path(self.name(), node)
        } else {
            ztunnel::log_path(self.name(), node)
        })
    }

    /// The lab's directory: certificates, mesh file, configurations, logs.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        directory(self.name())
    }

    /// The root certificate that the lab's identities are issued from.
    ///
    /// # Errors
    /// As [`CertificateAuthority::load`].
    pub fn certificate_authority(&self) -> Result<CertificateAuthority> {
        let (certificate, key) = ca_paths(self.name());
        CertificateAuthority::load(&certificate, &key)
    }

    /// Stops the ztunnel of `host`'s node and waits until its ports are free. Redirection stays,
    /// so captured traffic must fail until [`Self::start_ztunnel`].
    ///
    /// # Errors
    /// [`Error::UnknownHost`], [`Error::Immortal`].
    pub fn stop_ztunnel(&mut self, host: &str) -> Result<()> {
        let node = host.parse::<Host>()?.node();
        let name = node.ztunnel().name();
        let stopped = |p: &crate::process::Process| p.program == "ztunnel" && p.host == name;
        for process in self
            .state
            .processes
            .iter()
            .filter(|process| stopped(process))
        {
            ztunnel::stop(&self.state, process, node)?;
        }
        self.state.processes.retain(|process| !stopped(process));
        self.state.save()
    }

    /// Starts the ztunnel of `host`'s node and waits until it is ready.
    ///
    /// # Errors
    /// [`Error::UnknownHost`], [`Error::NotReady`] with its last log lines.
    pub fn start_ztunnel(&mut self, host: &str) -> Result<()> {
        let node = host.parse::<Host>()?.node();
        let Some(binary) = self.state.ztunnel.clone() else {
            let text = format!("lab `{}` has redirect none, so no ztunnel", self.name());
            return Err(Error::Options(text));
        };
        let mut daemon = ztunnel::start(&self.state, &binary, node)?;
        let process = self.record(&mut daemon)?;
        ztunnel::wait_ready(&self.state, &mut daemon, node)?;
        if self.state.redirect == Redirect::Ebpf && !self.state.proxy.registers_listeners() {
            steering::register(&agent::listener_map(self.name(), node), process)?;
        }
        Ok(())
    }

    /// Has another ztunnel take over from the one of `host`'s node, which then drains and ends.
    ///
    /// # Errors
    /// [`Error::UnknownHost`], [`Error::NotReady`] with its last log lines, [`Error::Immortal`].
    pub fn hand_over(&mut self, host: &str) -> Result<()> {
        self.start_successor(host)?;
        self.end_predecessor(host)
    }

    /// Starts a second ztunnel beside the one of `host`'s node and waits until connections come to
    /// it. Until [`Self::end_predecessor`] the first one has the endpoints.
    ///
    /// # Errors
    /// [`Error::UnknownHost`], [`Error::NotReady`] with its last log lines.
    pub fn start_successor(&mut self, host: &str) -> Result<()> {
        let node = host.parse::<Host>()?.node();
        let Some(binary) = self.state.ztunnel.clone() else {
            let text = format!("lab `{}` has redirect none, so no ztunnel", self.name());
            return Err(Error::Options(text));
        };
        let mut daemon = ztunnel::start(&self.state, &binary, node)?;
        self.record(&mut daemon)?;
        ztunnel::wait_serving(&self.state, &mut daemon)
    }

    /// Ends the older one of two ztunnels of `host`'s node and waits until the other is ready.
    ///
    /// # Errors
    /// [`Error::UnknownHost`], [`Error::Immortal`], [`Error::NotReady`].
    pub fn end_predecessor(&mut self, host: &str) -> Result<()> {
        let node = host.parse::<Host>()?.node();
        let name = node.ztunnel().name();
        let is_elder = |p: &crate::process::Process| p.program == "ztunnel" && p.host == name;
        if let Some(at) = self.state.processes.iter().position(is_elder) {
            ztunnel::end(&self.state.processes[at])?;
            self.state.processes.remove(at);
            self.state.save()?;
        }
        ztunnel::wait_answering(&self.state, node)
    }

    /// Everything between an empty machine and a working lab.
    fn build(&mut self, options: &LabOptions, lock: &Lock) -> Result<()> {
        let directory = directory(self.name());
        fs::create_dir_all(&directory).map_err(Error::io("creating", &directory))?;
        self.state.save()?;
        network::build(self.name(), lock)?;
        services::install(self.name(), self.state.services)?;
        if options.redirect != Redirect::None {
            self.write_files(options)?;
            self.start_agents()?;
            for node in Node::ALL {
                self.start_ztunnel(node.ztunnel().name())?;
            }
        }
        self.state.phase = Phase::Up;
        self.state.save()
    }

    /// Certificates, mesh file, agent configurations and the BPF file system.
    fn write_files(&self, options: &LabOptions) -> Result<()> {
        let (certificate, key) = ca_paths(self.name());
        CertificateAuthority::generate(TRUST_DOMAIN)?.write(&certificate, &key)?;
        let mesh = match &options.mesh {
            Some(path) => fs::read_to_string(path).map_err(Error::io("reading", path))?,
            None => default_mesh(),
        };
        let path = mesh_path(self.name());
        fs::write(&path, mesh).map_err(Error::io("writing", path))?;
        if self.state.redirect == Redirect::Ebpf {
            mount_bpffs(&agent::bpffs(self.name()))?;
        }
        Node::ALL
            .iter()
            .try_for_each(|node| agent::write_config(&self.state, *node))
    }

    /// Redirection first, ztunnels after it: captured traffic fails closed in between.
    fn start_agents(&mut self) -> Result<()> {
        let Some(binary) = self.state.node_agent.clone() else {
            return Ok(());
        };
        for node in Node::ALL {
            let mut daemon = agent::start(&self.state, &binary, node)?;
            self.record(&mut daemon)?;
            agent::wait_ready(&mut daemon)?;
        }
        if self.state.redirect == Redirect::Tunnel {
            self.state.tunnel_driver = agent::tunnel_driver(&self.state, &binary, Node::A)?;
        }
        Ok(())
    }

    /// Remembers a process; returns its id.
    fn record(&mut self, daemon: &mut Daemon) -> Result<u32> {
        let process = daemon.process()?;
        let pid = process.pid;
        self.state.processes.push(process);
        self.state.save()?;
        Ok(pid)
    }
}

fn initial_state(options: &LabOptions) -> Result<State> {
    let redirected = options.redirect != Redirect::None;
    let ztunnel = match &options.ztunnel {
        Some(path) => Some(given_binary(path)?),
        None if !redirected => None,
        None if matches!(options.proxy, ProxyKind::Shared | ProxyKind::Dedicated) => {
            Some(workspace_binary("ztunnel")?)
        }
        None => Some(options.proxy.program().map_err(Error::Options)?),
    };
    Ok(State {
        schema: 1,
        name: options.name.clone(),
        phase: Phase::Starting,
        redirect: options.redirect,
        variant: options.variant,
        sockmap: options.sockmap,
        services: options.services,
        proxy: options.proxy,
        ztunnel,
        node_agent: redirected
            .then(|| workspace_binary("node-agent"))
            .transpose()?,
        tunnel_driver: None,
        processes: Vec::new(),
    })
}

/// Refuses before anything is made what cannot work.
fn preflight(options: &LabOptions) -> Result<()> {
    require_root()?;
    let ip = ("ip", "iproute2");
    let needed = [ip].into_iter().chain(options.services.programs());
    for (program, package) in needed {
        if !in_path(program) {
            return Err(Error::MissingProgram { program, package });
        }
    }
    if options.redirect == Redirect::None {
        let useless = [
            (options.sockmap, "--sockmap on"),
            (options.mesh.is_some(), "--config"),
            (options.ztunnel.is_some(), "--ztunnel"),
        ];
        if let Some((_, option)) = useless.iter().find(|(given, _)| *given) {
            let text = format!(
                "{option} needs a ztunnel, which --redirect none does not have: \
                 use --redirect tunnel or ebpf"
            );
            return Err(Error::Options(text));
        }
    }
    if options.sockmap && options.redirect == Redirect::Tunnel {
        let text = "--sockmap on is for --redirect ebpf; the tunnel path has no short-cut";
        return Err(Error::Options(text.to_owned()));
    }
    if let Some(mesh) = &options.mesh {
        fs::File::open(mesh).map_err(Error::io("reading mesh file", mesh))?;
    }
    Ok(())
}

/// Deals with what is there already under this name.
fn make_room(name: &str, lock: &Lock) -> Result<()> {
    let state = State::load(name).unwrap_or(None);
    let foreign = network::existing(name);
    if let Some(state) = &state
        && state.phase == Phase::Up
        && foreign.is_some()
    {
        let redirect = state.redirect.name().to_owned();
        return Err(Error::AlreadyUp {
            name: name.to_owned(),
            redirect,
        });
    }
    if directory(name).exists() {
        eprintln!("lab: removing what an earlier `up` of `{name}` that did not finish left behind");
        teardown::remove(name, lock)?;
    } else if let Some(netns) = foreign {
        return Err(Error::Foreign {
            name: name.to_owned(),
            netns,
        });
    }
    Ok(())
}

fn mount_bpffs(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("creating", path))?;
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .map_err(|errno| Error::Kernel {
        what: format!("mounting {}", path.display()),
        feature: "a BPF file system (CONFIG_BPF_SYSCALL and CAP_SYS_ADMIN)",
        source: io::Error::from(errno),
    })
}

fn given_binary(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return fs::canonicalize(path).map_err(Error::io("resolving", path));
    }
    Err(Error::MissingBinary {
        name: "ztunnel".to_owned(),
        looked: path.display().to_string(),
        hint: "pass --ztunnel the path of an executable",
    })
}

fn require_root() -> Result<()> {
    let uid = geteuid();
    if uid.is_root() {
        Ok(())
    } else {
        Err(Error::NotRoot { uid: uid.as_raw() })
    }
}

fn in_path(program: &str) -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
