//! Volumes under random operations: what arrives at the other side is what was there at the seal,
//! whatever was written while it was read, and wherever the process was killed.

use super::disk::LEFT;
use super::{
    Change, Ino, Journals, Node, Opened, Shape, Volume, VolumeError, Volumes, difference, digest,
};
use crate::{Epoch, Generation};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that goes away with its owner.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("nilicon-volume-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a directory for the test");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Contents = BTreeMap<(usize, Ino), (Node, Vec<(Ino, OsString)>, u64)>;

/// All that a checkpoint promises of the files, read from the disk; a digest of their bytes.
fn contents(volumes: &Volumes) -> Contents {
    let mut all = Contents::new();
    for (index, volume) in volumes.list().iter().enumerate() {
        let mut todo: Vec<Ino> = volume.loose();
        todo.push(Ino::ROOT);
        while let Some(ino) = todo.pop() {
            let mut node = volume.node(ino).expect("it is known");
            // Reading changes it.
            node.attributes.atime = (0, 0);
            let mut bytes = Vec::new();
            if node.shape == Shape::File {
                bytes = vec![0; node.attributes.size as usize];
                let got = volume.open_file(ino).and_then(|o| o.read(0, &mut bytes));
                assert_eq!(got.expect("it can be read"), bytes.len());
            }
            if node.shape == Shape::Directory {
                todo.extend(volume.entries(ino).expect("entries").iter().map(|(_, f)| f.ino));
            }
            let mut links = volume.names(ino);
            links.sort();
            all.insert((index, ino), (node, links, xxhash_rust::xxh3::xxh3_64(&bytes)));
        }
    }
    all
}

fn open(base: &Path) -> Result<Volumes, VolumeError> {
    Volumes::open(base, &["data".into(), "log".into()], false)
}

/// A program that does what comes to its mind.
struct Busy {
    rng: fastrand::Rng,
    open: Vec<(usize, Opened)>,
}

impl Busy {
    fn name(&mut self) -> OsString {
        format!("n{}", self.rng.u8(0..5)).into()
    }

    fn directory(&mut self, volumes: &Volumes, at: usize) -> Ino {
        let volume = &volumes.list()[at];
        let mut here = Ino::ROOT;
        for _ in 0..self.rng.u8(0..3) {
            let name = self.name();
            match volume.lookup(here, &name, false) {
                Ok(found) if found.meta.is_dir() => here = found.ino,
                _ => break,
            }
        }
        here
    }

    /// One operation. Whether it succeeds is its own affair; what it did is to arrive.
    fn act(&mut self, volumes: &Volumes) -> std::io::Result<()> {
        let at = self.rng.usize(0..2);
        let volume = &volumes.list()[at];
        let (parent, name) = (self.directory(volumes, at), self.name());
        let (other, new) = (self.directory(volumes, at), self.name());
        let size = self.rng.u64(0..40_000);
        match self.rng.u8(0..20) {
            0..3 => {
                let found = volume.make(parent, &name, &Shape::File, 0o640, (1, 2), true)?;
                self.open.push((at, volume.open_file(found.ino)?));
            }
            3 | 4 => {
                volume.make(parent, &name, &Shape::Directory, 0o755, (0, 0), false)?;
            }
            5 => {
                let shape = match self.rng.u8(0..4) {
                    0 => Shape::Fifo,
                    1 => Shape::Socket,
                    2 => Shape::Character(0x103),
                    _ => Shape::Symlink("some/where".into()),
                };
                volume.make(parent, &name, &shape, 0o644, (3, 4), false)?;
            }
            6 => {
                let ino = volume.lookup(parent, &name, false)?.ino;
                volume.link(ino, other, &new, false)?;
            }
            7 | 8 => {
                let directory = self.rng.bool();
                volume.unlink(parent, &name, directory)?;
            }
            9 | 10 => {
                // Also those that leave a whiteout behind.
                let flags = [0, 1, 2, 4, 5][self.rng.usize(0..5)];
                volume.rename(parent, &name, other, &new, flags)?;
            }
            11 => {
                let ino = volume.lookup(parent, &name, false)?.ino;
                let change = Change { size: Some(size), ..Change::default() };
                volume.change(ino, &change)?;
            }
            12 => {
                let ino = volume.lookup(parent, &name, false)?.ino;
                let change = Change {
                    mode: Some(self.rng.u32(0..0o7777)),
                    uid: Some(self.rng.u32(0..9)),
                    mtime: Some((self.rng.i64(0..1 << 31), 7)),
                    ..Change::default()
                };
                volume.change(ino, &change)?;
            }
            13 => {
                let ino = volume.lookup(parent, &name, false)?.ino;
                let key = OsStr::new(if self.rng.bool() { "trusted.a" } else { "trusted.b" });
                match self.rng.bool() {
                    true => volume.set_xattr(ino, key, &size.to_le_bytes(), 0)?,
                    false => volume.remove_xattr(ino, key)?,
                }
            }
            14 if !self.open.is_empty() => {
                let (at, opened) = self.open.swap_remove(self.rng.usize(0..self.open.len()));
                volumes.list()[at].forget(opened.ino, 1)?;
            }
            15 if !self.open.is_empty() => {
                let (at, opened) = &self.open[self.rng.usize(0..self.open.len())];
                let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let mode = if self.rng.bool() { punch } else { 0 };
                volumes.list()[*at].allocate(opened, size, 1 + size / 2, mode)?;
            }
            _ if !self.open.is_empty() => {
                let (at, opened) = &self.open[self.rng.usize(0..self.open.len())];
                let bytes = vec![self.rng.u8(1..); self.rng.usize(1..5_000)];
                volumes.list()[*at].write(opened, size, &bytes)?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn needs_root() -> bool {
    let may = nix::unistd::geteuid().is_root();
    if !may {
        eprintln!("not run: numbers of files are in attributes that only root may set");
    }
    !may
}

#[test]
fn a_rename_can_leave_a_whiteout_behind() {
    if needs_root() {
        return;
    }
    let there = Scratch::new();
    let volumes = open(&there.0).expect("nothing is amiss");
    let volume = &volumes.list()[0];
    let make = |name: &str, shape: &Shape| {
        volume.make(Ino::ROOT, OsStr::new(name), shape, 0o755, (0, 0), false).expect("made").ino
    };
    let (file, directory, over) =
        (make("file", &Shape::File), make("d", &Shape::Directory), make("over", &Shape::File));
    let rename = |from: &str, to: &str, flags| {
        volume.rename(Ino::ROOT, OsStr::new(from), Ino::ROOT, OsStr::new(to), flags)
    };
    let at = |name: &str| volume.lookup(Ino::ROOT, OsStr::new(name), false).expect("there");
    let is_whiteout =
        |name: &str| volume.node(at(name).ino).expect("known").shape == Shape::Character(0);
    let (whiteout, no_replace) = (libc::RENAME_WHITEOUT, libc::RENAME_NOREPLACE);
    let refused = |result: std::io::Result<()>| result.expect_err("refused").raw_os_error();
    assert_eq!(refused(rename("file", "over", whiteout | no_replace)), Some(libc::EEXIST));
    assert_eq!(
        refused(rename("file", "over", whiteout | libc::RENAME_EXCHANGE)),
        Some(libc::EINVAL)
    );
    assert_eq!((at("file").ino, at("over").ino), (file, over), "nothing has changed");
    rename("file", "over", whiteout).expect("one that was there");
    assert!(is_whiteout("file") && at("over").ino == file);
    assert!(volume.by_number(over, false).is_err(), "it has lost its only name");
    rename("d", "e", whiteout | no_replace).expect("a directory");
    assert!(is_whiteout("d") && at("e").ino == directory);
    rename("over", "file", 0).expect("over a whiteout");
    assert_eq!(at("file").ino, file);
    // They are at the backup as any other file is.
    let elsewhere = Scratch::new();
    let copies = open(&elsewhere.0).expect("nothing is amiss");
    volumes.begin_full();
    volumes.seal().expect("it can be read");
    let mut payload = Vec::new();
    volumes.take(&mut payload);
    copies.commit(Generation::FIRST, Epoch(1), &payload).expect("committed");
    assert_eq!(contents(&copies), contents(&volumes));
}

/// The whole journal in a directory.
fn journal_in(base: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(base).expect("it is there");
    let mut paths = entries.map(|e| e.expect("an entry").path());
    paths.find(|p| p.to_string_lossy().contains("/journal-"))
}

/// Commits with a kill somewhere, reads the journal with more of them, until it is through.
fn commit_killed(
    rng: &mut fastrand::Rng,
    base: &Path,
    epoch: Epoch,
    payload: &[u8],
    pieces: &[Vec<u8>],
    (was, now): (&Contents, &Contents),
) {
    let journals = Journals::new(base, &["data".into(), "log".into()], false);
    let mut link = 0;
    // What comes ahead comes anew over each connection.
    let mut commit = |volumes: &Volumes| {
        link += 1;
        pieces.iter().try_for_each(|piece| journals.seed(link, piece))?;
        volumes.commit(Generation::FIRST, epoch, payload)
    };
    let volumes = open(base).expect("nothing is amiss before");
    assert!(contents(&volumes) == *was, "what was committed is there");
    LEFT.set(rng.i64(0..40));
    let mut result = commit(&volumes);
    drop(volumes);
    while result.is_err() {
        LEFT.set(if rng.u8(0..3) == 0 { rng.i64(0..60) } else { i64::MAX });
        let journal = journal_in(base).is_some();
        match open(base) {
            Err(_) => continue,
            Ok(volumes) if journal => {
                LEFT.set(i64::MAX);
                drop(volumes);
                result = Ok(());
            }
            // All that was left to do was to take away what came ahead.
            Ok(volumes) if !pieces.is_empty() && contents(&volumes) == *now => {
                LEFT.set(i64::MAX);
                result = Ok(());
            }
            // It was killed before the journal was whole: it is as if it had never come.
            Ok(volumes) => {
                LEFT.set(i64::MAX);
                assert!(contents(&volumes) == *was, "half a journal changes nothing");
                LEFT.set(rng.i64(0..60));
                result = commit(&volumes);
            }
        }
    }
    LEFT.set(i64::MAX);
}

/// Contents that go ahead of a full checkpoint, while the program goes on.
fn seeded(rng: &mut fastrand::Rng, primary: &Volumes, busy: &mut Busy) -> Vec<Vec<u8>> {
    let mut pieces = vec![Vec::new()];
    let mut passes = rng.u8(1..4);
    while passes > 0 {
        let mut piece = Vec::new();
        match primary.seed(&mut piece).expect("it can be read") {
            true => pieces.push(piece),
            false => passes -= 1,
        }
        (0..rng.u8(0..10)).for_each(|_| drop(busy.act(primary)));
        // The full checkpoint may come before all has gone ahead.
        passes *= u8::from(rng.u8(0..20) > 0);
    }
    assert!(pieces.iter().all(|piece| piece.len() <= super::seeds::PIECE));
    pieces
}

/// How much is kept of what came ahead of checkpoints.
fn in_seeds(base: &Path) -> usize {
    let names = |at: &Path| std::fs::read_dir(at).expect("it is there").flatten();
    let volumes = names(base).filter(|entry| entry.path().is_dir());
    let is_seed = |name: &OsStr| name.to_string_lossy().starts_with("seed-");
    volumes.flat_map(|at| names(&at.path())).filter(|e| is_seed(&e.file_name())).count()
}

fn torture(seed: u64) {
    let (here, there) = (Scratch::new(), Scratch::new());
    let mut rng = fastrand::Rng::with_seed(seed);
    let primary = open(&here.0).expect("a new volume");
    let mut busy = Busy { rng: fastrand::Rng::with_seed(seed ^ 0xb5), open: Vec::new() };
    let mut was = contents(&open(&there.0).expect("a new volume"));
    let mut payload = Vec::new();
    for epoch in 1..=rng.u64(2..7) {
        let mut pieces = Vec::new();
        if epoch == 1 || rng.u8(0..6) == 0 {
            primary.begin_full();
            if rng.bool() {
                pieces = seeded(&mut rng, &primary, &mut busy);
            }
        }
        for _ in 0..rng.u8(0..3) {
            (0..rng.u8(0..40)).for_each(|_| drop(busy.act(&primary)));
            primary.precopy().expect("it can be read");
        }
        (0..rng.u8(0..40)).for_each(|_| drop(busy.act(&primary)));
        primary.seal().expect("it can be read");
        let now = contents(&primary);
        primary.take(&mut payload);
        // The program goes on before the backup has it.
        (0..rng.u8(0..10)).for_each(|_| drop(busy.act(&primary)));
        commit_killed(&mut rng, &there.0, Epoch(epoch), &payload, &pieces, (&was, &now));
        assert_eq!(
            in_seeds(&there.0),
            0,
            "seed {seed}, epoch {epoch}: what came ahead is done with"
        );
        let volumes = open(&there.0).expect("no journal is left");
        let got = contents(&volumes);
        for (key, value) in &now {
            assert_eq!(got.get(key), Some(value), "seed {seed}, epoch {epoch}, file {key:?}");
        }
        assert_eq!(got.len(), now.len(), "seed {seed}, epoch {epoch}: nothing else is there");
        was = now;
    }
    // The primary is killed: what it had is found again under the same numbers.
    primary.list().iter().for_each(|v| v.sweep().expect("it can be removed"));
    let now = contents(&primary);
    drop(primary);
    assert_eq!(contents(&open(&here.0).expect("it opens")), now, "seed {seed}: opened again");
}

/// VO-1, VO-2
#[test]
fn a_checkpoint_of_files_is_whole_wherever_it_is_killed() {
    if needs_root() {
        return;
    }
    let seeds = std::env::var("NILICON_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(200);
    (0..seeds).for_each(torture);
}

#[test]
fn damaged_journals_are_refused_by_name() {
    if needs_root() {
        return;
    }
    let (here, there) = (Scratch::new(), Scratch::new());
    let primary = open(&here.0).expect("a new volume");
    primary.begin_full();
    let volume = &primary.list()[0];
    let opened = new_file(volume);
    volume.write(&opened, 0, &[7; 9000]).expect("it is written");
    primary.seal().expect("it can be read");
    let mut payload = Vec::new();
    primary.take(&mut payload);
    let backup = open(&there.0).expect("a new volume");
    // Killed right after the journal was renamed.
    LEFT.set(3);
    backup.commit(Generation::FIRST, Epoch(1), &payload).expect_err("killed");
    LEFT.set(i64::MAX);
    let journal = journal_in(&there.0).expect("it was renamed");
    let good = std::fs::read(&journal).expect("the journal is whole");
    for at in [3, 12, 30, 36, 60, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 4;
        std::fs::write(&journal, &bad).expect("it is damaged");
        let error = open(&there.0).expect_err("it is not believed").to_string();
        assert!(error.contains(&journal.display().to_string()), "{error}");
    }
    std::fs::write(&journal, &good[..good.len() - 1]).expect("it is cut");
    assert!(matches!(open(&there.0), Err(VolumeError::Journal { .. })));
    std::fs::write(&journal, &good).expect("it is mended");
    assert_eq!(contents(&open(&there.0).expect("carried out")), contents(&primary));
}

/// A file in it, made and open.
fn new_file(volume: &Volume) -> Opened {
    let made = volume.make(Ino::ROOT, OsStr::new("a"), &Shape::File, 0o600, (0, 0), true);
    volume.open_file(made.expect("it is new").ino).expect("it opens")
}

/// A backup acknowledges epochs before it carries them out: a kill loses none of them, and a
/// promotion drops those that were not acknowledged.
#[test]
fn epochs_that_are_kept_are_carried_out_in_order_or_taken_back() {
    if needs_root() {
        return;
    }
    let (here, there) = (Scratch::new(), Scratch::new());
    let primary = open(&here.0).expect("new");
    primary.begin_full();
    let volume = &primary.list()[0];
    let opened = new_file(volume);
    let journals = Journals::new(&there.0, &["data".into(), "log".into()], true);
    let mut payloads = Vec::new();
    let mut wanted = Contents::new();
    for epoch in 9..=17 {
        volume.write(&opened, 0, &[epoch as u8; 100]).expect("it is written");
        primary.seal().expect("it can be read");
        let mut payload = Vec::new();
        primary.take(&mut payload);
        if epoch == 17 {
            journals.keep(Generation(2), Epoch(epoch), &payload).expect("it is kept");
            journals.take_back(Generation(2), Epoch(epoch)).expect("it was there");
        } else {
            journals.keep(Generation(2), Epoch(epoch), &payload).expect("it is kept");
            wanted = contents(&primary);
        }
        payloads.push(payload);
    }
    // The first is carried out by whoever has it; the others when the agent starts again.
    let backup = Volumes::open_as_it_is(&there.0, &["data".into(), "log".into()], true);
    backup.expect("new").carry_out(Generation(2), Epoch(9), &payloads[0]).expect("done");
    assert_eq!(contents(&open(&there.0).expect("the rest is done")), wanted);
    assert_eq!(journal_in(&there.0), None);
    journals.keep(Generation(2), Epoch(17), &payloads[8]).expect("it is kept");
    journals.shut().expect("it is removed");
    journals.keep(Generation(2), Epoch(18), &payloads[8]).expect("it is not kept");
    assert_eq!(contents(&open(&there.0).expect("nothing is done")), wanted);
    let tree = |base: &Scratch| base.0.join("data");
    assert_ne!(digest(&tree(&here)).expect("read"), digest(&tree(&there)).expect("read"));
    let found = difference(&tree(&here), &tree(&there)).expect("read");
    assert_eq!(found.as_deref(), Some("/a: other contents"));
    journals.reopen();
    journals.keep(Generation(2), Epoch(19), &payloads[8]).expect("it is kept");
    assert!(journal_in(&there.0).is_some());
}

#[test]
fn names_that_are_no_text_are_compared_as_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let (one, other) = (Scratch::new(), Scratch::new());
    let place =
        |base: &Scratch, name: &[u8]| base.0.join("data/tree").join(OsStr::from_bytes(name));
    for base in [&one, &other] {
        std::fs::create_dir_all(base.0.join("data/tree")).expect("made");
    }
    std::fs::write(place(&one, b"\xff"), "x").expect("written");
    std::fs::write(place(&other, b"\xfe"), "x").expect("written");
    let (here, there) = (one.0.join("data"), other.0.join("data"));
    let (files, sum) = digest(&here).expect("the name is taken");
    assert_eq!(files, 2);
    assert_ne!(sum, digest(&there).expect("the name is taken").1);
    let found = difference(&here, &there).expect("read").expect("they differ");
    assert!(found.ends_with(&format!("is only in {}", here.display())), "{found}");
}

/// An open of a pipe would wait for its other end, with the volume locked; one of a device node
/// would reach this host's device.
#[test]
fn only_regular_files_are_opened() {
    if needs_root() {
        return;
    }
    let here = Scratch::new();
    let primary = open(&here.0).expect("new");
    let volume = &primary.list()[0];
    for shape in [Shape::Fifo, Shape::Character(0x103), Shape::Symlink("a".into())] {
        let made = volume.make(Ino::ROOT, OsStr::new("a"), &shape, 0o600, (0, 0), false);
        let ino = made.expect("it is new").ino;
        let size = Change { size: Some(5), ..Change::default() };
        let invalid = Some(libc::EINVAL);
        assert_eq!(volume.change(ino, &size).expect_err("no file").raw_os_error(), invalid);
        assert_eq!(volume.open_file(ino).expect_err("no file").raw_os_error(), invalid);
        volume.unlink(Ino::ROOT, OsStr::new("a"), false).expect("it goes");
    }
}

/// A part that was cut off before pre-copy read the file, and came back as zeros after it.
#[test]
fn what_pre_copy_found_cut_off_is_zeros_when_it_comes_back() {
    if needs_root() {
        return;
    }
    let (here, there) = (Scratch::new(), Scratch::new());
    let (primary, backup) = (open(&here.0).expect("new"), open(&there.0).expect("new"));
    primary.begin_full();
    let volume = &primary.list()[0];
    let opened = new_file(volume);
    volume.write(&opened, 0, &[7; 9000]).expect("it is written");
    let mut payload = Vec::new();
    primary.seal().expect("it can be read");
    primary.take(&mut payload);
    backup.commit(Generation::FIRST, Epoch(1), &payload).expect("it is carried out");
    let size = |size| Change { size: Some(size), ..Change::default() };
    volume.change(opened.ino, &size(1000)).expect("it is cut");
    primary.precopy().expect("it can be read");
    volume.change(opened.ino, &size(8000)).expect("it grows");
    primary.seal().expect("it can be read");
    primary.take(&mut payload);
    backup.commit(Generation::FIRST, Epoch(2), &payload).expect("it is carried out");
    assert_eq!(contents(&backup), contents(&primary));
}

#[test]
fn what_does_not_fit_is_an_error() {
    if needs_root() {
        return;
    }
    let there = Scratch::new();
    let backup = open(&there.0).expect("a new volume");
    for payload in
        [vec![0; 5], vec![9, 0, 0, 0, 0, 0, 0, 0, 0, 0], vec![0, 0, 9, 0, 0, 0, 0, 0, 0, 0]]
    {
        let result = backup.commit(Generation::FIRST, Epoch(1), &payload);
        assert!(matches!(result, Err(VolumeError::Misfit { .. })), "{payload:?}: {result:?}");
    }
}

/// A first copy is refused before it fills the memory of both hosts; holes count nothing.
#[test]
fn more_than_a_checkpoint_has_room_for_is_refused_before_it_is_read() {
    if needs_root() {
        return;
    }
    let here = Scratch::new();
    let primary = open(&here.0).expect("new");
    let volume = &primary.list()[0];
    let opened = new_file(volume);
    volume.write(&opened, 0, &[1; 8192]).expect("written");
    volume.write(&opened, 1 << 30, &[2; 4096]).expect("written");
    primary.begin_full();
    let mut out = Vec::new();
    let error = volume.precopy(&mut out, 12_287).expect_err("a byte too many");
    assert!(matches!(error, VolumeError::TooMuch { bytes: 12_288, most: 12_287, .. }), "{error}");
    assert!(out.is_empty());
    // It is all still to be read.
    let read = volume.precopy(&mut out, 12_288).expect("there is room");
    assert!(read > 12_288 && read == out.len(), "{read}");
}

/// What came ahead of a checkpoint is kept as long as its journal, and what came over an older connection counts no
/// longer.
#[test]
fn contents_that_came_ahead_belong_to_one_checkpoint() {
    if needs_root() {
        return;
    }
    let (here, there) = (Scratch::new(), Scratch::new());
    let primary = open(&here.0).expect("new");
    let volume = &primary.list()[0];
    let opened = new_file(volume);
    volume.write(&opened, 0, &[5; 300_000]).expect("it is written");
    let journals = Journals::new(&there.0, &["data".into(), "log".into()], true);
    let send = |link: u64| {
        primary.begin_full();
        journals.seed(link, &[]).expect("it begins");
        let (mut piece, mut sent) = (Vec::new(), 0);
        while primary.seed(&mut piece).expect("it can be read") {
            journals.seed(link, &piece).expect("there is room");
            sent += piece.len();
        }
        assert_eq!(primary.unread(), 0);
        assert!(sent > 300_000, "{sent} bytes went ahead");
        primary.seal().expect("it can be read");
        let mut payload = Vec::new();
        primary.take(&mut payload);
        assert!(payload.len() < 10_000, "{} bytes are left for the checkpoint", payload.len());
        payload
    };
    let first = send(1);
    journals.keep(Generation(2), Epoch(5), &first).expect("it is kept");
    volume.write(&opened, 1000, &[6; 10]).expect("it is written");
    // A journal keeps what its checkpoint builds on, whoever comes next.
    send(2);
    let old = journals.seed(1, &[0, 0]).expect_err("of an older connection").to_string();
    assert!(old.contains("before the first"), "{old}");
    let found = open(&there.0).expect("carried out");
    let opened = found.list()[0].open_file(opened.ino).expect("it is there");
    let mut bytes = [0; 1010];
    assert_eq!(opened.read(0, &mut bytes).expect("it can be read"), 1010);
    assert_eq!(bytes, [5; 1010], "what is committed is of the first");
    assert_eq!(in_seeds(&there.0), 0);
    drop((opened, found));
    // Without it a checkpoint is nothing, and says so.
    let last = send(3);
    journals.keep(Generation(2), Epoch(6), &last).expect("it is kept");
    let backup =
        Volumes::open_as_it_is(&there.0, &["data".into(), "log".into()], true).expect("as it is");
    let seeds = there.0.join("data").join(format!("seed-{:016x}-{:016x}", 2, 6));
    std::fs::rename(&seeds, there.0.join("away")).expect("it is there");
    let error = backup.carry_out(Generation(2), Epoch(6), &last).expect_err("missing").to_string();
    assert!(error.contains("came ahead of it, and is missing"), "{error}");
    std::fs::rename(there.0.join("away"), &seeds).expect("it is back");
    backup.carry_out(Generation(2), Epoch(6), &last).expect("carried out");
    assert_eq!(contents(&backup), contents(&primary));
    for (piece, why) in [
        (&[0][..], "cut short"),
        (&[7, 0, 1], "cut short"),
        (&[9, 0, 2, 0, 0, 0, 0, 1], "ahead of its"),
    ] {
        journals.seed(4, &[]).expect("it begins");
        let error = journals.seed(4, piece).expect_err("no piece").to_string();
        assert!(error.contains(why), "{error}");
    }
    journals.shut().expect("nothing is in the way");
    assert_eq!(in_seeds(&there.0), 0, "of no use here any longer");
}
