//! Command line of the two-node lab.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use compare::CompareOptions;
use lab::attack::{self, AttackOptions, Verdict};
use lab::network::namespace;
use lab::peers::ProxyKind;
use lab::{Lab, LabOptions, Redirect, Services, Variant, listener};

/// A two-node Istio ambient network on this machine, in network namespaces.
///
/// Hosts: node-a, node-b (nodes); ztunnel-a, ztunnel-b; client-a and server-a (mesh pods on node
/// A); server-b (mesh pod on node B); plain-b (pod outside the mesh); waypoint-b; outside (host
/// outside the cluster). Needs root and iproute2; nothing outside of the lab's own namespaces is
/// touched. Binaries `ztunnel` and `node-agent` are taken from LAB_BIN_DIR or from beside this
/// program.
#[derive(Debug, Parser)]
#[command(name = "lab", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Commands,
}

#[derive(Debug, Subcommand)]
enum Commands {
    /// Bring the network up, and with a redirection a node agent and a ztunnel per node
    Up(UpArgs),
    /// Run a command in a host's network namespace; exits as the command does
    Exec {
        #[command(flatten)]
        lab: NameArg,
        /// Host to run on
        host: String,
        /// Command and its arguments
        #[arg(last = true, required = true, num_args = 1..)]
        command: Vec<OsString>,
    },
    /// Show hosts, addresses, processes, redirection and readiness
    Status {
        #[command(flatten)]
        lab: NameArg,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Measure the redirection paths against each other and write a report
    Compare(CompareOptions),
    /// Set hostile peers and pods on ztunnels; exits with 1 if one gets what it should not
    #[command(after_help = "Attacks: lab attack list")]
    Attack(AttackOptions),
    /// Render report.html again from report.json
    Report {
        /// Directory of the report [default: the newest in results/ that compares ebpf and tunnel]
        dir: Option<PathBuf>,
        /// Also put the results between the markers of this file
        #[arg(long, value_name = "README.md")]
        readme: Option<PathBuf>,
    },
    /// In ztunnel's place: answer what is redirected. Started by `up --proxy listener`
    #[command(hide = true)]
    Answer {
        /// The eBPF redirection's map of listeners
        #[arg(long, value_name = "PATH")]
        listener_map: Option<PathBuf>,
    },
    /// Remove everything: namespaces, links, redirection, processes, files
    Down {
        #[command(flatten)]
        lab: NameArg,
    },
}

#[derive(Args, Debug)]
struct NameArg {
    /// Name of the lab; labs of different names can be up at the same time
    #[arg(long, default_value = LabOptions::DEFAULT_NAME)]
    name: String,
}

#[derive(Args, Debug)]
struct UpArgs {
    #[command(flatten)]
    lab: NameArg,
    /// How traffic gets to ztunnel: none (no ztunnel at all), tunnel (iptables and a tunnel), ebpf
    #[arg(long, default_value = Redirect::default().name())]
    redirect: Redirect,
    /// Socket short-cuts between applications and ztunnel
    #[arg(long, value_enum, default_value = "off")]
    sockmap: Switch,
    /// Rules for services on the nodes, as kube-proxy makes them: iptables, nftables or none
    #[arg(long, default_value = Services::None.name())]
    services: Services,
    /// Mesh file (LOCAL_XDS_PATH format) instead of the generated one
    #[arg(long, value_name = "MESH.yaml")]
    config: Option<PathBuf>,
    /// Any binary that takes ztunnel's environment, instead of this workspace's
    #[arg(long, value_name = "PATH")]
    ztunnel: Option<PathBuf>,
    /// What runs in ztunnel's place: shared (a ztunnel with this project's environment), dedicated
    /// (any ztunnel, for the node's main pod), envoy-tcp, envoy-hbone or haproxy, or
    /// listener (nothing of a proxy: it answers by itself)
    #[arg(long, value_name = "KIND", default_value = ProxyKind::default().name())]
    proxy: ProxyKind,
    /// Rule set of --redirect tunnel: hardened, or faithful to Istio 1.20 with its defects
    #[arg(long, default_value = Variant::default().name())]
    variant: Variant,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Switch {
    Off,
    On,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Help and version as clap prints them; a mistake in one line, as all errors.
fn usage(error: &clap::Error) -> ExitCode {
    let bare = error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if bare || !error.use_stderr() {
        // Nobody to tell if the stream is gone.
        let _ = error.print();
        return if bare {
            ExitCode::from(2)
        } else {
            ExitCode::SUCCESS
        };
    }
    let text = error.to_string();
    let lines = text.lines().map(str::trim);
    let end = |line: &&str| !line.starts_with("Usage:") && !line.starts_with("For more");
    let told: Vec<_> = lines
        .take_while(end)
        .filter(|line| !line.is_empty())
        .collect();
    let told = told.join(" ");
    let told = told.strip_prefix("error: ").unwrap_or(&told);
    eprintln!("lab: {told} (see `lab --help`)");
    ExitCode::from(2)
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Commands::Up(args) => up(args)?,
        Commands::Exec { lab, host, command } => return exec(&lab.name, &host, &command),
        Commands::Status { lab, json } => return status(&lab.name, json),
        Commands::Down { lab } => down(&lab.name)?,
        Commands::Compare(options) => {
            compare::run(&options).context("compare")?;
        }
        Commands::Attack(options) => return hold_off(&options),
        Commands::Answer { listener_map } => {
            listener::serve(listener_map.as_deref()).context("answer")?;
        }
        Commands::Report { dir, readme } => render(dir, readme.as_deref())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(args: UpArgs) -> Result<()> {
    let options = LabOptions {
        name: args.lab.name,
        redirect: args.redirect,
        sockmap: args.sockmap == Switch::On,
        services: args.services,
        mesh: args.config,
        ztunnel: args.ztunnel,
        proxy: args.proxy,
        variant: args.variant,
    };
    let lab = Lab::up(&options)
        .with_context(|| format!("up `{}` --redirect {}", options.name, options.redirect))?;
    print(&lab.status().to_string())
}

/// Exits with 0 if every attack was held off.
fn hold_off(options: &AttackOptions) -> Result<ExitCode> {
    let rows = attack::run(options).context("attack")?;
    if !rows.is_empty() {
        print(&attack::report(&rows))?;
    }
    let broke = rows.iter().any(|row| row.verdict == Verdict::Broke);
    Ok(if broke {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn render(dir: Option<PathBuf>, readme: Option<&Path>) -> Result<()> {
    let dir = match dir {
        Some(dir) => dir,
        None => report::readme::newest(report::readme::directories(Path::new("results"))?)
            .context("report: no directory given")?,
    };
    report::render(&dir).with_context(|| format!("report {}", dir.display()))?;
    if let Some(readme) = readme {
        report::readme::update(&dir, readme)
            .with_context(|| format!("report --readme {}", readme.display()))?;
        print(&format!(
            "{}: results of {}\n",
            readme.display(),
            dir.display()
        ))?;
    }
    Ok(())
}

/// Becomes the command: its exit status, signals and standard streams need no handling then.
fn exec(name: &str, host: &str, command: &[OsString]) -> Result<ExitCode> {
    let lab = Lab::attach(name)?;
    namespace::enter(&lab.netns(host)?)?;
    let (program, arguments) = command.split_first().context("exec: no command given")?;
    let error = Command::new(program).args(arguments).exec();
    eprintln!("lab: exec on {host}: {}: {error}", program.display());
    // What shells return for a command that is not there, or cannot be run.
    Ok(ExitCode::from(if error.kind() == io::ErrorKind::NotFound {
        127
    } else {
        126
    }))
}

/// Exits with 0 if the lab is ready, with 1 if it is up but not ready.
fn status(name: &str, json: bool) -> Result<ExitCode> {
    let status = Lab::attach(name)?.status();
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(&status)?))?;
    } else {
        print(&status.to_string())?;
    }
    Ok(if status.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn down(name: &str) -> Result<()> {
    let removed = Lab::down(name).with_context(|| format!("down `{name}`"))?;
    print(&if removed {
        format!("lab {name}: removed\n")
    } else {
        format!("lab {name}: there was nothing to remove\n")
    })
}

/// Writes to standard output; a reader that went away is no error.
fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("writing to standard output")
        }
        _ => Ok(()),
    }
}
