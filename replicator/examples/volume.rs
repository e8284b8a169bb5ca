//! Serves a volume at a path of this host, or measures what a volume costs.
//!
//! `cargo run --release -p replicator --example volume -- serve DIRECTORY AT [local]`: until end of
//! input.
//! `cargo run --release -p replicator --example volume -- bench DIRECTORY [ROUNDS]`: the same work in
//! a directory and in a volume beside it, in turn.
//! `cargo run --release -p replicator --example volume -- stops DIRECTORY [ROUNDS]`: what a stop waits
//! for when so many ranges have changed, with and without a pre-copy before it.

use replicator::volume::{Fsync, ServeOptions, Served, Volumes};
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error>;

const MIB: usize = 1 << 20;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["serve", base, at] => serve(base.as_ref(), at.as_ref(), Fsync::Commit),
        ["serve", base, at, "local"] => serve(base.as_ref(), at.as_ref(), Fsync::Local),
        ["bench", base] => bench(base.as_ref(), 5),
        ["bench", base, rounds] => bench(base.as_ref(), rounds.parse()?),
        ["stops", base] => stops(base.as_ref(), 21),
        ["stops", base, rounds] => stops(base.as_ref(), rounds.parse()?),
        _ => {
            Err("usage: volume serve DIRECTORY AT [local] | volume bench|stops DIRECTORY [ROUNDS]"
                .into())
        }
    }
}

fn served(base: &Path, at: &Path, fsync: Fsync) -> Result<(Volumes, Served), Failure> {
    let volumes = Volumes::open(base, &["data".into()], false)?;
    let options = ServeOptions { read_only: false, fsync };
    let mut served = Served::start("data", volumes.list()[0].clone(), options)?;
    served.attach(std::process::id() as i32, &fs::canonicalize(at)?)?;
    Ok((volumes, served))
}

fn serve(base: &Path, at: &Path, fsync: Fsync) -> Result<(), Failure> {
    let _served = served(base, at, fsync)?;
    println!("serving");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// What is measured: a name, and the work in a directory, whose time counts.
type Work = (&'static str, fn(&Path) -> std::io::Result<Duration>);

const WORK: [Work; 8] = [
    ("sequential write, 64 MiB", |dir| {
        let block = vec![7; MIB];
        let begin = Instant::now();
        let file = File::create(dir.join("large"))?;
        (0..64).try_for_each(|i| file.write_all_at(&block, (i * MIB) as u64))?;
        Ok(begin.elapsed())
    }),
    ("sequential read, 64 MiB", |dir| read(&File::open(dir.join("large"))?)),
    ("open, read 4 KiB, close, 10,000", |dir| {
        let begin = Instant::now();
        (0..10_000)
            .try_for_each(|_| File::open(dir.join("large"))?.read_exact_at(&mut [0; 4096], 8192))?;
        Ok(begin.elapsed())
    }),
    ("4 KiB random write, 10,000", |dir| {
        let file = OpenOptions::new().write(true).open(dir.join("large"))?;
        let mut rng = fastrand::Rng::with_seed(1);
        let begin = Instant::now();
        (0..10_000).try_for_each(|_| file.write_all_at(&[9; 4096], rng.u64(0..16_384) * 4096))?;
        Ok(begin.elapsed())
    }),
    ("append of 100 bytes, 10,000", |dir| {
        let mut file = OpenOptions::new().append(true).create(true).open(dir.join("log"))?;
        let begin = Instant::now();
        (0..10_000).try_for_each(|_| std::io::Write::write_all(&mut file, &[b'x'; 100]))?;
        Ok(begin.elapsed())
    }),
    ("small files made, 2,000", |dir| {
        let begin = Instant::now();
        (0..2000).try_for_each(|i| fs::write(dir.join(format!("f{i}")), [1; 500]))?;
        Ok(begin.elapsed())
    }),
    ("small files removed, 2,000", |dir| {
        let begin = Instant::now();
        (0..2000).try_for_each(|i| fs::remove_file(dir.join(format!("f{i}"))))?;
        Ok(begin.elapsed())
    }),
    ("4 KiB write and fdatasync, 200", |dir| {
        let file = File::create(dir.join("synced"))?;
        let begin = Instant::now();
        (0..200).try_for_each(|i| {
            file.write_all_at(&[3; 4096], i * 4096)?;
            file.sync_data()
        })?;
        Ok(begin.elapsed())
    }),
];

fn read(file: &File) -> std::io::Result<Duration> {
    let mut block = vec![0; MIB];
    let begin = Instant::now();
    (0..64).try_for_each(|i| file.read_exact_at(&mut block, (i * MIB) as u64))?;
    Ok(begin.elapsed())
}

fn bench(base: &Path, rounds: usize) -> Result<(), Failure> {
    let places = ["plain", "commit", "local"].map(|name| base.join(name));
    for place in &places {
        fs::create_dir_all(place)?;
    }
    let serve = |name: &str, at: &PathBuf, fsync| served(&base.join(name), at, fsync);
    let _commit = serve("commit.volumes", &places[1], Fsync::Commit)?;
    let _local = serve("local.volumes", &places[2], Fsync::Local)?;
    let mut times = vec![[const { Vec::new() }; 3]; WORK.len()];
    for round in 0..rounds {
        for ((_, work), times) in WORK.iter().zip(&mut times) {
            for i in 0..3 {
                let i = (i + round) % 3;
                times[i].push(work(&places[i])?);
            }
        }
        for name in ["log", "large", "synced"] {
            places.iter().try_for_each(|place| fs::remove_file(place.join(name)))?;
        }
    }
    println!("milliseconds, median of {rounds}: plain directory, volume, volume with fsync: local");
    for ((name, _), times) in WORK.iter().zip(&mut times) {
        let [plain, commit, local] = times.each_mut().map(|t| {
            t.sort();
            t[t.len() / 2].as_secs_f64() * 1e3
        });
        println!("{name:32} {plain:9.2} {commit:9.2} {local:9.2}  {:6.2}x", commit / plain);
    }
    Ok(())
}

/// Changes so many ranges of 100 bytes in a directory, of one file or of a file for each.
fn change(dir: &Path, ranges: usize, files: usize) -> std::io::Result<()> {
    let opened: Vec<File> = (0..files)
        .map(|i| {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(dir.join(format!("s{i}")))
        })
        .collect::<Result<_, _>>()?;
    (0..ranges)
        .try_for_each(|i| opened[i % files].write_all_at(&[5; 100], (i / files * 8192) as u64))
}

fn stops(base: &Path, rounds: usize) -> Result<(), Failure> {
    let at = base.join("at");
    fs::create_dir_all(&at)?;
    let (volumes, _served) = served(&base.join("volumes"), &at, Fsync::Commit)?;
    let mut out = Vec::new();
    println!("microseconds in the stop, median (largest) of {rounds}");
    println!("ranges, files       without a pre-copy      with one before, and its time");
    for (ranges, files) in
        [(10, 1), (100, 1), (10_000, 1), (10, 10), (100, 100), (1000, 1000), (10_000, 1000)]
    {
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            for precopied in [false, true] {
                change(&at, ranges, files)?;
                let begin = Instant::now();
                if precopied {
                    volumes.precopy()?;
                    times[2].push(begin.elapsed());
                }
                let begin = Instant::now();
                volumes.seal()?;
                times[usize::from(precopied)].push(begin.elapsed());
                volumes.take(&mut out);
            }
        }
        let [without, with, copy] = times.each_mut().map(|t| {
            t.sort();
            let us = |d: Duration| d.as_secs_f64() * 1e6;
            format!("{:9.1} ({:9.1})", us(t[t.len() / 2]), us(t[t.len() - 1]))
        });
        println!("{ranges:6} {files:6}   {without}   {with}   {copy}");
    }
    Ok(())
}
