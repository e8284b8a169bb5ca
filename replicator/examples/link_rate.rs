//! Measures the coding of pages, and checkpoints over loopback from begin to acknowledgement.
//!
//! `cargo run --release -p replicator --example link_rate`

use bytes::Bytes;
use replicator::image::pages::{Content, PAGE, PageSet, Run};
use replicator::image::{Mapping, Process, Source, State};
use replicator::protocol::backup::{self, Backup};
use replicator::transport::backup::{BackupConfig, BackupEndpoint};
use replicator::transport::link::PrimaryConfig;
use replicator::transport::{HostRole, Identity, PrimaryEvent, PrimaryLink, SharedBackup, pki};
use replicator::wire::delta::{Page, PageCoder, decode_onto};
use replicator::wire::message::{Hello, Role};
use replicator::wire::{CheckpointBuilder, Limits};
use replicator::{Epoch, Generation};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc as tokio_mpsc;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    coding();
    link()
}

/// Microseconds a page, for pages that changed in different ways.
fn coding() {
    let mut rng = fastrand::Rng::with_seed(1);
    let before: Vec<Page> = (0..4096)
        .map(|_| {
            let mut page = [0; PAGE];
            rng.fill(&mut page);
            page
        })
        .collect();
    let words = |n: usize, rng: &mut fastrand::Rng, page: &Page| {
        let mut page = *page;
        for _ in 0..n {
            page[rng.usize(..PAGE)] ^= 1;
        }
        page
    };
    type Change<'a> = &'a dyn Fn(&mut fastrand::Rng, &Page) -> Page;
    let text = |rng: &mut fastrand::Rng, _: &Page| {
        let mut page = [0; PAGE];
        page.chunks_mut(16).for_each(|c| c.fill(b'a' + rng.u8(..8)));
        page
    };
    let noise = |rng: &mut fastrand::Rng, _: &Page| {
        let mut page = [0; PAGE];
        rng.fill(&mut page);
        page
    };
    let kinds: [(&str, Change<'_>); 7] = [
        ("unchanged", &|_, p| *p),
        ("1 word", &|r, p| words(1, r, p)),
        ("10 words", &|r, p| words(10, r, p)),
        ("100 words", &|r, p| words(100, r, p)),
        ("zero", &|_, _| [0; PAGE]),
        ("compressible", &text),
        ("noise", &noise),
    ];
    println!("page coding      encode us  decode us  bytes");
    for (name, change) in kinds {
        let after: Vec<Page> = before.iter().map(|p| change(&mut rng, p)).collect();
        let mut coder = PageCoder::default();
        let mut out = Vec::with_capacity(before.len() * PAGE);
        let mut coded = Vec::with_capacity(before.len());
        let start = Instant::now();
        for (b, a) in before.iter().zip(&after) {
            let at = out.len();
            coded.push((coder.encode(Some(b), a, &mut out), at));
        }
        let encode = start.elapsed();
        let mut back = before.clone();
        let ends = coded.iter().skip(1).map(|c| c.1).chain([out.len()]);
        let start = Instant::now();
        for ((page, (coding, at)), end) in back.iter_mut().zip(&coded).zip(ends) {
            decode_onto(page, true, *coding, &out[*at..end]).expect("what was just encoded");
        }
        let decode = start.elapsed();
        assert!(back == after);
        let each = |d: Duration| d.as_secs_f64() * 1e6 / before.len() as f64;
        println!(
            "{name:16} {:9.2} {:10.2} {:6}",
            each(encode),
            each(decode),
            out.len() / before.len()
        );
    }
}

fn link() -> Result<(), Failure> {
    let dir = std::env::temp_dir().join(format!("nilicon-link-rate-{}", std::process::id()));
    pki::init(&dir)?;
    pki::issue(&dir, "alpha", HostRole::Host)?;
    pki::issue(&dir, "beta", HostRole::Host)?;
    let identities = Identity::load(&dir, "alpha", HostRole::Host)
        .and_then(|a| Ok((a, Identity::load(&dir, "beta", HostRole::Host)?)));
    std::fs::remove_dir_all(&dir)?;
    let (alpha, beta) = identities?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (acks_in, acks) = mpsc::channel();
    let (link, endpoint, mut checkpoints) = runtime.block_on(async {
        let core = Backup::new(backup::Config::default(), Generation(0), Duration::ZERO);
        let shared = SharedBackup::new(core, Instant::now(), "web", "beta", 4, |_| {});
        let endpoint = BackupEndpoint::bind(BackupConfig {
            bind: "127.0.0.1:0".parse()?,
            peer_host: "alpha".into(),
            identity: beta,
            limits: Limits::default(),
        })?;
        let (sender, checkpoints) = tokio_mpsc::channel(4);
        tokio::spawn(endpoint.clone().serve(Arc::new(shared), sender));
        let config = PrimaryConfig {
            bind: "127.0.0.1:0".parse()?,
            peer: endpoint.local_addr()?,
            peer_host: "beta".into(),
            identity: alpha,
            generation: Generation(1),
            hello: Hello {
                container: "web".into(),
                host: "alpha".into(),
                role: Role::Primary,
                network: Vec::new(),
                clocks: Default::default(),
                pulse_port: 0,
            },
        };
        let events = move |e| {
            if let PrimaryEvent::Ack { epoch, .. } = e {
                let _ = acks_in.send(epoch);
            }
        };
        let (link, _) = PrimaryLink::connect(config, events).await?;
        Ok::<_, Failure>((link, endpoint, checkpoints))
    })?;
    std::thread::spawn(move || while checkpoints.blocking_recv().is_some() {});

    println!("checkpoint of noise    p50 ms  p99 ms  MTU");
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut epoch = Epoch::NONE;
    let mut rng = fastrand::Rng::with_seed(1);
    for (size, rounds) in [(64 << 10, 500), (512 << 10, 200), (4 << 20, 60)] {
        let pages = size / PAGE;
        let mapping = Mapping {
            start: 0x10000,
            end: 0x10000 + size as u64,
            prot: 3,
            grows_down: false,
            source: Source::Anonymous,
            fresh: false,
        };
        let process = Process { pid: 1, mappings: vec![mapping].into(), ..Process::default() };
        let state = State { processes: vec![process], ..State::default() };
        let run =
            Run { process: 0, start: 0x10000, count: pages as u32, content: Content::Data(0) };
        let mut set = PageSet { runs: vec![run], bytes: vec![0; size] };
        let mut times = Vec::new();
        for _ in 0..rounds {
            rng.fill(&mut set.bytes);
            let send = |frame: Bytes| link.send(frame).expect("the link holds");
            let start = Instant::now();
            epoch = epoch.next();
            send(builder.begin(Generation(1), epoch, epoch == Epoch(1)));
            builder.pages(&set, &[1], send)?;
            let finished = builder.finish(&state, send)?;
            send(finished.end);
            while acks.recv_timeout(Duration::from_secs(30))? != epoch {}
            times.push(start.elapsed());
        }
        times.sort_unstable();
        let ms = |i: usize| times[i].as_secs_f64() * 1e3;
        println!(
            "{:8} KiB {:16.3} {:7.3} {:5}",
            size >> 10,
            ms(rounds / 2),
            ms(rounds * 99 / 100),
            link.stats().path.current_mtu
        );
    }
    endpoint.shut_down("done");
    Ok(())
}
