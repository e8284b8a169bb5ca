//! Both ends over loopback: who is turned away, and what arrives.

use super::admission::{Admission, Event, Notice, SharedBackup};
use super::backup::{BackupConfig, BackupEndpoint};
use super::link::{Logged, PrimaryConfig};
use super::pki::{init, issue};
use super::pulse::Listener;
use super::*;
use crate::ack::AckLedger;
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::image::{Mapping, Process, Source, State};
use crate::protocol::LinkId;
use crate::protocol::backup::{self, Backup};
use crate::protocol::detector::Pace;
use crate::volume::Journals;
use crate::wire::message::{Bye, Hello, RefuseCode, Role};
use crate::wire::{Checkpoint, CheckpointBuilder, Limits};
use crate::{Epoch, Generation};
use bytes::Bytes;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc as std_mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// A directory that is removed with the value.
pub(super) struct TempDir(std::path::PathBuf);

impl TempDir {
    pub(super) fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nilicon-{name}-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory for the test");
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn authority() -> TempDir {
    let dir = TempDir::new("link");
    init(dir.path()).unwrap();
    issue(dir.path(), "alpha", HostRole::Host).unwrap();
    issue(dir.path(), "beta", HostRole::Host).unwrap();
    issue(dir.path(), "alpha", HostRole::Witness).unwrap();
    issue(dir.path(), "beta", HostRole::Witness).unwrap();
    dir
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A backup 'beta' of 'web' that expects the primary 'alpha'.
struct Beta {
    endpoint: Arc<BackupEndpoint>,
    shared: Arc<SharedBackup>,
    checkpoints: mpsc::Receiver<Arc<Checkpoint>>,
    notices: std_mpsc::Receiver<Notice>,
}

impl Beta {
    fn start(identity: Identity, newest: Generation) -> Self {
        Self::with_journals(identity, newest, None)
    }

    fn with_journals(
        identity: Identity,
        newest: Generation,
        journals: Option<Arc<Journals>>,
    ) -> Self {
        let origin = Instant::now();
        let (notices_in, notices) = std_mpsc::channel();
        // Nothing here is about time: nobody gives the core a tick.
        let core = Backup::new(backup::Config::default(), newest, Duration::ZERO);
        let notify = move |n| notices_in.send(n).unwrap_or_default();
        let shared = SharedBackup::new(core, origin, "web", "beta", 4, notify);
        let shared = Arc::new(shared.with_journals(journals));
        let bind = "127.0.0.1:0".parse().unwrap();
        let limits = Limits::default();
        let peer_host = "alpha".into();
        let endpoint =
            BackupEndpoint::bind(BackupConfig { bind, peer_host, identity, limits }).unwrap();
        let (sender, checkpoints) = mpsc::channel(4);
        tokio::spawn(endpoint.clone().serve(shared.clone() as Arc<dyn Admission>, sender));
        Self { endpoint, shared, checkpoints, notices }
    }

    fn turned_away(&self) -> String {
        loop {
            match self.notices.recv_timeout(Duration::from_secs(60)).expect("a notice") {
                Notice::TurnedAway(_, e) => return e.to_string(),
                _ => continue,
            }
        }
    }

    fn event(&self, wanted: impl Fn(&Event) -> bool) -> Event {
        loop {
            match self.notices.recv_timeout(Duration::from_secs(60)).expect("a notice") {
                Notice::Event(_, e) if wanted(&e) => return e,
                _ => continue,
            }
        }
    }
}

fn alpha(beta: &Beta, identity: Identity, generation: u64) -> PrimaryConfig {
    PrimaryConfig {
        bind: "127.0.0.1:0".parse().unwrap(),
        peer: beta.endpoint.local_addr().unwrap(),
        peer_host: "beta".into(),
        identity,
        generation: Generation(generation),
        hello: Hello {
            container: "web".into(),
            host: "alpha".into(),
            role: Role::Primary,
            network: vec![1, 2],
            clocks: Default::default(),
            pulse_port: 0,
        },
    }
}

async fn connect(
    config: PrimaryConfig,
) -> Result<(PrimaryLink, std_mpsc::Receiver<PrimaryEvent>), LinkError> {
    let (send, receive) = std_mpsc::channel();
    let (link, welcome) =
        PrimaryLink::connect(config, move |e| send.send(e).unwrap_or_default()).await?;
    assert_eq!((welcome.host.as_str(), welcome.depth), ("beta", 4));
    Ok((link, receive))
}

/// What both sides say when 'alpha' shows the first identity and 'beta' the second.
fn refusal(alpha_is: Identity, beta_is: Identity) -> (String, String) {
    runtime().block_on(async {
        let beta = Beta::start(beta_is, Generation(0));
        let e = connect(alpha(&beta, alpha_is, 1)).await.err().expect("it must be refused");
        (e.to_string(), beta.turned_away())
    })
}

#[test]
fn a_foreign_authority_is_refused_by_both_sides() {
    let (ours, theirs) = (authority(), authority());
    let alpha = Identity::load(ours.path(), "alpha", HostRole::Host).unwrap();
    let beta = Identity::load(theirs.path(), "beta", HostRole::Host).unwrap();
    let (at_alpha, at_beta) = refusal(alpha.clone(), beta);
    assert!(at_alpha.contains("this side does not trust"), "{at_alpha}");
    assert!(at_beta.contains("the peer does not trust"), "{at_beta}");

    // The primary trusts the backup's authority, but has its own certificate from another.
    let stolen = theirs.path().join("ca.pem");
    let files = |h: &str| {
        (ours.path().join(format!("{h}.host.pem")), ours.path().join(format!("{h}.host-key.pem")))
    };
    let (certificate, key) = files("alpha");
    let alpha = Identity::load_files(&stolen, &certificate, &key).unwrap();
    let beta = Identity::load(theirs.path(), "beta", HostRole::Host).unwrap();
    let (at_alpha, at_beta) = refusal(alpha, beta);
    assert!(at_alpha.contains("the peer does not trust"), "{at_alpha}");
    assert!(at_beta.contains("this side does not trust"), "{at_beta}");
}

#[test]
fn a_wrong_name_or_role_is_refused_and_named() {
    let dir = authority();
    let load = |host, role| Identity::load(dir.path(), host, role).unwrap();
    let (alpha, beta) = (load("alpha", HostRole::Host), load("beta", HostRole::Host));

    // The backup is another host, or a witness.
    let (at_alpha, at_beta) = refusal(alpha.clone(), alpha.clone());
    assert!(at_alpha.contains("beta.host.nilicon"), "{at_alpha}");
    assert!(at_beta.contains("the peer ended the TLS handshake"), "{at_beta}");
    let (at_alpha, _) = refusal(alpha, load("beta", HostRole::Witness));
    assert!(at_alpha.contains("beta.witness.nilicon"), "{at_alpha}");

    // The primary is another host, or a witness.
    for (who, name) in [
        (beta.clone(), "beta.host.nilicon"),
        (load("alpha", HostRole::Witness), "alpha.witness.nilicon"),
    ] {
        let (at_alpha, at_beta) = refusal(who, beta.clone());
        assert!(
            at_beta.contains("not 'alpha.host.nilicon'") && at_beta.contains(name),
            "{at_beta}"
        );
        assert!(at_alpha.contains("closed it") && at_alpha.contains(name), "{at_alpha}");
    }
}

#[test]
fn stale_generations_and_other_containers_are_refused_with_their_reason() {
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    runtime().block_on(async {
        let beta = Beta::start(load("beta"), Generation(5));
        match connect(alpha(&beta, load("alpha"), 4)).await.err() {
            Some(LinkError::Refused { code, newest, text }) => {
                assert_eq!((code, newest), (RefuseCode::StaleGeneration, Generation(5)));
                assert!(text.contains("generation 5"), "{text}");
            }
            other => panic!("{other:?}"),
        }
        let mut other = alpha(&beta, load("alpha"), 5);
        other.hello.container = "mail".into();
        match connect(other).await.err() {
            Some(LinkError::Refused { code: RefuseCode::WrongContainer, newest, .. }) => {
                assert_eq!(newest, Generation(5), "no reason to step down");
            }
            other => panic!("{other:?}"),
        }
        connect(alpha(&beta, load("alpha"), 5)).await.unwrap();
    });
}

#[test]
fn datagrams_are_as_large_as_the_route_allows() {
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    runtime().block_on(async {
        let beta = Beta::start(load("beta"), Generation(0));
        let (link, _events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
        assert_eq!(link.stats().path.current_mtu, quic::LARGEST);
    });
}

#[test]
fn nobody_there_is_an_error_in_time() {
    let dir = authority();
    let identity = Identity::load(dir.path(), "alpha", HostRole::Host).unwrap();
    runtime().block_on(async {
        let beta =
            Beta::start(Identity::load(dir.path(), "beta", HostRole::Host).unwrap(), Generation(0));
        let config = alpha(&beta, identity, 1);
        beta.endpoint.shut_down("test");
        drop(beta);
        let e = connect(config).await.err().expect("nobody is there");
        assert!(matches!(e, LinkError::Connection { .. }), "{e}");
    });
}

/// Only a backup that has the goodbye will not take over: one that is gone has confirmed nothing.
#[test]
fn a_goodbye_that_nobody_confirms_is_an_error() {
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    runtime().block_on(async {
        let beta = Beta::start(load("beta"), Generation(0));
        let (link, _events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
        beta.endpoint.shut_down("test");
        drop(beta);
        let e = link.bye(Bye::Stop, Epoch(0)).await.expect_err("nobody has heard it");
        assert!(matches!(e, LinkError::Connection { .. }), "{e}");
    });
}

/// A container of one process with one mapping.
fn state(pages: u64, epoch: u64) -> State {
    let mapping = Mapping {
        start: 0x10000,
        end: 0x10000 + pages * PAGE as u64,
        prot: 3,
        grows_down: false,
        source: Source::Anonymous,
        fresh: false,
    };
    let process = Process {
        pid: 1,
        mappings: Arc::new(vec![mapping]),
        umask: epoch as u32,
        ..Process::default()
    };
    State { processes: vec![process], ..State::default() }
}

/// Pages of noise from the first on; in all epochs but the first, with few changes.
fn pages(rng: &mut fastrand::Rng, memory: &mut [u8], count: usize) -> PageSet {
    let all = memory.len() / PAGE;
    let first = rng.usize(..=all - count);
    let part = &mut memory[first * PAGE..][..count * PAGE];
    for page in part.chunks_exact_mut(PAGE) {
        match rng.u8(..4) {
            0 => rng.fill(page),
            1 => page.fill(0),
            _ => page[rng.usize(..PAGE)] = rng.u8(..),
        }
    }
    let start = 0x10000 + (first * PAGE) as u64;
    let content = Content::Data(0);
    let run = Run { process: 0, start, count: count as u32, content };
    PageSet { runs: vec![run], bytes: part.to_vec() }
}

fn wait_ack(events: &std_mpsc::Receiver<PrimaryEvent>) -> (Generation, Epoch, u64) {
    loop {
        match events.recv_timeout(Duration::from_secs(60)).expect("an acknowledgement") {
            PrimaryEvent::Ack { generation, epoch, digest } => return (generation, epoch, digest),
            PrimaryEvent::Lost(why) => panic!("lost: {why}"),
            _ => {}
        }
    }
}

/// Sends one checkpoint from a thread that may block.
fn send(
    link: &PrimaryLink,
    builder: &mut CheckpointBuilder,
    ledger: &mut AckLedger,
    epoch: Epoch,
    set: &PageSet,
    state: &State,
) {
    let push = |b: Bytes| link.send(b).unwrap();
    push(builder.begin(Generation(1), epoch, epoch == Epoch(1)));
    builder.pages(set, &[1], push).unwrap();
    let finished = builder.finish(state, push).unwrap();
    ledger.sent(epoch, finished.digest);
    push(finished.end);
}

#[test]
fn a_thousand_checkpoints_arrive_equal_and_are_acknowledged_in_order() {
    const COUNT: u64 = 1000;
    const ALL: usize = 256;
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    let runtime = runtime();
    let (beta, link, events) = runtime.block_on(async {
        let beta = Beta::start(load("beta"), Generation(0));
        let (link, events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
        (beta, link, events)
    });
    let Beta { mut checkpoints, shared, .. } = beta;
    let (sent_in, sent) = std_mpsc::channel::<(State, PageSet)>();
    let applier = std::thread::spawn(move || {
        let mut spare = vec![1; ALL * PAGE];
        for epoch in 1..=COUNT {
            let got = checkpoints.blocking_recv().expect("a checkpoint");
            let (state, set) = sent.recv().unwrap();
            assert_eq!((got.epoch, got.full), (Epoch(epoch), epoch == 1));
            assert_eq!(*got.state, state);
            for edit in &got.edits.list {
                let at = (edit.start - 0x10000) as usize;
                spare[at..at + edit.len].copy_from_slice(got.edits.of(edit));
            }
            for run in &got.pages.runs {
                let Content::Data(from) = run.content else { panic!("nothing was dropped") };
                let (at, len) = ((run.start - 0x10000) as usize, run.count as usize * PAGE);
                spare[at..at + len].copy_from_slice(&got.pages.bytes[from..from + len]);
            }
            let at = (set.runs[0].start - 0x10000) as usize;
            assert!(spare[at..at + set.bytes.len()] == set.bytes, "epoch {epoch}");
        }
    });
    let mut rng = fastrand::Rng::with_seed(1);
    let mut memory = vec![1; ALL * PAGE];
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut ledger = AckLedger::new(Generation(1));
    let mut acked = Epoch::NONE;
    let mut check = |ledger: &mut AckLedger| {
        let (generation, epoch, digest) = wait_ack(&events);
        assert_eq!(epoch, acked.next(), "in order");
        acked = ledger.acknowledge(generation, epoch, digest).unwrap().epoch();
    };
    for epoch in 1..=COUNT {
        let count = if epoch == 1 { ALL } else { rng.usize(1..60) };
        let set = pages(&mut rng, &mut memory, count);
        let state = state(ALL as u64, epoch);
        sent_in.send((state.clone(), set.clone())).unwrap();
        send(&link, &mut builder, &mut ledger, Epoch(epoch), &set, &state);
        if ledger.in_flight() >= 4 {
            check(&mut ledger);
        }
    }
    while ledger.in_flight() > 0 {
        check(&mut ledger);
    }
    applier.join().unwrap();
    assert_eq!(shared.state(), backup::State::Ready { last: Epoch(COUNT) });
}

#[test]
fn acknowledgements_wait_when_the_applier_is_behind() {
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    let runtime = runtime();
    let (mut beta, link, events) = runtime.block_on(async {
        let beta = Beta::start(load("beta"), Generation(0));
        let (link, events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
        (beta, link, events)
    });
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut ledger = AckLedger::new(Generation(1));
    for epoch in 1..=6 {
        let set = PageSet::default();
        send(&link, &mut builder, &mut ledger, Epoch(epoch), &set, &state(1, epoch));
    }
    for epoch in 1..=4 {
        assert_eq!(wait_ack(&events).1, Epoch(epoch));
    }
    // The fifth is complete but finds no room; a heartbeat overtakes its acknowledgement.
    beta.endpoint.heartbeat(Generation(1), Epoch(4), 1);
    let next = events.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(matches!(next, PrimaryEvent::Heartbeat { epoch: Epoch(4), .. }), "{next:?}");
    for epoch in 1..=6 {
        assert_eq!(beta.checkpoints.blocking_recv().unwrap().epoch, Epoch(epoch));
    }
    assert_eq!((wait_ack(&events).1, wait_ack(&events).1), (Epoch(5), Epoch(6)));
}

/// Sends a checkpoint that says something of volumes; gives its digest.
fn send_files(link: &PrimaryLink, builder: &mut CheckpointBuilder, epoch: u64) -> u64 {
    let push = |b: Bytes| link.send(b).unwrap();
    push(builder.begin(Generation(1), Epoch(epoch), epoch == 1));
    builder.files(&epoch.to_le_bytes(), push).unwrap();
    let finished = builder.finish(&state(1, epoch), push).unwrap();
    push(finished.end);
    finished.digest
}

/// Names of the files in a directory that end with this.
fn ending(dir: &Path, end: &str) -> usize {
    let entries = std::fs::read_dir(dir).expect("it is there");
    entries.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().ends_with(end)).count()
}

/// VO-4
#[test]
fn files_are_kept_before_they_are_acknowledged() {
    let dir = authority();
    let kept = TempDir::new("kept");
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    let runtime = runtime();
    let journals = Arc::new(Journals::new(kept.path(), &[], false));
    let (mut beta, link, events) = runtime.block_on(async {
        let beta = Beta::with_journals(load("beta"), Generation(0), Some(journals.clone()));
        let (link, events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
        (beta, link, events)
    });
    let mut builder = CheckpointBuilder::new(Limits::default());
    for epoch in 1..=3 {
        let digest = send_files(&link, &mut builder, epoch);
        assert_eq!(wait_ack(&events), (Generation(1), Epoch(epoch), digest));
        assert_eq!(ending(kept.path(), &format!("-{epoch:016x}")), 1, "epoch {epoch}");
    }
    for epoch in 1..=3u64 {
        let got = beta.checkpoints.blocking_recv().unwrap();
        assert_eq!((got.epoch, &got.files[..]), (Epoch(epoch), &epoch.to_le_bytes()[..]));
    }
    // One that comes after the promotion is neither acknowledged nor kept.
    beta.shared.handle(backup::Input::Promote);
    let verdict = crate::protocol::arbiter::Verdict::Granted;
    beta.shared.handle(backup::Input::Verdict { generation: Generation(2), verdict });
    send_files(&link, &mut builder, 4);
    // Whoever has read what comes behind it is done with it.
    let _ = runtime.block_on(link.say_bye(Bye::Stop, Epoch(4)));
    beta.event(|e| matches!(e, Event::Bye { .. }));
    assert_eq!(ending(kept.path(), &format!("-{:016x}", 4)), 0);
    assert!(beta.checkpoints.try_recv().is_err());
}

/// VO-4
#[test]
fn what_cannot_be_kept_is_not_acknowledged() {
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    let runtime = runtime();
    // Nothing can be made in a file.
    let journals = Journals::new(&dir.path().join("ca.pem").join("files"), &[], false);
    for journals in [None, Some(Arc::new(journals))] {
        let (mut beta, link, events) = runtime.block_on(async {
            let beta = Beta::with_journals(load("beta"), Generation(0), journals);
            let (link, events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
            (beta, link, events)
        });
        let mut builder = CheckpointBuilder::new(Limits::default());
        send(
            &link,
            &mut builder,
            &mut AckLedger::new(Generation(1)),
            Epoch(1),
            &PageSet::default(),
            &state(1, 1),
        );
        assert_eq!(wait_ack(&events).1, Epoch(1));
        send_files(&link, &mut builder, 2);
        let rest: Vec<PrimaryEvent> = events.iter().collect();
        let [PrimaryEvent::Lost(why)] = &rest[..] else { panic!("{rest:?}") };
        assert!(why.contains("cannot keep the files of epoch 2"), "{why}");
        let lost = beta.event(|e| matches!(e, Event::Lost(_)));
        assert!(matches!(lost, Event::Lost(LinkError::Files { epoch: Epoch(2), .. })), "{lost:?}");
        assert_eq!(beta.shared.state(), backup::State::Waiting, "nobody promotes from its copy");
        assert_eq!(beta.checkpoints.blocking_recv().unwrap().epoch, Epoch(1));
        assert!(beta.checkpoints.try_recv().is_err());
    }
}

#[test]
fn inputs_heartbeats_and_goodbye_arrive() {
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    let runtime = runtime();
    let (mut beta, link, events) = runtime.block_on(async {
        let beta = Beta::start(load("beta"), Generation(0));
        let (link, events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
        (beta, link, events)
    });
    for i in 0..100u8 {
        let record = Bytes::from(vec![i; 100]);
        assert_eq!(link.input(Epoch(i.into()), record), Logged::Queued);
    }
    assert_eq!(link.input(Epoch(1), vec![0; 1 << 20].into()), Logged::Dropped, "too long");
    for i in 0..100u8 {
        match beta.event(|e| matches!(e, Event::Input { .. })) {
            Event::Input { epoch, bytes, .. } => {
                assert_eq!((epoch, &bytes[..]), (Epoch(i.into()), &[i; 100][..]));
            }
            other => panic!("{other:?}"),
        }
    }
    link.heartbeat(Epoch(7), 42);
    match beta.event(|e| matches!(e, Event::Heard(Some(_)))) {
        Event::Heard(Some((_, epoch, beat))) => {
            assert_eq!((epoch, beat.progress, beat.role), (Epoch(7), 42, Role::Primary));
        }
        other => panic!("{other:?}"),
    }

    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut ledger = AckLedger::new(Generation(1));
    send(&link, &mut builder, &mut ledger, Epoch(1), &PageSet::default(), &state(1, 1));
    assert_eq!(wait_ack(&events).1, Epoch(1));
    runtime.block_on(link.bye(Bye::Switchover, Epoch(1))).unwrap();
    beta.event(|e| matches!(e, Event::Bye { bye: Bye::Switchover, last: Epoch(1) }));
    assert_eq!(beta.checkpoints.blocking_recv().unwrap().epoch, Epoch(1));
    let asked = backup::State::Asking { generation: Generation(2), last: Epoch(1) };
    assert_eq!(beta.shared.state(), asked);
    beta.event(|e| matches!(e, Event::Lost(_)));
    let lost = events.iter().any(|e| matches!(e, PrimaryEvent::Lost(_)));
    assert!(lost);
}

#[test]
fn after_a_promotion_nothing_is_acknowledged() {
    let dir = authority();
    let load = |host| Identity::load(dir.path(), host, HostRole::Host).unwrap();
    let runtime = runtime();
    let (mut beta, link, events) = runtime.block_on(async {
        let beta = Beta::start(load("beta"), Generation(0));
        let (link, events) = connect(alpha(&beta, load("alpha"), 1)).await.unwrap();
        (beta, link, events)
    });
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut ledger = AckLedger::new(Generation(1));
    send(&link, &mut builder, &mut ledger, Epoch(1), &PageSet::default(), &state(1, 1));
    assert_eq!(wait_ack(&events).1, Epoch(1));
    beta.shared.handle(backup::Input::Promote);
    let verdict = crate::protocol::arbiter::Verdict::Granted;
    beta.shared.handle(backup::Input::Verdict { generation: Generation(2), verdict });
    send(&link, &mut builder, &mut ledger, Epoch(2), &PageSet::default(), &state(1, 2));
    let closed = beta.notices.iter().find_map(|n| match n {
        Notice::Action(backup::Action::Close(link)) => Some(link),
        _ => None,
    });
    assert_eq!(closed, Some(LinkId(1)));
    beta.endpoint.close(LinkId(1), "promoted");
    let rest: Vec<PrimaryEvent> = events.iter().collect();
    assert!(matches!(&rest[..], [PrimaryEvent::Lost(why)] if why.contains("promoted")), "{rest:?}");
    assert_eq!(beta.checkpoints.blocking_recv().unwrap().epoch, Epoch(1));
    assert!(beta.checkpoints.try_recv().is_err());
    let again = runtime.block_on(connect(alpha(&beta, load("alpha"), 1)));
    assert!(matches!(
        again.err(),
        Some(LinkError::Refused { code: RefuseCode::Promoted, newest: Generation(2), .. })
    ));
}

#[test]
fn who_runs_the_container_beats_seldom_for_the_host_that_was_given_up() {
    let core = Backup::new(backup::Config::default(), Generation(0), Duration::ZERO);
    let shared = SharedBackup::new(core, Instant::now(), "web", "beta", 4, |_| {});
    assert_eq!(Listener::pace(&shared), Pace::Usual);
    assert!(shared.begin(Generation(1)));
    assert_eq!(Listener::pace(&shared), Pace::Rests);
}
