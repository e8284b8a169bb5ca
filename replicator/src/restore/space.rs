//! One process's address space: emptied for a start, then changed step by step.
//!
//! Below the first address of any program lie, at the same place in every process of a spare, the
//! scratch area and behind it the kernel's own mappings (vdso, vvar), moved aside until the end.

use super::error::{Doing, RestoreError};
use super::pages::{Way, arrange, way};
use super::plan::{Step, plan};
use super::script::Script;
use super::shared::{self, Held};
use crate::image::pages::{Edit, Edits, PAGE, Run};
use crate::image::{Mapping, Source, VdsoPart};
use crate::sys::memory::{self, ForcedMemory};
use crate::sys::remote::{SCRATCH, SCRATCH_LEN};
use crate::sys::{SysError, SysResult};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Where the kernel's mappings lie meanwhile.
pub(super) const ASIDE: u64 = SCRATCH + SCRATCH_LEN;
/// One past the last address that a spare needs for itself.
pub(super) const RESERVED_END: u64 = ASIDE + 0x1_0000;
/// One past the last address that a process can map.
const TASK_END: u64 = 0x7fff_ffff_f000;
/// Private mappings from this size on are taken not to be meant to be used in full.
const NO_RESERVE: u64 = 1 << 30;

const PROT_WRITE: u8 = libc::PROT_WRITE as u8;

/// One of the kernel's mappings as it lies in a process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Special {
    pub(super) part: VdsoPart,
    pub(super) start: u64,
    pub(super) len: u64,
}

/// The kernel's mappings of a process, by /proc/PID/maps.
pub(super) fn specials(pid: i32) -> SysResult<Vec<Special>> {
    let path = format!("/proc/{pid}/maps");
    let maps = std::fs::read_to_string(&path).map_err(|source| SysError {
        call: "read",
        object: path.clone(),
        source,
    })?;
    let mut all = Vec::new();
    for line in maps.lines() {
        let part = match line.rsplit(' ').next() {
            Some("[vdso]") => VdsoPart::Vdso,
            Some("[vvar]") => VdsoPart::Vvar,
            Some("[vvar_vclock]") => VdsoPart::VvarVclock,
            _ => continue,
        };
        let number = |s: &str| u64::from_str_radix(s, 16).ok();
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        let range = range.and_then(|(a, b)| Some((number(a)?, number(b)?)));
        let (start, end) =
            range.ok_or_else(|| SysError::errno("parse", path.clone(), libc::EINVAL))?;
        all.push(Special { part, start, len: end - start });
    }
    Ok(all)
}

/// Moves the kernel's mappings to other places, given one for each.
pub(super) fn move_specials(script: &mut Script, specials: &[Special], to: &[u64]) {
    for (special, to) in specials.iter().zip(to) {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        script.call_on(
            "mremap",
            format!("{:?} to {to:#x}", special.part),
            libc::SYS_mremap,
            &[special.start, special.len, special.len, flags, *to],
        );
    }
}

/// Unmaps everything but what a spare needs for itself.
pub(super) fn wipe(script: &mut Script) {
    script.call("munmap", libc::SYS_munmap, &[0, SCRATCH]);
    script.call("munmap", libc::SYS_munmap, &[RESERVED_END, TASK_END - RESERVED_END]);
}

/// Refuses mappings that lie where the spare keeps its own things.
pub(super) fn check_reserved(pid: i32, mappings: &[Mapping]) -> Result<(), RestoreError> {
    match mappings.first() {
        Some(m) if m.start < RESERVED_END => Err(RestoreError::Refused {
            pid,
            object: format!("mapping {:#x}-{:#x}", m.start, m.end),
            reason: format!(
                "addresses below {RESERVED_END:#x} are needed to restore it; such a program (linked \
                 to very low addresses) cannot be protected"
            ),
        }),
        _ => Ok(()),
    }
}

/// Descriptors in flight at a time, few enough for the socket's buffer.
const MAX_PASSED: usize = 32;

/// Where processes get the objects that they map.
pub(super) struct Givers<'a> {
    pub(super) held: &'a Held,
    pub(super) channel: &'a UnixStream,
}

/// The process whose memory is changed.
pub(super) struct Target<'a> {
    pub(super) pid: i32,
    pub(super) host: i32,
    pub(super) forced: &'a ForcedMemory,
}

/// Brings the mappings from `old` to `new`.
pub(super) fn remap(
    target: &Target<'_>,
    script: &mut Script,
    givers: &Givers<'_>,
    old: &[Mapping],
    new: &[Mapping],
) -> Result<(), RestoreError> {
    const DOING: &str = "change the memory mappings";
    let mut passed = 0;
    for step in plan(old, new) {
        if let Step::Map(m) = &step {
            check_new(target.pid, m, old)?;
        }
        if !script.has_room(libc::PATH_MAX as usize, 3) || passed == MAX_PASSED {
            script.run_ok(target.host).doing(target.pid, DOING)?;
            passed = 0;
        }
        if matches!(&step, Step::Map(m) if matches!(m.source, Source::Object { .. })) {
            passed += 1;
        }
        push_step(script, givers, &step).doing(target.pid, DOING)?;
    }
    if script.is_empty() {
        return Ok(());
    }
    script.run_ok(target.host).doing(target.pid, DOING).map(drop)
}

/// A mapping that takes the place of another brings its pages along if it is said to be new. Else those that
/// are only here would be lost: then everything must be sent again.
fn check_new(pid: i32, m: &Mapping, old: &[Mapping]) -> Result<(), RestoreError> {
    let at = old.partition_point(|o| o.end <= m.start);
    if m.fresh || way(m).is_none() || old.get(at).is_none_or(|o| o.start >= m.end) {
        return Ok(());
    }
    Err(RestoreError::Impossible {
        pid,
        object: format!("mapping {:#x}-{:#x}", m.start, m.end),
        reason: "it is another than before, and what was written to it is not in the checkpoint"
            .into(),
    })
}

/// Maps parts of files that were not there when the mappings were made, over the memory that has their place.
/// The files are open as the mappings need it.
pub(super) fn map_late(
    target: &Target<'_>,
    script: &mut Script,
    channel: &UnixStream,
    parts: &[(&Mapping, &File)],
) -> Result<(), RestoreError> {
    const DOING: &str = "map its files in volumes";
    for part in parts.chunks(MAX_PASSED) {
        for (m, file) in part {
            let Source::File { path, offset, shared, .. } = &m.source else { continue };
            // What the message, which the descriptor comes in, is received into takes less.
            if !script.has_room(256, 3) {
                script.run_ok(target.host).doing(target.pid, DOING)?;
            }
            shared::pass(script, channel, file.as_raw_fd(), path.clone())
                .doing(target.pid, DOING)?;
            let shared = if *shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
            let flags = (libc::MAP_FIXED | shared) as u64;
            // As with an object: it became 0.
            let args = [m.start, m.end - m.start, u64::from(m.prot), flags, 0, *offset];
            let object = format!("{path} at {:#x}-{:#x}", m.start, m.end);
            script.call_on("mmap", object, libc::SYS_mmap, &args);
            script.call("close", libc::SYS_close, &[0]);
        }
        script.run_ok(target.host).doing(target.pid, DOING)?;
    }
    Ok(())
}

/// Maps parts of these objects again, which are other files now.
pub(super) fn map_again(
    target: &Target<'_>,
    script: &mut Script,
    givers: &Givers<'_>,
    mappings: &[Mapping],
    objects: &[u32],
) -> Result<(), RestoreError> {
    const DOING: &str = "map its files";
    let is_one =
        |m: &&Mapping| matches!(m.source, Source::Object { id, .. } if objects.contains(&id));
    for m in mappings.iter().filter(is_one) {
        push_map(script, givers, m).doing(target.pid, DOING)?;
        script.run_ok(target.host).doing(target.pid, DOING)?;
    }
    Ok(())
}

fn push_step(script: &mut Script, givers: &Givers<'_>, step: &Step) -> SysResult<()> {
    match step {
        Step::Unmap { start, end } => {
            script.call("munmap", libc::SYS_munmap, &[*start, end - start]);
        }
        Step::Protect { start, end, prot } => {
            script.call("mprotect", libc::SYS_mprotect, &[*start, end - start, u64::from(*prot)]);
        }
        Step::Map(m) => return push_map(script, givers, m),
    }
    Ok(())
}

fn push_map(script: &mut Script, givers: &Givers<'_>, m: &Mapping) -> SysResult<()> {
    let (len, prot) = (m.end - m.start, u64::from(m.prot));
    let object = || format!("{:#x}-{:#x}", m.start, m.end);
    let mut flags = libc::MAP_FIXED;
    match &m.source {
        Source::Anonymous => {
            flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            if m.grows_down {
                flags |= libc::MAP_GROWSDOWN;
            }
            if len >= NO_RESERVE {
                flags |= libc::MAP_NORESERVE;
            }
            let args = [m.start, len, prot, flags as u64, u64::MAX, 0];
            script.call_on("mmap", object(), libc::SYS_mmap, &args);
        }
        // What it will be of is not there yet: its pages wait in memory of their own, see `landing`.
        Source::File { .. } if m.is_late() => {
            flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let args = [m.start, len, prot, flags as u64, u64::MAX, 0];
            script.call_on("mmap", object(), libc::SYS_mmap, &args);
        }
        Source::File { path, offset, shared, .. } => {
            let writes = *shared && m.prot & PROT_WRITE != 0;
            let mode = if writes { libc::O_RDWR } else { libc::O_RDONLY };
            flags |= if *shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
            let name = script.text(path);
            let open = [name, (mode | libc::O_CLOEXEC) as u64, 0];
            script.call_on("open", path.clone(), libc::SYS_open, &open);
            // A process of a spare has no descriptor but its high channel: the file became 0.
            let args = [m.start, len, prot, flags as u64, 0, *offset];
            script.call_on("mmap", format!("{path} at {}", object()), libc::SYS_mmap, &args);
            script.call("close", libc::SYS_close, &[0]);
        }
        Source::Vdso(_) => {}
        Source::Object { id, offset, shared } => {
            if let Some(segment) = givers.held.segment(*id) {
                attach(script, m, segment);
                return Ok(());
            }
            flags |= if *shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
            // As with a file: it became 0.
            givers.held.pass(script, givers.channel, *id)?;
            let args = [m.start, len, prot, flags as u64, 0, *offset];
            script.call_on("mmap", object(), libc::SYS_mmap, &args);
            script.call("close", libc::SYS_close, &[0]);
        }
    }
    Ok(())
}

/// Attaches a segment of System V shared memory, whole.
fn attach(script: &mut Script, m: &Mapping, segment: i32) {
    let rights = match m.prot & (libc::PROT_READ | libc::PROT_WRITE) as u8 {
        // It may be attached for reading only, or be protected since: the former is usual.
        1 => libc::SHM_RDONLY,
        _ => 0,
    };
    let flags = (rights | libc::SHM_REMAP) as u64;
    let object = format!("segment {segment} at {:#x}", m.start);
    script.call_on("shmat", object, libc::SYS_shmat, &[segment as u64, m.start, flags]);
    if rights == 0 && m.prot != (libc::PROT_READ | libc::PROT_WRITE) as u8 {
        let args = [m.start, m.end - m.start, u64::from(m.prot)];
        script.call("mprotect", libc::SYS_mprotect, &args);
    }
}

/// Brings edits of this process's pages in, whose mappings are these by now.
pub(super) fn edit(
    target: &Target<'_>,
    mappings: &[Mapping],
    list: &[Edit],
    edits: &Edits,
) -> Result<(), RestoreError> {
    const DOING: &str = "write what has changed of pages";
    let mut pieces: Vec<(u64, &[u8])> = Vec::with_capacity(list.len());
    for edit in list {
        let at = mappings.partition_point(|m| m.end <= edit.start);
        let Some(mapping) = mappings.get(at).filter(|m| m.start <= edit.start) else { continue };
        match way(mapping) {
            None => {}
            Some(Way::Plain) => pieces.push((edit.start, edits.of(edit))),
            Some(Way::Forced) => {
                target.forced.write(edit.start, edits.of(edit)).doing(target.pid, DOING)?;
            }
        }
    }
    memory::write_scattered(target.host, &pieces).doing(target.pid, DOING)
}

/// Brings a checkpoint's pages of this process in.
pub(super) fn fill(
    target: &Target<'_>,
    script: &mut Script,
    mappings: &[Mapping],
    runs: &[Run],
    bytes: &[u8],
) -> Result<(), RestoreError> {
    const DOING: &str = "write the pages";
    let (drops, writes) = arrange(runs, mappings);
    for (start, end) in drops {
        if !script.has_room(0, 1) {
            script.run_ok(target.host).doing(target.pid, DOING)?;
        }
        let args = [start, end - start, libc::MADV_DONTNEED as u64];
        script.call("madvise(MADV_DONTNEED)", libc::SYS_madvise, &args);
    }
    if !script.is_empty() {
        script.run_ok(target.host).doing(target.pid, DOING)?;
    }
    let mut pieces: Vec<(u64, &[u8])> = Vec::new();
    for w in &writes {
        let end = w.offset + w.len as usize;
        let piece = bytes.get(w.offset..end).ok_or_else(|| RestoreError::Impossible {
            pid: target.pid,
            object: format!("page {:#x}", w.start),
            reason: format!("its contents lie beyond the {} that came", bytes.len() / PAGE),
        })?;
        match (w.way, pieces.last_mut()) {
            (Way::Forced, _) => {
                target.forced.write(w.start, piece).doing(target.pid, DOING)?;
            }
            // Neighbours in both memories become one piece.
            (_, Some((at, last)))
                if *at + last.len() as u64 == w.start
                    && last.as_ptr_range().end == piece.as_ptr() =>
            {
                *last = &bytes[w.offset - last.len()..end];
            }
            _ => pieces.push((w.start, piece)),
        }
    }
    memory::write_scattered(target.host, &pieces).doing(target.pid, DOING)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Home;

    fn mapping(start: u64, end: u64, shared: bool, fresh: bool) -> Mapping {
        let source = Source::File {
            path: "/f".into(),
            offset: 0,
            shared,
            home: Home::Host,
            writable: false,
        };
        Mapping { start, end, prot: PROT_WRITE, grows_down: false, source, fresh }
    }

    #[test]
    fn a_mapping_that_replaces_another_must_be_said_to_be_new() {
        let old = [mapping(0x1000, 0x3000, false, false)];
        let refused = |m: Mapping| check_new(1, &m, &old).is_err();
        assert!(refused(mapping(0x2000, 0x4000, false, false)));
        assert!(!refused(mapping(0x2000, 0x4000, false, true)), "it brings its pages");
        assert!(!refused(mapping(0x2000, 0x4000, true, false)), "its pages are the file's");
        assert!(!refused(mapping(0x3000, 0x4000, false, false)), "nothing was there");
        assert!(!refused(mapping(0, 0x1000, false, false)), "nor here");
    }
}
