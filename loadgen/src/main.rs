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
use loadgen::{Error, connect, idle, rr, search, stream};

use cli::{Cli, Command, Common, Output, RrArgs};

fn main() -> ExitCode {
    let stop = Arc::new(AtomicBool::new(false));
    let result = match Cli::parse().command {
        Command::Serve(args) => serve_until_signal(&args.options()),
        Command::Rr(args) => measure(args.common(), &args.output, || request(&args, &stop)),
        Command::Stream(args) => measure(args.common(), &args.output, || {
            stream::run(&args.options(watch(&stop)))
        }),
        Command::Connect(args) => measure(args.common(), &args.output, || {
            connect::run(&args.options(watch(&stop)))
        }),
        Command::Idle(args) => measure(args.common(), &args.output, || {
            idle::run(&args.options(watch(&stop)))
        }),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("loadgen: {error}");
            ExitCode::from(1)
        }
    }
}

/// Calibrates, runs and shows the results.
fn measure(
    common: &Common,
    output: &Output,
    run: impl FnOnce() -> Result<Report, Error>,
) -> Result<ExitCode, Error> {
    let calibration = common.calibrate();
    let mut report = run()?;
    if let Some(calibration) = calibration {
        calibration.note_in(&mut report);
    }
    show(&report, output)
}

fn request(args: &RrArgs, stop: &Arc<AtomicBool>) -> Result<Report, Error> {
    let options = args.options(watch(stop));
    match args.search() {
        None => rr::run(&options),
        Some((objective, arrivals)) => search::run(&options, arrivals, objective, |step| {
            eprintln!("{step}");
        }),
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
        eprintln!("loadgen: {}", report.nothing_succeeded());
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
