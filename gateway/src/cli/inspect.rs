//! `nilicon inspect`, `exec` and `fault`: looking at a deployed lab, and laying hands on it.

use std::fmt::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use netns_tools::lab::Lab;
use netns_tools::namespace::Namespace;
use netns_tools::topology::Topology;

use super::args::{ExecArgs, FaultArgs, FileArg, InspectArgs, Output};
use super::view::LabView;
use super::{deploy, faults, signals};
use crate::agent::status::Role;

/// `nilicon inspect`.
pub(super) fn inspect(args: &InspectArgs) -> Result<()> {
    let views: Vec<LabView> = match &args.lab {
        Some(lab) => vec![LabView::ask(&Lab::open(&deploy::name_of(lab)?)?)],
        // One that is destroyed at this moment is none any more.
        None => Lab::list()
            .iter()
            .filter_map(|name| Lab::open(name).ok())
            .map(|lab| LabView::ask(&lab))
            .collect(),
    };
    match (args.output.output, args.lab.is_some(), views.first()) {
        (Output::Json, true, Some(view)) => println!("{}", serde_json::to_string_pretty(view)?),
        (Output::Json, ..) => {
            println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "labs": views }))?);
        }
        (Output::Text, _, None) => println!("no lab is deployed"),
        (Output::Text, ..) => {
            let texts: Vec<String> = views.iter().map(text_of).collect();
            print!("{}", texts.join("\n"));
        }
    }
    Ok(())
}

fn text_of(view: &LabView) -> String {
    let mut out =
        format!("lab {}\n\n  {:<20} {:<8} {:<9} {}\n", view.name, "node", "kind", "agent", "role");
    for node in &view.nodes {
        let kind = format!("{:?}", node.kind).to_lowercase();
        let agent = node.agent_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let role = match node.role {
            Role::Primary => "primary",
            Role::Backup => "backup",
            Role::None => "-",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  {:<20} {kind:<8} {agent:<9} {role}", node.name);
    }
    let _ = writeln!(
        out,
        "\n  {:<20} {:<16} {:<10} {:<10} {:<10} {:>5} {:>10}",
        "container", "address", "primary", "backup", "protected", "gen", "epoch"
    );
    for container in &view.containers {
        let host = |host: &Option<String>| host.clone().unwrap_or_else(|| "-".to_owned());
        let _ = writeln!(
            out,
            "  {:<20} {:<16} {:<10} {:<10} {:<10} {:>5} {:>10}",
            container.name,
            container.address,
            host(&container.primary),
            host(&container.backup),
            if container.protected { "yes" } else { "NO" },
            container.generation,
            container.epoch
        );
        if let Some(reason) = &container.reason {
            let _ = writeln!(out, "    {reason}");
        }
    }
    out
}

/// `nilicon exec`. Returns the exit code of the command.
pub(super) fn exec(args: &ExecArgs) -> Result<ExitCode> {
    let lab = deploy::open(&args.lab)?;
    let namespace = namespace_of(&lab, &args.node)?;
    let [program, arguments @ ..] = args.command.as_slice() else { bail!("there is no command") };
    // Ctrl-C is for the command, whose end is then ours.
    signals::catch()?;
    let spawned = namespace.enter(|| Command::new(program).args(arguments).spawn())?;
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            eprintln!("nilicon: cannot run {program}: {error}");
            // As shells do (POSIX.1-2024, Shell Command Language, 2.8.2).
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            return Ok(ExitCode::from(if missing { 127 } else { 126 }));
        }
    };
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    Ok(code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The network of a node, or of a container where it runs now.
fn namespace_of(lab: &Lab, place: &str) -> Result<Namespace> {
    let topology = lab.topology();
    if topology.nodes.contains_key(place) {
        return Ok(lab.namespace(place)?);
    }
    if !topology.containers.contains_key(place) {
        let known = topology.nodes.keys().chain(topology.containers.keys());
        let known: Vec<&str> = known.map(String::as_str).collect();
        bail!("the lab {} has no {place}; it has {}", lab.name(), known.join(", "));
    }
    let view = LabView::ask(lab);
    let primary = view.container(place).and_then(|container| container.primary.as_deref());
    let part = view.parts(place).find(|(host, _)| Some(*host) == primary);
    let pid = part.and_then(|(_, part)| part.pid);
    let pid = pid.with_context(|| format!("the container {place} does not run now"))?;
    Ok(Namespace::of_process(pid)?)
}

/// `nilicon fault`.
pub(super) fn fault(args: &FaultArgs) -> Result<()> {
    let lab = deploy::open(&args.lab)?;
    faults::check(&args.fault, lab.topology())?;
    let killed = faults::inject(&lab, &args.fault, &LabView::ask(&lab))?;
    let text = faults::describe(&args.fault);
    match killed {
        0 => println!("{text} is done"),
        _ => println!("{text} is done; {killed} processes killed"),
    }
    Ok(())
}

/// `nilicon validate`.
pub(super) fn validate(args: &FileArg) -> Result<()> {
    let topology = Topology::load(&args.topology)?;
    println!(
        "{} is a usable topology: {} nodes, {} links, {} containers, {} of them protected",
        topology.name,
        topology.nodes.len(),
        topology.links.len(),
        topology.containers.len(),
        topology.protect.len()
    );
    Ok(())
}
