//! The command line of the load generator.
#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser as _;
use signal_hook::consts::{SIGINT, SIGTERM};

use loadgen::report::Report;
use loadgen::serve::{self, Server};
use loadgen::{Error, connect, idle, rr, stream};

use cli::{Cli, Command, Output};

fn main() -> ExitCode {
    let stop = Arc::new(AtomicBool::new(false));
    let result = match Cli::parse().command {
        Command::Serve(args) => serve_until_signal(&args.options()),
        Command::Rr(args) => {
            rr::run(&args.options(watch(&stop))).and_then(|r| show(&r, &args.output))
        }
        Command::Stream(args) => {
            stream::run(&args.options(watch(&stop))).and_then(|r| show(&r, &args.output))
        }
        Command::Connect(args) => {
            connect::run(&args.options(watch(&stop))).and_then(|r| show(&r, &args.output))
        }
        Command::Idle(args) => {
            idle::run(&args.options(watch(&stop))).and_then(|r| show(&r, &args.output))
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("loadgen: {error}");
            ExitCode::from(1)
        }
    }
}

/// Lets SIGINT and SIGTERM end a client run early; the second one ends the program at once.
fn watch(stop: &Arc<AtomicBool>) -> Arc<AtomicBool> {
    for signal in [SIGINT, SIGTERM] {
        let hooked =
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(stop))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(stop)));
        if let Err(error) = hooked {
            eprintln!("loadgen: cannot watch signal {signal}, it will lose the results: {error}");
        }
    }
    Arc::clone(stop)
}

fn show(report: &Report, output: &Output) -> Result<ExitCode, Error> {
    print!("{report}");
    if let Some(path) = &output.json {
        report.write_json(path)?;
    }
    if let Some(path) = &output.hgrm {
        report.write_hgrm(path)?;
    }
    if report.ok() == 0 {
        let kinds: Vec<&str> = report.errors_by_kind().keys().copied().collect();
        let why = if kinds.is_empty() {
            "nothing finished in time".to_owned()
        } else {
            kinds.join(", ")
        };
        eprintln!("loadgen: nothing succeeded ({why}); is the server listening there?");
        return Ok(ExitCode::from(1));
    }
    Ok(ExitCode::SUCCESS)
}

fn serve_until_signal(options: &serve::Options) -> Result<ExitCode, Error> {
    // Registered before the address is announced: whoever reads it may send the signal at once.
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(|source| Error::Worker {
            what: "watch signals",
            source,
        })?;
    let server = Server::start(options)?;
    let stopper = server.stopper();
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            stopper.stop();
        }
    });
    println!("listening on {}", server.address());
    let totals = server.join()?;
    println!(
        "served {} connections, received {} bytes, sent {} bytes, {} errors",
        totals.connections, totals.received_bytes, totals.sent_bytes, totals.errors
    );
    Ok(ExitCode::SUCCESS)
}
