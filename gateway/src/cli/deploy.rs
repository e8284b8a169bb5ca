//! Labs with agents: bringing one up until all containers are protected, and taking it down.
//!
//! ```text
//! namespaces and links -> keys -> one agent a host -> containers ready -> protected
//! ```
//! Invariant: a [`Standing`] lab that is not kept goes when the value goes, on every way out, also
//! if it was never finished.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_tools::lab::{Lab, LinkTask};
use netns_tools::topology::{NodeKind, Topology};

use super::args::{DeployArgs, LabArg, is_lab_name};
use super::progress::Progress;
use super::view::LabView;
use super::{keys, signals};
use crate::agent::status::{Phase, state_dir};

/// How long the first full copy may take, on top of what containers take to get ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where it is written down whether output waits for its checkpoint.
const OUTPUT_COMMIT: &str = "output-commit";
/// How often agents are asked.
const POLL: Duration = Duration::from_millis(20);
/// How much of the end of a log goes into an error.
const TAIL_BYTES: u64 = 64 << 10;
const TAIL_LINES: usize = 25;

/// What the agent of a host is called among the processes of its lab.
pub(super) fn agent_name(host: &str) -> String {
    format!("agent-{host}")
}

/// A deployed lab. It is destroyed when this is dropped, unless it is to be kept.
#[derive(Debug)]
pub(super) struct Standing {
    name: String,
    keep: bool,
    lab: Option<Lab>,
    /// The agents started here, to be reaped here.
    agents: Vec<Child>,
}

impl Standing {
    /// Makes a lab and starts its agents, those that do not run yet. The containers are not ready
    /// then; see [`Standing::until_protected`].
    ///
    /// # Errors
    /// The lab or an agent cannot be made. The lab is then destroyed, unless it is to be kept.
    pub(super) fn deploy(topology: &Topology, output_commit: bool, keep: bool) -> Result<Self> {
        let name = topology.name.clone();
        let mut standing = Self { name, keep, lab: None, agents: Vec::new() };
        let program = super::own_program()?;
        let lab = Lab::deploy(topology, |task: &LinkTask| {
            let mut command = Command::new(&program);
            command.args(["__link", &task.lab, &task.index.to_string()]);
            command
        })?;
        let pki = state_dir(lab.name()).join("pki");
        if !pki.exists() {
            keys::for_lab(&pki, topology)?;
        }
        let commits = if output_commit { "on" } else { "off" };
        fs::write(lab.directory().join(OUTPUT_COMMIT), commits)?;
        for host in topology.nodes_of(NodeKind::Host) {
            if lab.process(&agent_name(host))?.is_none() {
                let agent = start_agent(&lab, host, &pki, output_commit)
                    .with_context(|| format!("cannot start the agent of {host}"))?;
                standing.agents.push(agent);
            }
        }
        standing.lab = Some(lab);
        Ok(standing)
    }

    /// Like [`Standing::deploy`], for a lab that must be new.
    ///
    /// # Errors
    /// Somebody uses a lab of that name, or it cannot be made.
    pub(super) fn deploy_new(topology: &Topology, output_commit: bool, keep: bool) -> Result<Self> {
        let name = &topology.name;
        if let Ok(lab) = Lab::open(name) {
            let lives = lab.processes()?.iter().any(|helper| helper.process.is_alive());
            ensure!(!lives, "the lab {name} is in use; end that with: nilicon destroy {name}");
            // Left behind by a run that could not tidy up.
            Lab::destroy(name);
        }
        Self::deploy(topology, output_commit, keep)
    }

    /// The lab.
    pub(super) fn lab(&self) -> &Lab {
        self.lab.as_ref().expect("it is there from the end of `deploy` on")
    }

    /// Waits until every container runs, and those to be protected are. `tell` hears what is
    /// waited for.
    ///
    /// # Errors
    /// An agent ended, a container failed, it takes too long, or the command is interrupted.
    pub(super) fn until_protected(&self, tell: &mut dyn FnMut(&str)) -> Result<LabView> {
        let lab = self.lab();
        let containers = lab.topology().containers.values();
        let ready = containers.filter_map(|container| Some(*container.ready.as_ref()?.timeout));
        let deadline = Instant::now() + PATIENCE + ready.max().unwrap_or_default();
        loop {
            signals::check()?;
            let view = LabView::ask(lab);
            let waiting = waiting_for(lab.topology(), &view).map_err(|e| e.with_log(lab))?;
            let Some(waiting) = waiting else { return Ok(view) };
            for host in lab.topology().nodes_of(NodeKind::Host) {
                if lab.process(&agent_name(host))?.is_none() {
                    bail!("the agent of {host} has ended{}", agent_log(lab, host));
                }
            }
            if Instant::now() > deadline {
                let home = lab.topology().home_of(&waiting.container).unwrap_or_default();
                bail!("{waiting}: it takes too long{}", agent_log(lab, home));
            }
            tell(&waiting.to_string());
            thread::sleep(POLL);
        }
    }

    /// Whether all containers still have a chance.
    ///
    /// # Errors
    /// One has failed or ended.
    pub(super) fn check(&self) -> Result<()> {
        let lab = self.lab();
        match waiting_for(lab.topology(), &LabView::ask(lab)) {
            Ok(_) => Ok(()),
            Err(failure) => Err(failure.with_log(lab)),
        }
    }

    /// The ends of the logs of all agents.
    pub(super) fn logs(&self) -> String {
        let hosts = self.lab().topology().nodes_of(NodeKind::Host);
        hosts.map(|host| agent_log(self.lab(), host)).collect()
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        // The lab is written down before anything of it is made.
        if !self.keep && state_dir(&self.name).exists() {
            for problem in Lab::destroy(&self.name).problems {
                eprintln!("nilicon: the lab {} is not gone: {problem}", self.name);
            }
        }
        for agent in &mut self.agents {
            // Those that run on belong to the lab and are no concern of ours.
            let _ = agent.try_wait();
        }
    }
}

/// What a lab is not ready for yet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Waiting {
    container: String,
    for_what: &'static str,
}

impl std::fmt::Display for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "waiting for {} to be {}", self.container, self.for_what)
    }
}

/// What will never be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Failure {
    host: String,
    why: String,
}

impl Failure {
    fn with_log(&self, lab: &Lab) -> anyhow::Error {
        anyhow::anyhow!("{}{}", self.why, agent_log(lab, &self.host))
    }
}

/// What a lab still waits for; none if it is ready.
fn waiting_for(topology: &Topology, view: &LabView) -> Result<Option<Waiting>, Failure> {
    let mut waiting = None;
    for container in &view.containers {
        let name = &container.name;
        let ended = |phase| matches!(phase, Phase::Failed | Phase::Ended);
        if let Some((host, part)) =
            view.parts(name).find(|(_, part)| container.primary.is_none() && ended(part.phase))
        {
            let reason = part.reason.as_deref().unwrap_or("for no known reason");
            let what = if part.phase == Phase::Failed { "has failed" } else { "has ended" };
            let why = format!("{name} {what} on {host}: {reason}");
            return Err(Failure { host: host.to_owned(), why });
        }
        let for_what = match container.phase {
            _ if container.protected => continue,
            Some(Phase::Unprotected) if topology.protection_of(name).is_none() => continue,
            None | Some(Phase::Starting | Phase::Waiting) => "ready",
            Some(_) => "protected",
        };
        waiting = waiting.or(Some(Waiting { container: name.clone(), for_what }));
    }
    Ok(waiting)
}

/// Starts the agent of a host again, with what the lab has.
///
/// # Errors
/// It runs already, or cannot be started.
pub(super) fn restart_agent(lab: &Lab, host: &str) -> Result<()> {
    ensure!(lab.process(&agent_name(host))?.is_none(), "the agent of {host} runs already");
    let commits =
        fs::read_to_string(lab.directory().join(OUTPUT_COMMIT)).map_or(true, |t| t == "on");
    // It belongs to the lab from here on.
    start_agent(lab, host, &state_dir(lab.name()).join("pki"), commits).map(drop)
}

fn start_agent(lab: &Lab, host: &str, pki: &Path, output_commit: bool) -> Result<Child> {
    let path = lab.directory().join(format!("{host}.log"));
    // An agent that starts again goes on behind what the one before it said.
    let log = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let mut command = Command::new(super::own_program()?);
    let witness = lab.topology().is_witness(host);
    command
        .arg(if witness { "witness" } else { "agent" })
        .arg(lab.directory().join("topology.json"));
    if !witness {
        let output_commit = if output_commit { "on" } else { "off" };
        command.args(["--host", host, "--output-commit", output_commit]);
    }
    command
        .arg("--pki")
        .arg(pki)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C is for the command that deploys.
        .process_group(0);
    let mut child = lab.namespace(host)?.spawn(&mut command)?;
    if let Err(error) = lab.register_process(&agent_name(host), child.id()) {
        // Nobody would end it later.
        let _ = child.kill().and_then(|()| child.wait());
        bail!("{error}{}", agent_log(lab, host));
    }
    Ok(child)
}

fn agent_log(lab: &Lab, host: &str) -> String {
    tail_of(&lab.directory().join(format!("{host}.log")))
}

/// The end of a file, to be put after an error; nothing if it is empty.
pub(super) fn tail_of(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
        let mut end = Vec::new();
        file.read_to_end(&mut end)?;
        Ok(String::from_utf8_lossy(&end).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines = without_repeats(&text);
    if lines.is_empty() {
        return String::new();
    }
    let last = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n  ");
    format!("\nthe end of {}:\n  {last}", path.display())
}

/// The lines of a log, those that say the same but for their numbers once, where they came first.
fn without_repeats(text: &str) -> Vec<String> {
    let mut lines: Vec<(&str, usize)> = Vec::new();
    let mut known = HashMap::new();
    for line in text.lines() {
        let said: String = line.chars().filter(|c| !c.is_ascii_digit()).collect();
        let at = *known.entry(said).or_insert(lines.len());
        match lines.get_mut(at) {
            Some((_, more)) => *more += 1,
            None => lines.push((line, 0)),
        }
    }
    let shown = |(line, more): (&str, usize)| match more {
        0 => line.to_owned(),
        more => format!("{line} (and {more} more like it)"),
    };
    lines.into_iter().map(shown).collect()
}

/// Finds a lab by its name, or by its topology file.
///
/// # Errors
/// It is neither.
pub(super) fn name_of(lab: &str) -> Result<String> {
    if is_lab_name(lab) && (state_dir(lab).is_dir() || fs::metadata(lab).is_err()) {
        return Ok(lab.to_owned());
    }
    Ok(Topology::load(lab)?.name)
}

/// Opens a lab by its name, or by its topology file.
///
/// # Errors
/// It is not deployed.
pub(super) fn open(lab: &LabArg) -> Result<Lab> {
    Ok(Lab::open(&name_of(&lab.lab)?)?)
}

/// `nilicon deploy`.
pub(super) fn deploy(args: &DeployArgs) -> Result<()> {
    signals::catch()?;
    let topology = args.topology.load()?;
    let name = topology.name.clone();
    let mut progress = Progress::new();
    progress.show(&format!("making the lab {name}"));
    let standing = Standing::deploy(&topology, args.output_commit.is_on(), true)?;
    let ready = standing.until_protected(&mut |text| progress.update(|| text.to_owned()));
    progress.clear();
    let view = ready.with_context(|| {
        format!("the lab {name} is not ready (it stands; remove it with: nilicon destroy {name})")
    })?;
    for container in &view.containers {
        let on = container.primary.as_deref().unwrap_or("nowhere");
        let by = match (&container.backup, container.protected) {
            (Some(backup), true) => format!("protected by {backup}"),
            _ => "not protected".to_owned(),
        };
        println!("{} ({}) runs on {on}, {by}", container.name, container.address);
    }
    println!("the lab {name} stands; remove it with: nilicon destroy {name}");
    Ok(())
}

/// `nilicon destroy`. That there is no such lab is no error.
pub(super) fn destroy(lab: &LabArg) -> Result<()> {
    let name = name_of(&lab.lab)?;
    let done = Lab::destroy(&name);
    ensure!(done.problems.is_empty(), "the lab {name} is not gone: {}", done.problems.join("; "));
    println!(
        "the lab {name} is gone: {} processes, {} namespaces",
        done.processes, done.namespaces
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::status::{AgentStatus, ContainerStatus, Role};

    #[test]
    fn a_log_is_shown_without_its_repeats() {
        let log = "12:00 begun\n12:01 refused 7\n12:02 refused 8\n12:03 gone\n12:04 refused 9\n";
        let shown = ["12:00 begun", "12:01 refused 7 (and 2 more like it)", "12:03 gone"];
        assert_eq!(without_repeats(log), shown);
        assert!(without_repeats("").is_empty());
    }

    fn part(role: Role, phase: Phase) -> ContainerStatus {
        ContainerStatus {
            name: "store".to_owned(),
            address: "10.77.0.10".to_owned(),
            role,
            phase,
            protected: phase == Phase::Protected,
            generation: 1,
            epoch: 0,
            pid: None,
            reason: None,
        }
    }

    fn view(role: Role, phase: Phase, reason: Option<&str>) -> (Topology, LabView) {
        let topology = Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap();
        let part = ContainerStatus { reason: reason.map(str::to_owned), ..part(role, phase) };
        let agent =
            AgentStatus { host: "alpha".to_owned(), pid: 1, containers: vec![part], refusal: None };
        let view = LabView::of(&topology, vec![agent]);
        (topology, view)
    }

    fn waits(phase: Phase) -> Option<String> {
        let (topology, view) = view(Role::Primary, phase, None);
        waiting_for(&topology, &view).unwrap().map(|waiting| waiting.to_string())
    }

    #[test]
    fn deploying_waits_for_protection_and_no_longer() {
        assert_eq!(waits(Phase::Starting).unwrap(), "waiting for store to be ready");
        assert_eq!(waits(Phase::Unprotected).unwrap(), "waiting for store to be protected");
        assert_eq!(waits(Phase::Syncing).unwrap(), "waiting for store to be protected");
        assert_eq!(waits(Phase::Protected), None);
    }

    #[test]
    fn a_container_that_nobody_protects_is_ready_when_it_runs() {
        let (mut topology, view) = view(Role::Primary, Phase::Unprotected, None);
        topology.protect.clear();
        assert_eq!(waiting_for(&topology, &view), Ok(None));
    }

    #[test]
    fn a_failure_is_told_at_once_with_its_reason() {
        let (topology, view) = view(Role::None, Phase::Failed, Some("io_uring is in use"));
        let failure = waiting_for(&topology, &view).unwrap_err();
        assert_eq!(failure.why, "store has failed on alpha: io_uring is in use");
        assert_eq!(failure.host, "alpha");
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        let path = std::env::temp_dir().join(format!("nilicon-tail-{}", std::process::id()));
        // Of any two of them one is longer.
        let line = |n: usize| format!("line {}", "x".repeat(n));
        let lines: Vec<String> = (0..300).map(line).collect();
        fs::write(&path, lines.join("\n")).unwrap();
        let tail = tail_of(&path);
        fs::remove_file(&path).unwrap();
        let first = 300 - TAIL_LINES;
        assert!(tail.ends_with(&format!("\n  {}", line(299))), "{tail}");
        assert!(tail.contains(&format!("\n  {}\n", line(first))), "{tail}");
        assert!(!tail.contains(&format!("\n  {}\n", line(first - 1))), "{tail}");
        assert_eq!(tail_of(&path), "");
    }
}
