//! The `nilicon` command: one file a verb, and what verbs share.
//!
//! Exit codes: 0 for success, 1 for failure (for `run`, `drill` and `demo` also if a client lost
//! anything), 2 for a command line that makes no sense, 130 and 143 after SIGINT and SIGTERM.

mod args;
mod bench;
mod check;
mod clients;
mod clock;
mod compute;
mod demo;
mod deploy;
mod doctor;
mod drill;
mod drill_faults;
mod faults;
mod files;
mod histories;
mod image;
mod inspect;
mod journal;
mod keys;
mod numbers;
mod objects;
mod oneshot;
mod progress;
mod report;
mod resets;
mod resume;
mod run;
mod shape;
mod signals;
mod sim;
mod switchover;
mod text;
mod view;
mod volume;
mod witness;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use netns_tools::topology::{self, Topology, TopologyError};
use nilicon_clients::server::{self, ServerConfig};
use replicator::container::{INIT_COMMAND, init_main};
use replicator::volume::{GUARD_COMMAND, guard_main};

use crate::agent::{self, AgentOptions, status};
use args::{AgentArgs, Arguments, Verb};
use signals::Interrupted;

/// The variable that chooses what is logged, as in `NILICON_LOG=debug`.
const LOG: &str = "NILICON_LOG";

/// Does what the command line says.
pub fn main() -> ExitCode {
    // Before anything else: it becomes the first process of a container, or stands by for an agent.
    match std::env::args_os().nth(1) {
        Some(verb) if verb == INIT_COMMAND => init_main(),
        Some(verb) if verb == GUARD_COMMAND => guard_main(),
        _ => {}
    }
    let arguments = Arguments::parse();
    start_log(&arguments.command);
    match dispatch(&arguments.command) {
        Ok(code) => code,
        Err(error) => tell(error),
    }
}

fn dispatch(verb: &Verb) -> Result<ExitCode> {
    let verdict = |success| if success { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    match verb {
        Verb::Demo => return demo::demo().map(verdict),
        Verb::Run(args) => return run::run(args).map(verdict),
        Verb::Drill(args) => return drill::drill(args).map(verdict),
        Verb::Bench(args) => return bench::bench(args).map(verdict),
        Verb::Sim(args) => return sim::sim(args).map(verdict),
        Verb::Doctor(args) => return doctor::doctor(*args).map(verdict),
        Verb::Exec(args) => return inspect::exec(args),
        Verb::Check(args) => return check::check(args).map(verdict),
        Verb::Restore(args) => return oneshot::restore(args),
        Verb::Image(verb) => return image::image(verb).map(verdict),
        Verb::Volume(verb) => return volume::volume(verb).map(verdict),
        Verb::Checkpoint(args) => oneshot::checkpoint(args)?,
        Verb::Deploy(args) => deploy::deploy(args)?,
        Verb::Destroy(args) => deploy::destroy(args)?,
        Verb::Inspect(args) => inspect::inspect(args)?,
        Verb::Fault(args) => inspect::fault(args)?,
        Verb::Switchover(args) => switchover::switchover(args)?,
        Verb::Validate(args) => inspect::validate(args)?,
        Verb::Allow(args) => witness::allow(args)?,
        Verb::Witness(args) => witness::witness(args)?,
        Verb::Agent(args) => run_agent(args)?,
        Verb::Pki(verb) => keys::pki(verb)?,
        Verb::Schema => println!("{}", serde_json::to_string_pretty(&topology::schema())?),
        Verb::Client => clients::client_main()?,
        Verb::Link(args) => {
            netns_tools::impair::run_link(&args.lab, args.index)?;
        }
        Verb::Shape(args) => shape::shape(args)?,
        Verb::Compute(args) => compute::compute(args)?,
        Verb::Server(args) => {
            server::run(ServerConfig { listen: args.listen, threads: args.threads })
                .context("the built-in server cannot run")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `nilicon agent`.
fn run_agent(args: &AgentArgs) -> Result<()> {
    let topology = Topology::load(&args.topology)?;
    let pki = args.pki.clone().unwrap_or_else(|| status::state_dir(&topology.name).join("pki"));
    let output_commit = args.output_commit.is_on();
    agent::run(AgentOptions { topology, host: args.host.clone(), pki, output_commit })
}

/// Logs go to standard error: all that matters from agents and links, which nobody watches;
/// warnings from the rest, whose output is for people.
fn start_log(verb: &Verb) {
    use std::io::IsTerminal;
    let default = match verb {
        Verb::Agent(_) | Verb::Witness(_) | Verb::Link(_) => "info",
        _ => "warn",
    };
    let filter =
        tracing_subscriber::EnvFilter::try_from_env(LOG).unwrap_or_else(|_| default.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// Says what went wrong, and with which code to end.
fn tell(error: anyhow::Error) -> ExitCode {
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        eprintln!("nilicon: {interrupted}");
        return ExitCode::from(interrupted.exit_code());
    }
    match error.downcast::<TopologyError>() {
        // It can point into the file.
        Ok(error) => eprintln!("{:?}", miette::Report::new(error)),
        Err(error) => eprintln!("nilicon: {}", crate::chain::chain(&error)),
    }
    ExitCode::FAILURE
}

/// This program, to be run again in another role.
fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find the own program (is /proc mounted?)")
}

/// Whether a program can be started by its name.
fn is_installed(program: &str) -> bool {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs).any(|dir| Path::new(&dir).join(program).is_file())
}
