//! A process that does to the files of a volume what comes to its mind.

use nix::fcntl::{FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};
use replicator::sys::xattr;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Works on the files of a volume until it is killed.
pub(crate) fn work(holder: &str, at: &Path, seed: u64) {
    unshare(CloneFlags::CLONE_FS).expect("a working directory of its own");
    let namespace = File::open(format!("/proc/{holder}/ns/mnt")).expect("a namespace");
    setns(namespace, CloneFlags::CLONE_NEWNS).expect("entered");
    std::env::set_current_dir(at).expect("the volume");
    println!("ready");
    let mut busy = Busy { rng: fastrand::Rng::with_seed(seed), open: Vec::new() };
    loop {
        // Whether an operation succeeds is its own affair; what it did is to arrive.
        let _ = busy.act();
    }
}

struct Busy {
    rng: fastrand::Rng,
    open: Vec<File>,
}

impl Busy {
    fn path(&mut self) -> PathBuf {
        let mut path = PathBuf::from(".");
        for _ in 0..self.rng.u8(0..3) {
            path.push(format!("d{}", self.rng.u8(0..3)));
        }
        let kind = if self.rng.u8(0..4) == 0 { 'd' } else { 'f' };
        path.join(format!("{kind}{}", self.rng.u8(0..4)))
    }

    fn opened(&mut self) -> Option<&File> {
        if self.open.is_empty() {
            None
        } else {
            Some(&self.open[self.rng.usize(0..self.open.len())])
        }
    }

    fn act(&mut self) -> io::Result<()> {
        let (path, other) = (self.path(), self.path());
        let (size, offset) = (self.rng.usize(1..9000), self.rng.u64(0..60_000));
        let bytes = vec![self.rng.u8(1..); size];
        match self.rng.u8(0..30) {
            0..4 => {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(self.rng.bool());
                let file = options.mode(0o640).open(&path)?;
                file.write_all_at(&bytes, offset)?;
                self.open.push(file);
                // Some go on without a name.
                if self.rng.u8(0..4) == 0 {
                    fs::remove_file(&path)?;
                }
            }
            4 | 5 => fs::create_dir(&path)?,
            6 => match self.rng.u8(0..3) {
                0 => std::os::unix::fs::symlink("some/where", &path)?,
                1 => mknod(&path, SFlag::S_IFIFO, Mode::S_IRUSR, 0)?,
                _ => mknod(&path, SFlag::S_IFSOCK, Mode::S_IRUSR, 0)?,
            },
            7 => fs::hard_link(&path, &other)?,
            8 | 9 => fs::remove_file(&path)?,
            10 => fs::remove_dir(&path)?,
            11 | 12 => {
                let flags = [
                    RenameFlags::empty(),
                    RenameFlags::RENAME_NOREPLACE,
                    RenameFlags::RENAME_EXCHANGE,
                ];
                let flags = flags[self.rng.usize(0..3)];
                renameat2(nix::fcntl::AT_FDCWD, &path, nix::fcntl::AT_FDCWD, &other, flags)?;
            }
            13 => OpenOptions::new().write(true).open(&path)?.set_len(offset)?,
            14 => fs::set_permissions(&path, fs::Permissions::from_mode(self.rng.u32(0..0o7777)))?,
            15 => {
                let owner = Some(self.rng.u32(0..9));
                std::os::unix::fs::lchown(&path, owner, owner)?;
            }
            16 => {
                let name = OsStr::new(if self.rng.bool() { "trusted.a" } else { "user.b" });
                let result = match self.rng.u8(0..3) {
                    0 => xattr::remove(&path, name),
                    _ => xattr::set(&path, name, &bytes[..bytes.len().min(200)], 0),
                };
                result.map_err(|e| e.source)?;
            }
            17 => {
                let time = std::time::UNIX_EPOCH + Duration::from_millis(self.rng.u64(0..1 << 40));
                File::open(&path)?.set_modified(time)?;
            }
            18 => {
                let flags = [
                    FallocateFlags::empty(),
                    FallocateFlags::FALLOC_FL_KEEP_SIZE,
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                ];
                let flags = flags[self.rng.usize(0..3)];
                if let Some(file) = self.opened() {
                    fallocate(file, flags, offset as i64, size as i64)?;
                }
            }
            19 => {
                let mut from = File::open(&path)?;
                io::copy(&mut from, &mut OpenOptions::new().append(true).open(&other)?)?;
            }
            20 if self.open.len() > 8 => {
                let last = self.rng.usize(0..self.open.len());
                drop(self.open.swap_remove(last));
            }
            21 => fs::read_dir(path.parent().unwrap_or(&path))?.try_for_each(|e| e.map(drop))?,
            22 => {
                if let Some(file) = self.opened() {
                    file.sync_data()?;
                }
            }
            23 => {
                OpenOptions::new().append(true).open(&path)?.write_all(&bytes)?;
            }
            _ => {
                if let Some(file) = self.opened() {
                    file.write_all_at(&bytes, offset)?;
                    // What was just written is what is read.
                    let mut read = vec![0; 1];
                    file.read_exact_at(&mut read, offset)?;
                }
            }
        }
        Ok(())
    }
}
