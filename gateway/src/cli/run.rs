//! One run of a topology: deploy, protect, load, faults, report, destroy.
//!
//! ```text
//! deploy -> protected -> clients connect and populate -> load -> stop -> audit -> gone -> report
//!                                                         |                  |
//!                             faults, at their times from here    protected again, where the
//!                                                                 faults have gone by
//! ```
//! One thread does it all; whoever wants to show it watches its [`Moment`]s.

use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use netns_tools::topology::{Client, Event, Topology};

use super::args::{Output, RunArgs};
use super::clients::{ClientPhase, Clients};
use super::deploy::Standing;
use super::files::FilesReport;
use super::journal::{self, Failover};
use super::numbers::{grouped, millis};
use super::progress::Progress;
use super::report::{ClientOutcome, Evidence, InjectedFault, RunReport};
use super::switchover::{self, Move};
use super::view::LabView;
use super::{faults, signals, text};
use crate::agent::monotonic_us;
use crate::agent::status::Phase;

/// How long a run lasts if nobody says.
const DURATION: Duration = Duration::from_secs(20);
/// A request that waits for so long breaks its connection: far above any failover, and a run that
/// cannot recover ends some day.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// How long clients may take to connect and to load their data.
const POPULATE_PATIENCE: Duration = Duration::from_secs(300);
/// How long they may take, on top of the reply timeout, to read all back.
const AUDIT_PATIENCE: Duration = Duration::from_secs(120);
/// How long it may take until everything is protected as it was before the faults that have gone by.
const PROTECTION_PATIENCE: Duration = Duration::from_secs(60);
/// Longest nap of the loop: the precision of faults.
const NAP: Duration = Duration::from_millis(5);
/// How often it is asked, before the measured load, whether all is well.
const CHECK: Duration = Duration::from_millis(500);
/// How long the load goes on after the last move.
const AFTER_MOVES: Duration = Duration::from_secs(1);
/// How often the records of failovers are looked for.
const LOOK: Duration = Duration::from_millis(20);

/// What to run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The lab, its load, and its faults (those of `events` count).
    pub(super) topology: Topology,
    /// Length of the load; without it, until the last client is done.
    pub(super) duration: Option<Duration>,
    /// Seed of the clients' requests.
    pub(super) seed: u64,
    pub(super) output_commit: bool,
    pub(super) reply_timeout: Duration,
    /// How often each protected container moves to its other host; if at all, the load lasts until
    /// all are done.
    pub(super) switchovers: u32,
    /// Whether the lab is left standing.
    pub(super) keep: bool,
}

/// What happens in a run, as it happens.
#[derive(Debug)]
pub(super) enum Moment<'a> {
    /// The namespaces, links and agents are there, and this is waited for.
    Preparing(&'a str),
    /// All containers are protected.
    Protected(&'a LabView),
    /// Clients connect and load their data.
    Populating(&'a Clients),
    /// The measured load begins.
    LoadBegins,
    /// The load goes on; so long already.
    Load(&'a Clients, Duration),
    /// A fault happens now.
    Fault(&'a Event),
    /// A container runs on another host.
    FailedOver(&'a Failover, Option<&'a InjectedFault>),
    /// A container has moved, and is protected again; so many have already.
    Moved(&'a Move, usize),
    /// The load is over; everything is read back.
    Auditing,
}

impl Plan {
    /// The faults in order.
    fn events(&self) -> Vec<Event> {
        let mut events = self.topology.events.clone();
        events.sort_by_key(|event| event.at);
        events
    }
}

/// Runs a plan.
///
/// # Errors
/// Something does not work that is no finding about the container's protection: the lab cannot be
/// made, a client cannot begin, the command is interrupted.
pub(super) fn run_once(plan: &Plan, watch: &mut dyn FnMut(Moment<'_>)) -> Result<RunReport> {
    watch(Moment::Preparing("making the lab"));
    let standing = Standing::deploy_new(&plan.topology, plan.output_commit, plan.keep)?;
    let view = standing.until_protected(&mut |text| watch(Moment::Preparing(text)))?;
    watch(Moment::Protected(&view));
    let clients = Clients::start(standing.lab(), plan.seed, plan.reply_timeout)?;
    let mut run = Run {
        plan,
        standing,
        clients,
        faults: Vec::new(),
        failovers: Vec::new(),
        moves: Vec::new(),
        stuck: None,
        watch,
    };
    run.populate()?;
    let load_us = run.load()?;
    run.audit()?;
    let unprotected = run.until_protected_again()?;
    run.report(load_us, unprotected)
}

/// A run from the moment that its clients are there.
struct Run<'a> {
    plan: &'a Plan,
    // Before the lab, so that the clients go first.
    clients: Clients,
    standing: Standing,
    faults: Vec<InjectedFault>,
    failovers: Vec<Failover>,
    moves: Vec<Move>,
    /// Why no more moves were made.
    stuck: Option<String>,
    watch: &'a mut dyn FnMut(Moment<'_>),
}

impl Run<'_> {
    fn populate(&mut self) -> Result<()> {
        let deadline = Instant::now() + POPULATE_PATIENCE;
        let mut checked = Instant::now();
        while !self.clients.have_reached(ClientPhase::Running) {
            signals::check()?;
            self.clients.listen(LOOK)?;
            (self.watch)(Moment::Populating(&self.clients));
            if checked.elapsed() >= CHECK {
                checked = Instant::now();
                self.standing.check()?;
            }
            if Instant::now() > deadline {
                bail!("the clients are not ready after {POPULATE_PATIENCE:?}");
            }
        }
        Ok(())
    }

    /// The measured load with its faults. Returns when it began and ended.
    fn load(&mut self) -> Result<(u64, u64)> {
        let (begun, begun_us) = (Instant::now(), monotonic_us());
        (self.watch)(Moment::LoadBegins);
        let mut events = self.plan.events().into_iter().peekable();
        let mut looked = Instant::now();
        let planned = self.plan.switchovers > 0;
        let moving =
            planned.then(|| switchover::in_background(self.standing.lab(), self.plan.switchovers));
        let mut moved = None;
        loop {
            signals::check()?;
            let elapsed = begun.elapsed();
            while let Some(event) = events.next_if(|event| *event.at <= elapsed) {
                self.inject(event)?;
            }
            if let Some(moving) = &moving
                && moved.is_none()
                && !self.look_for_moves(moving)
            {
                moved = Some(Instant::now());
            }
            let over = match self.plan.duration {
                _ if planned => moved.is_some_and(|at: Instant| at.elapsed() >= AFTER_MOVES),
                Some(duration) => elapsed >= duration,
                None => self.clients.have_reached(ClientPhase::Auditing),
            };
            if over {
                break;
            }
            let next = events.peek().map_or(NAP, |event| event.at.saturating_sub(elapsed));
            self.clients.listen(next.min(NAP))?;
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                self.look_for_failovers();
            }
            (self.watch)(Moment::Load(&self.clients, elapsed));
        }
        self.clients.stop();
        Ok((begun_us, monotonic_us()))
    }

    fn inject(&mut self, event: Event) -> Result<()> {
        let lost = faults::host_lost_by(&event);
        // What goes on, or heals, concerns nobody that need be asked.
        let lab = self.standing.lab();
        let before = if lost.is_some() { LabView::ask(lab) } else { LabView::unasked(lab) };
        let topology = self.standing.lab().topology();
        let (mut took, mut missed) = (Vec::new(), Vec::new());
        for container in &before.containers {
            let Some(protect) = topology.protection_of(&container.name) else { continue };
            // Only the first loss of the first host is sure to be meant for this container.
            let meant = self.faults.is_empty() && Some(protect.primary.as_str()) == lost;
            match container.primary.as_deref() {
                Some(host) if Some(host) == lost => {
                    took.push((container.name.clone(), host.to_owned()));
                }
                now if meant => {
                    let reason = container.reason.as_deref();
                    let name = &container.name;
                    missed.push(match (now, reason) {
                        (Some(host), _) => format!("{name} had moved to {host}"),
                        (None, Some(reason)) => format!("{name} had failed ({reason})"),
                        (None, None) => format!("{name} had gone"),
                    });
                }
                _ => {}
            }
        }
        (self.watch)(Moment::Fault(&event));
        let at_us = monotonic_us();
        let killed = faults::inject(self.standing.lab(), &event, &before)?;
        let fault = InjectedFault { event, at_us, killed, took, missed };
        self.faults.push(fault);
        Ok(())
    }

    /// Takes in what has moved; whether there is more to come.
    fn look_for_moves(&mut self, moving: &Receiver<Result<Move>>) -> bool {
        loop {
            match moving.try_recv() {
                Ok(Ok(done)) => {
                    self.moves.push(done);
                    let count = self.moves.len();
                    (self.watch)(Moment::Moved(&self.moves[count - 1], count));
                }
                Ok(Err(error)) => self.stuck = Some(crate::chain::chain(&error)),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn look_for_failovers(&mut self) {
        let now = journal::failovers(self.standing.lab());
        for failover in &now {
            let is_known = |known: &Failover| {
                (&known.container, &known.host) == (&failover.container, &failover.host)
                    && known.record.generation == failover.record.generation
            };
            if !self.failovers.iter().any(is_known) {
                (self.watch)(Moment::FailedOver(failover, self.faults.last()));
            }
        }
        self.failovers = now;
    }

    /// Waits for the clients to read everything back.
    fn audit(&mut self) -> Result<()> {
        let patience = self.plan.reply_timeout + AUDIT_PATIENCE;
        let deadline = Instant::now() + patience;
        (self.watch)(Moment::Auditing);
        while !self.clients.are_done() {
            signals::check()?;
            self.clients.listen(LOOK)?;
            self.look_for_failovers();
            if Instant::now() > deadline {
                bail!("the clients have not read everything back after {patience:?}");
            }
        }
        Ok(())
    }

    /// Where all faults have gone by, waits until everything is protected as it was. Gives what is
    /// not.
    fn until_protected_again(&mut self) -> Result<Option<String>> {
        let events = self.faults.iter().map(|fault| &fault.event);
        if self.faults.is_empty() || !faults::all_have_gone_by(events) {
            return Ok(None);
        }
        (self.watch)(Moment::Preparing("waiting until all is protected again"));
        let deadline = Instant::now() + PROTECTION_PATIENCE;
        loop {
            signals::check()?;
            self.look_for_failovers();
            let view = LabView::ask(self.standing.lab());
            let topology = self.standing.lab().topology();
            let protected = topology.protect.iter().map(|protect| &protect.container);
            let mut seen = protected.filter_map(|name| view.container(name));
            let Some(bare) = seen.find(|container| !container.protected) else { return Ok(None) };
            let is_over =
                bare.primary.is_none() && matches!(bare.phase, Some(Phase::Ended | Phase::Failed));
            if is_over || Instant::now() > deadline {
                let reason = bare.reason.as_deref().map(|reason| format!(" ({reason})"));
                let (name, reason) = (&bare.name, reason.unwrap_or_default());
                return Ok(Some(format!("{name} is not protected again{reason}")));
            }
            std::thread::sleep(LOOK);
        }
    }

    fn report(mut self, load_us: (u64, u64), unprotected: Option<String>) -> Result<RunReport> {
        self.look_for_failovers();
        let (plan, view) = (self.plan, LabView::ask(self.standing.lab()));
        let topology = &plan.topology;
        let files = FilesReport::compare(topology, &view);
        let lab = self.standing.lab();
        let clients = self.clients.all.iter().map(|client| ClientOutcome {
            name: client.name.clone(),
            report: client.report.clone().unwrap_or_default(),
            last_reply_us: client.progress.and_then(|progress| progress.last_reply_us),
            load_over_us: client.progress.and_then(|progress| progress.load_over_us),
        });
        let mut report = RunReport::of(Evidence {
            topology: lab.name().to_owned(),
            output_commit: self.plan.output_commit,
            load_us,
            clients: clients.collect(),
            epochs: journal::epochs(lab, &(load_us.0..=load_us.1)),
            failovers: self.failovers.clone(),
            faults: self.faults.clone(),
            containers: view.containers.clone(),
            unprotected,
            files,
        });
        if self.plan.switchovers > 0 {
            report.add_moves(std::mem::take(&mut self.moves), self.stuck.take());
        }
        if !report.is_success() {
            report.logs = self.standing.logs();
        }
        if plan.keep {
            return Ok(report);
        }
        drop(self);
        if let Some(files) = &mut report.files {
            files.check(topology, &view)?;
        }
        Ok(report)
    }
}

/// How long a load lasts: what is asked for, else what the file says, else as long as the clients
/// say, if all of them do.
fn duration(asked: Option<Duration>, topology: &Topology) -> Option<Duration> {
    let clients_end = topology.clients.iter().all(|client: &Client| client.duration.is_some());
    let default = (!clients_end || topology.clients.is_empty()).then_some(DURATION);
    asked.or(topology.duration.map(|duration| *duration)).or(default)
}

/// What a moment looks like on the live line.
pub(super) fn show(progress: &mut Progress, moment: &Moment<'_>) {
    match moment {
        Moment::Preparing(text) => progress.update(|| (*text).to_owned()),
        Moment::Protected(_) => progress.show("protected; starting the clients"),
        Moment::Populating(clients) => progress.update(|| {
            let now = clients.all.iter().filter_map(|client| client.progress);
            let bytes: u64 = now.map(|progress| progress.populated_bytes).sum();
            format!("clients load their data: {} MB", bytes / 1_000_000)
        }),
        Moment::Load(clients, elapsed) => progress.update(|| {
            let (rate, gap, errors) = clients.pulse();
            let silent =
                if gap >= 10.0 { format!(", silent {}", millis(gap)) } else { String::new() };
            let wrong = if errors > 0 { format!(", {errors} ERRORS") } else { String::new() };
            let (seconds, rate) = (elapsed.as_secs_f64(), grouped(rate as u64));
            format!("{seconds:5.1} s  {rate} requests/s{silent}{wrong}")
        }),
        Moment::Fault(event) => progress.show(&format!("{} now", faults::describe(event))),
        Moment::Moved(done, count) => progress.update(|| {
            format!("move {count}: to {}, paused for {}", done.to, millis(done.pause_ms))
        }),
        Moment::Auditing => progress.show("load is over; reading everything back"),
        Moment::LoadBegins | Moment::FailedOver(..) => {}
    }
}

/// What the agents said last, if anything went wrong: their lab is gone, and their logs with it.
pub(super) fn eprint_logs(report: &RunReport) {
    if !report.logs.is_empty() {
        eprintln!("{}", report.logs.trim_start());
    }
}

/// `nilicon run`. Returns whether it was a success.
pub(super) fn run(args: &RunArgs) -> Result<bool> {
    signals::catch()?;
    let mut topology = args.topology.load()?;
    for fault in &args.faults {
        faults::check(fault, &topology)?;
    }
    if args.switchovers.is_some() {
        topology.events.clear();
    }
    topology.events.extend(args.faults.iter().cloned());
    let duration = duration(args.duration.map(|duration| *duration), &topology);
    let late = topology.events.iter().find(|event| duration.is_some_and(|over| *event.at >= over));
    if let (Some(event), Some(over)) = (late, duration) {
        bail!(
            "{} at {} would come after the run, which lasts {over:?}; give a longer --duration",
            faults::describe(event),
            event.at
        );
    }
    let plan = Plan {
        topology,
        duration,
        seed: args.seed,
        output_commit: args.output_commit.is_on(),
        reply_timeout: REPLY_TIMEOUT,
        switchovers: args.switchovers.unwrap_or(0),
        keep: args.keep,
    };
    let mut progress = Progress::new();
    let report = run_once(&plan, &mut |moment| show(&mut progress, &moment))?;
    progress.clear();
    match args.output.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text => print!("{}", text::of_run(&report)),
    }
    if args.output_commit.is_on() {
        eprint_logs(&report);
    }
    if args.keep {
        let name = &report.topology;
        eprintln!("the lab {name} stands; remove it with: nilicon destroy {name}");
    }
    Ok(report.is_success())
}

#[cfg(test)]
mod tests {
    use super::*;
    use netns_tools::topology::Period;

    #[test]
    fn what_is_asked_for_comes_before_what_the_file_says() {
        let mut topology = Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap();
        let seconds = Duration::from_secs;
        assert_eq!(duration(Some(seconds(3)), &topology), Some(seconds(3)));
        assert_eq!(duration(None, &topology), topology.duration.map(|d| *d));
        topology.duration = None;
        assert_eq!(duration(None, &topology), Some(DURATION));
        topology.clients[0].duration = Some(Period::ms(500));
        assert_eq!(duration(None, &topology), None, "until the last client is done");
        topology.clients.clear();
        assert_eq!(duration(None, &topology), Some(DURATION));
    }
}
