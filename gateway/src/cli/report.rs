//! What a run found: built from what the clients, the agents and the faults left behind, by pure
//! functions, so that the verdict can be tested without a lab.
//!
//! The verdict has two halves. A run *recovered* if every container whose host was lost runs
//! elsewhere, every client got answers again after the last fault, and everything is protected again
//! where all faults have gone by. It is *clean* if no client found a write lost, a reply wrong or a
//! connection broken, no history of shared keys that cannot be explained, and the files of volumes are the
//! same on both hosts and whole. Only both together are a
//! success.
//!
//! A fault that hits a host whose container has moved away before proves nothing, and must not
//! pass for a success: such a run counts as not recovered.

use std::time::Duration;

use netns_tools::topology::{Event, Fault};
use nilicon_clients::load::{HistoryReport, Report};
use serde::{Deserialize, Serialize};

use super::faults;
use super::files::FilesReport;
use super::histories::{self, Histories};
use super::journal::Failover;
use super::numbers::{Spread, median};
use super::switchover::{Move, Moves};
use super::view::ContainerView;
use crate::agent::status::{CaptureKinds, EpochRecord, FailoverPhases, StopStages};

/// A silence of a client that is longer is no pause but an end. Far above any failover, and below
/// the time after which a request breaks its connection.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The report of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct RunReport {
    /// The topology's name.
    pub(super) topology: String,
    /// Whether all goes on as if nothing had happened, but for what the clients found.
    pub(super) recovered: bool,
    /// Why it did not recover.
    pub(super) why: Option<String>,
    /// Whether output waited for its checkpoint.
    pub(super) output_commit: bool,
    /// Whether what clients saw of the keys they share can be explained; null if none wrote it down.
    pub(super) linearizable: Option<bool>,
    /// Length of the measured load, in seconds.
    pub(super) duration_s: f64,
    pub(super) clients: Vec<NamedReport>,
    pub(super) epochs: EpochReport,
    /// The first failover.
    pub(super) failover: Option<FailoverReport>,
    /// All failovers, where there is more than one container.
    pub(super) failovers: Vec<FailoverReport>,
    pub(super) faults: Vec<FaultReport>,
    /// What the files of replicated volumes were found to be; null if there are none.
    pub(super) files: Option<FilesReport>,
    /// Planned moves, if that was what the run was for.
    pub(super) moves: Option<Moves>,
    /// Where the containers are in the end.
    pub(super) containers: Vec<ContainerView>,
    /// The ends of the agents' logs, if it was no success.
    #[serde(skip)]
    pub(super) logs: String,
    /// Every epoch, for whoever puts runs together.
    #[serde(skip)]
    pub(super) records: Vec<EpochRecord>,
}

/// What one client found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct NamedReport {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) report: ClientReport,
}

/// What a client found; the fields are those of [`Report`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct ClientReport {
    pub(super) requests: u64,
    pub(super) acknowledged_writes: u64,
    pub(super) reads: u64,
    pub(super) lost_writes: u64,
    pub(super) wrong_replies: u64,
    pub(super) broken_connections: u64,
    /// Connections that it has seen established and that were reset from the other side.
    pub(super) resets: u64,
    /// Connections that came and went beside the load.
    pub(super) churned: u64,
    pub(super) gap_ms: f64,
    pub(super) connection_gap_ms: f64,
    pub(super) latency_us: Latency,
    pub(super) rate_per_s: f64,
    pub(super) connections: usize,
    pub(super) populate_s: f64,
    /// What the history of the keys says that its connections share.
    pub(super) history: Option<HistoryReport>,
    pub(super) notes: Vec<String>,
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Latency {
    pub(super) p50: u64,
    pub(super) p90: u64,
    pub(super) p99: u64,
    pub(super) max: u64,
}

impl From<Report> for ClientReport {
    fn from(report: Report) -> Self {
        let Report { latency_us: l, .. } = report;
        Self {
            requests: report.requests,
            acknowledged_writes: report.acknowledged_writes,
            reads: report.reads,
            lost_writes: report.lost_writes,
            wrong_replies: report.wrong_replies,
            broken_connections: report.broken_connections,
            resets: 0,
            churned: report.churned,
            gap_ms: report.gap_ms,
            connection_gap_ms: report.connection_gap_ms,
            latency_us: Latency { p50: l.p50, p90: l.p90, p99: l.p99, max: l.max },
            rate_per_s: report.rate_per_s,
            connections: report.connections,
            populate_s: report.populate_s,
            history: report.history,
            notes: report.notes,
        }
    }
}

/// The epochs that were committed during the load. Times in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct EpochReport {
    pub(super) committed: usize,
    pub(super) stop_us: Spread<u64>,
    /// The median of each stage.
    pub(super) stop_us_by_stage: StopStages,
    /// The median of each kind of state.
    pub(super) capture_us_by_kind: CaptureKinds,
    pub(super) interval_us: Spread<u64>,
    pub(super) dirty_pages: Spread<u64>,
    pub(super) stop_pages: Spread<u64>,
    pub(super) wire_bytes: WireBytes,
    pub(super) commit_us: Spread<u64>,
}

/// Bytes that epochs took on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct WireBytes {
    #[serde(flatten)]
    pub(super) spread: Spread<u64>,
    pub(super) total: u64,
}

impl EpochReport {
    /// Puts epochs together.
    pub(super) fn of(epochs: &[EpochRecord]) -> Self {
        let spread = |field: fn(&EpochRecord) -> u64| Spread::of(epochs.iter().map(field));
        Self {
            committed: epochs.len(),
            stop_us: spread(|epoch| epoch.stop_us),
            stop_us_by_stage: StopStages::each(|field| {
                median(epochs.iter().map(|epoch| field(&epoch.stop_us_by_stage)))
            }),
            capture_us_by_kind: CaptureKinds::each(|field| {
                median(epochs.iter().map(|epoch| field(&epoch.capture_us_by_kind)))
            }),
            interval_us: spread(|epoch| epoch.interval_us),
            dirty_pages: spread(|epoch| epoch.dirty_pages),
            stop_pages: spread(|epoch| epoch.stop_pages),
            wire_bytes: WireBytes {
                spread: spread(|epoch| epoch.wire_bytes),
                total: epochs.iter().map(|epoch| epoch.wire_bytes).sum(),
            },
            commit_us: spread(|epoch| epoch.commit_us),
        }
    }
}

/// One failover.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct FailoverReport {
    pub(super) container: String,
    /// The host that it went to.
    pub(super) host: String,
    pub(super) generation: u64,
    /// The epoch that it went on from.
    pub(super) epoch: u64,
    /// From the fault to the suspicion; none if no fault came before.
    pub(super) detect_ms: Option<f64>,
    /// From the fault until the container ran again.
    pub(super) outage_ms: Option<f64>,
    #[serde(rename = "phases_ms")]
    pub(super) phases: FailoverPhases,
    /// From the suspicion until the container ran again.
    pub(super) total_ms: f64,
    pub(super) connections: u64,
    pub(super) silent_peers: u64,
    pub(super) replayed_frames: u64,
}

impl FailoverReport {
    fn of(failover: &Failover, faults: &[InjectedFault]) -> Self {
        let record = &failover.record;
        let cause = faults.iter().rev().find(|fault| fault.at_us <= record.suspected_at_us);
        let since = |end: u64| cause.map(|fault| end.saturating_sub(fault.at_us) as f64 / 1e3);
        Self {
            container: failover.container.clone(),
            host: failover.host.clone(),
            generation: record.generation,
            epoch: record.epoch,
            detect_ms: since(record.suspected_at_us),
            outage_ms: since(record.running_at_us),
            phases: record.phases_ms,
            total_ms: record.running_at_us.saturating_sub(record.suspected_at_us) as f64 / 1e3,
            connections: record.connections,
            silent_peers: record.silent_peers,
            replayed_frames: record.replayed_frames,
        }
    }
}

/// A fault that was made to happen. Times are CLOCK_MONOTONIC in microseconds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct InjectedFault {
    pub(super) event: Event,
    /// Just before it.
    pub(super) at_us: u64,
    /// Processes that it killed.
    pub(super) killed: usize,
    /// The protected containers that ran on the host that it took, with that host.
    pub(super) took: Vec<(String, String)>,
    /// Those that ought to have run there and did not any more, with where they were.
    pub(super) missed: Vec<String>,
}

/// A fault, as reported.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct FaultReport {
    /// The fault and where, as on the command line.
    pub(super) fault: String,
    /// Seconds from the start of the load.
    pub(super) at_s: f64,
    /// Processes that it killed.
    pub(super) killed: usize,
}

/// A client in the end. Times are CLOCK_MONOTONIC in microseconds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ClientOutcome {
    pub(super) name: String,
    pub(super) report: ClientReport,
    /// When it last saw a reply to its load.
    pub(super) last_reply_us: Option<u64>,
    /// When its load was over.
    pub(super) load_over_us: Option<u64>,
}

/// All that is known after a run.
#[derive(Debug, Clone)]
pub(super) struct Evidence {
    pub(super) topology: String,
    pub(super) output_commit: bool,
    /// Begin and end of the load, CLOCK_MONOTONIC in microseconds.
    pub(super) load_us: (u64, u64),
    pub(super) clients: Vec<ClientOutcome>,
    pub(super) epochs: Vec<EpochRecord>,
    pub(super) failovers: Vec<Failover>,
    pub(super) faults: Vec<InjectedFault>,
    pub(super) containers: Vec<ContainerView>,
    /// What ought to be protected again and is not.
    pub(super) unprotected: Option<String>,
    /// What was found of their files so far.
    pub(super) files: Option<FilesReport>,
}

impl RunReport {
    /// Judges a run.
    pub(super) fn of(evidence: Evidence) -> Self {
        let why = not_recovered(&evidence);
        let (begun, over) = evidence.load_us;
        let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
        let failovers: Vec<FailoverReport> = evidence
            .failovers
            .iter()
            .map(|failover| FailoverReport::of(failover, &evidence.faults))
            .collect();
        let faults = evidence.faults.iter().map(|fault| FaultReport {
            fault: faults::describe(&fault.event),
            at_s: seconds(begun, fault.at_us),
            killed: fault.killed,
        });
        let clients = evidence.clients.into_iter();
        let mut report = Self {
            topology: evidence.topology,
            recovered: why.is_none(),
            why,
            output_commit: evidence.output_commit,
            linearizable: None,
            duration_s: seconds(begun, over),
            faults: faults.collect(),
            clients: clients.map(|c| NamedReport { name: c.name, report: c.report }).collect(),
            epochs: EpochReport::of(&evidence.epochs),
            failover: failovers.first().cloned(),
            failovers,
            files: evidence.files,
            moves: None,
            containers: evidence.containers,
            logs: String::new(),
            records: evidence.epochs,
        };
        report.linearizable = Histories::of(std::iter::once(&report)).linearizable();
        report
    }

    /// Adds the moves that were made on purpose, and why there were no more. A move that cannot be made
    /// is a failure of the run.
    pub(super) fn add_moves(&mut self, moves: Vec<Move>, stuck: Option<String>) {
        if let Some(stuck) = stuck {
            self.recovered = false;
            self.why.get_or_insert(format!("after {} moves: {stuck}", moves.len()));
        }
        self.moves = Some(Moves::of(moves));
    }

    /// The sum of a figure over all clients.
    pub(super) fn sum(&self, figure: fn(&ClientReport) -> u64) -> u64 {
        self.clients.iter().map(|client| figure(&client.report)).sum()
    }

    /// The longest wait of a client, in milliseconds.
    pub(super) fn gap_ms(&self) -> f64 {
        self.clients.iter().map(|client| client.report.gap_ms).fold(0.0, f64::max)
    }

    /// Whether no client found anything lost, wrong or broken, or saw what cannot be explained, and
    /// all files are what they should be.
    pub(super) fn is_clean(&self) -> bool {
        self.sum(|c| c.lost_writes + c.wrong_replies + c.broken_connections + c.resets) == 0
            && histories::complaints(self).next().is_none()
            && self.files.as_ref().is_none_or(|files| files.wrong.is_empty())
    }

    /// Whether it recovered and is clean.
    pub(super) fn is_success(&self) -> bool {
        self.recovered && self.is_clean()
    }

    /// What was not as it should be, in a line.
    pub(super) fn complaint(&self) -> Option<String> {
        let mut found: Vec<String> = self.why.iter().cloned().collect();
        let counts = [
            (self.sum(|c| c.lost_writes), "acknowledged writes lost"),
            (self.sum(|c| c.wrong_replies), "wrong replies"),
            (self.sum(|c| c.broken_connections), "broken connections"),
            (self.sum(|c| c.resets), "resets"),
        ];
        let counts = counts.iter().filter(|(count, _)| *count > 0);
        found.extend(counts.map(|(count, what)| format!("{count} {what}")));
        found.extend(histories::complaints(self));
        found.extend(self.files.iter().flat_map(|files| files.wrong.iter().cloned()));
        (!found.is_empty()).then(|| found.join("; "))
    }
}

/// Whether a container that was killed has been elsewhere since.
fn went_and_came_back(evidence: &Evidence, fault: usize, container: &str, lost: &str) -> bool {
    let fault = &evidence.faults[fault];
    let elsewhere = |f: &Failover| {
        f.container == container && f.host != lost && f.record.running_at_us > fault.at_us
    };
    fault.event.fault == Fault::KillContainer && evidence.failovers.iter().any(elsewhere)
}

/// Why a run has not recovered; none if it has.
fn not_recovered(evidence: &Evidence) -> Option<String> {
    if let Some(idle) = evidence.clients.iter().find(|client| client.last_reply_us.is_none()) {
        return Some(format!("the client {} never got an answer", idle.name));
    }
    if let Some(missed) = evidence.faults.iter().find_map(|fault| fault.missed.first()) {
        return Some(format!("{missed} before the fault, which so proved nothing"));
    }
    for (index, (container, lost)) in evidence
        .faults
        .iter()
        .enumerate()
        .flat_map(|(i, f)| f.took.iter().map(move |took| (i, took)))
    {
        // It may come back to where an earlier fault took it from.
        let later = evidence.faults.iter().skip(index + 1).flat_map(|fault| &fault.took);
        if later.into_iter().any(|(again, _)| again == container) {
            continue;
        }
        let now = evidence.containers.iter().find(|now| now.name == *container);
        match now.and_then(|now| now.primary.as_ref()) {
            Some(host) if host != lost => {}
            // With the policy `restart` it comes back by itself.
            Some(_) if went_and_came_back(evidence, index, container, lost) => {}
            Some(_) => return Some(format!("{container} still is on {lost}")),
            None => {
                let reason = now.and_then(|now| now.reason.as_ref());
                let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
                return Some(format!("{container} does not run anywhere{reason}"));
            }
        }
    }
    if let Some(unprotected) = &evidence.unprotected {
        return Some(unprotected.clone());
    }
    let last_fault = evidence.faults.iter().map(|fault| fault.at_us).max()?;
    // Before a container runs again, replies may still come that were on their way.
    let runs_again = evidence.failovers.iter().map(|failover| failover.record.running_at_us);
    let mark = runs_again.max().unwrap_or(0).max(last_fault);
    let still_asking = |client: &&ClientOutcome| client.load_over_us.is_none_or(|at| at > mark);
    let unanswered = evidence.clients.iter().filter(still_asking).find(|client| {
        client.last_reply_us.is_none_or(|at| at <= mark) || ended_in_silence(client)
    })?;
    Some(format!("the client {} got no answer any more", unanswered.name))
}

/// Whether the client's load ended in a silence that was no pause any more. A last reply may come
/// right after a fault and prove nothing: it was under way.
fn ended_in_silence(client: &ClientOutcome) -> bool {
    let (Some(last), Some(over)) = (client.last_reply_us, client.load_over_us) else {
        return false;
    };
    over.saturating_sub(last) >= LONGEST_PAUSE.as_micros() as u64
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::agent::status::{FailoverRecord, Phase};

    fn container(primary: Option<&str>) -> ContainerView {
        ContainerView {
            name: "redis".to_owned(),
            address: "10.0.0.1".to_owned(),
            primary: primary.map(str::to_owned),
            backup: None,
            protected: false,
            phase: Some(Phase::Unprotected),
            generation: 2,
            epoch: 9,
            reason: None,
        }
    }

    fn client(last_reply_us: u64) -> ClientOutcome {
        ClientOutcome {
            name: "client".to_owned(),
            report: ClientReport { requests: 10, gap_ms: 80.0, ..ClientReport::default() },
            last_reply_us: Some(last_reply_us),
            load_over_us: Some(9_000_000),
        }
    }

    /// alpha is killed 3 s after the begin at 1 s, suspected after 50 ms, replaced after 90.
    fn evidence() -> Evidence {
        let record = FailoverRecord {
            suspected_at_us: 4_050_000,
            running_at_us: 4_090_000,
            ..FailoverRecord::default()
        };
        let (name, host) = ("redis".to_owned(), "beta".to_owned());
        Evidence {
            topology: "demo".to_owned(),
            output_commit: true,
            load_us: (1_000_000, 9_000_000),
            clients: vec![client(8_999_000)],
            epochs: Vec::new(),
            failovers: vec![Failover { container: name.clone(), host, record }],
            faults: vec![InjectedFault {
                event: faults::parse("kill-host:alpha").unwrap(),
                at_us: 4_000_000,
                killed: 3,
                took: vec![(name, "alpha".to_owned())],
                missed: Vec::new(),
            }],
            containers: vec![container(Some("beta"))],
            unprotected: None,
            files: None,
        }
    }

    /// A run with a failover.
    pub(in crate::cli) fn moved() -> RunReport {
        RunReport::of(evidence())
    }

    #[test]
    fn a_failover_that_works() {
        let report = RunReport::of(evidence());
        assert!(report.is_success(), "{:?}", report.complaint());
        let failover = report.failover.as_ref().unwrap();
        assert_eq!(failover.detect_ms, Some(50.0));
        assert_eq!((failover.total_ms, failover.outage_ms), (40.0, Some(90.0)));
        assert_eq!(report.faults[0].at_s, 3.0);
        assert_eq!(report.gap_ms(), 80.0);
    }

    #[test]
    fn one_that_was_killed_may_be_back_where_it_was() {
        let back = || Evidence { containers: vec![container(Some("alpha"))], ..evidence() };
        let mut killed = back();
        killed.faults[0].event.fault = Fault::KillContainer;
        assert_eq!(RunReport::of(killed).why, None);
        let mut never_gone = Evidence { failovers: Vec::new(), ..back() };
        never_gone.faults[0].event.fault = Fault::KillContainer;
        assert_eq!(RunReport::of(never_gone).why.unwrap(), "redis still is on alpha");
    }

    #[test]
    fn a_container_that_stays_away_is_no_recovery() {
        let nowhere = Evidence { containers: vec![container(None)], ..evidence() };
        let why = RunReport::of(nowhere).why.unwrap();
        assert_eq!(why, "redis does not run anywhere");
        let bare = Evidence { unprotected: Some("redis is bare".to_owned()), ..evidence() };
        assert_eq!(RunReport::of(bare).why.as_deref(), Some("redis is bare"));
        let stuck = Evidence { containers: vec![container(Some("alpha"))], ..evidence() };
        assert_eq!(RunReport::of(stuck).why.unwrap(), "redis still is on alpha");
    }

    #[test]
    fn a_fault_that_comes_too_late_proves_nothing() {
        let mut late = evidence();
        late.faults[0].took.clear();
        late.faults[0].missed.push("redis had moved to beta".to_owned());
        let why = RunReport::of(late).why.unwrap();
        assert_eq!(why, "redis had moved to beta before the fault, which so proved nothing");
    }

    #[test]
    fn replies_that_were_on_their_way_are_no_recovery() {
        let silent = Evidence { clients: vec![client(4_060_000)], ..evidence() };
        let report = RunReport::of(silent);
        assert!(!report.recovered && report.is_clean());
        assert_eq!(report.complaint().unwrap(), "the client client got no answer any more");
    }

    #[test]
    fn a_load_that_ends_in_silence_is_no_recovery() {
        let mut silent = client(4_300_000);
        silent.load_over_us = Some(19_300_000);
        let report = RunReport::of(Evidence { clients: vec![silent], ..evidence() });
        assert_eq!(report.why.unwrap(), "the client client got no answer any more");
    }

    #[test]
    fn a_client_that_was_done_before_the_fault_is_not_asked() {
        let mut early = client(2_000_000);
        early.load_over_us = Some(2_000_100);
        let evidence = Evidence { clients: vec![early, client(8_000_000)], ..evidence() };
        assert!(RunReport::of(evidence).recovered);
    }

    #[test]
    fn without_faults_working_clients_are_enough() {
        let calm = Evidence { faults: vec![], failovers: vec![], ..evidence() };
        assert!(RunReport::of(calm.clone()).is_success());
        let mut idle = client(0);
        idle.last_reply_us = None;
        let report = RunReport::of(Evidence { clients: vec![idle], ..calm });
        assert_eq!(report.why.unwrap(), "the client client never got an answer");
    }

    #[test]
    fn losses_are_counted_over_all_clients() {
        let mut one = client(8_000_000);
        one.report.lost_writes = 2;
        let mut two = one.clone();
        two.report.broken_connections = 1;
        let report = RunReport::of(Evidence { clients: vec![one, two], ..evidence() });
        assert!(report.recovered && !report.is_success());
        let complaint = report.complaint().unwrap();
        assert_eq!(complaint, "4 acknowledged writes lost; 1 broken connections");
    }

    #[test]
    fn a_history_that_cannot_be_explained_is_no_success() {
        let with = |linearizable| {
            let mut one = client(8_000_000);
            one.report.history = Some(histories::tests::history(linearizable));
            RunReport::of(Evidence { clients: vec![one], ..evidence() })
        };
        let report = with(Some(true));
        assert!(report.is_success() && report.linearizable == Some(true));
        let report = with(Some(false));
        assert!(report.recovered && !report.is_success() && report.linearizable == Some(false));
        let complaint = report.complaint().unwrap();
        assert_eq!(complaint, "the history of client-0:shared-1 is not linearizable");
        let report = with(None);
        assert!(!report.is_success() && report.linearizable.is_none());
        assert_eq!(RunReport::of(evidence()).linearizable, None);
    }

    #[test]
    fn a_move_that_cannot_be_made_is_a_failure() {
        let mut report =
            RunReport::of(Evidence { faults: vec![], failovers: vec![], ..evidence() });
        report.add_moves(Vec::new(), None);
        assert!(report.is_success() && report.moves.is_some());
        report.add_moves(Vec::new(), Some("no backup".to_owned()));
        assert_eq!(report.complaint().unwrap(), "after 0 moves: no backup");
        assert!(!report.is_success());
    }

    #[test]
    fn the_json_has_the_documented_keys() {
        let capture_us_by_kind = CaptureKinds { objects: 12, ..CaptureKinds::default() };
        let record = EpochRecord {
            stop_us: 300,
            wire_bytes: 7,
            capture_us_by_kind,
            ..EpochRecord::default()
        };
        let epochs = vec![record; 2];
        let json = serde_json::to_value(RunReport::of(Evidence { epochs, ..evidence() })).unwrap();
        assert_eq!(json["epochs"]["wire_bytes"]["total"], 14);
        assert_eq!(json["epochs"]["wire_bytes"]["p50"], 7);
        assert_eq!(json["epochs"]["stop_us"]["p99"], 300);
        assert_eq!(json["epochs"]["stop_us_by_stage"]["freeze"], 0);
        assert_eq!(json["epochs"]["capture_us_by_kind"]["objects"], 12);
        assert_eq!(json["clients"][0]["name"], "client");
        assert_eq!(json["clients"][0]["latency_us"]["p90"], 0);
        assert_eq!(json["failover"]["phases_ms"]["silence"], 0.0);
        assert_eq!(json["recovered"], true);
        assert!(json.get("records").is_none());
    }
}
