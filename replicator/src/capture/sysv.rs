//! System V objects of the container's ipc namespace.
//!
//! A namespace without any costs three reads of an empty list in a stop. Segments of shared memory
//! become objects ([`super::objects`]); the values of semaphores and the messages of queues are
//! read in every stop.

use super::CaptureError;
use super::objects::{Class, Key, Objects};
use crate::image::sysv::{Identity, MessageQueue, Semaphores};
use crate::image::{Mapping, Process, Source};
use crate::sys::namespace::{in_ipc_of, is_ours};
use crate::sys::sysv;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Most bytes of messages in one queue.
const MOST_BYTES: u64 = 64 << 20;

/// More bytes than a line of a list has.
const LONGEST: usize = 512;

/// The lists of one ipc namespace, kept open.
#[derive(Debug)]
pub(super) struct SystemV {
    root: i32,
    /// It is that of the host: only the segments that the tree has attached are looked at.
    of_host: bool,
    segments: List,
    semaphores: List,
    queues: List,
}

#[derive(Debug)]
struct List {
    file: File,
    text: Vec<u8>,
}

/// A segment of shared memory by its line in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) identity: Identity,
    pub(super) size: u64,
    /// Deleted, and there as long as a process has it attached.
    pub(super) deleted: bool,
    /// How often it is attached, if also by processes that are not looked at.
    attached: Option<i64>,
}

impl SystemV {
    /// Those of the container whose init this is; none if it has no ipc namespace of its own.
    pub(super) fn open(root: i32) -> Result<Option<Self>, CaptureError> {
        if is_ours(root, "ipc")? { Ok(None) } else { Self::lists(root, false).map(Some) }
    }

    /// Those of the namespace of this process, which others use too.
    pub(super) fn open_shared(root: i32) -> Result<Self, CaptureError> {
        Self::lists(root, true)
    }

    fn lists(root: i32, of_host: bool) -> Result<Self, CaptureError> {
        // A list belongs to the namespace of the thread that opens it.
        in_ipc_of(root, || {
            let list = |name: &str| {
                let path = format!("/proc/sysvipc/{name}");
                let file = File::open(&path).map_err(|e| CaptureError::proc(&path, e))?;
                Ok::<_, CaptureError>(List { file, text: vec![0; 4096] })
            };
            let (segments, semaphores, queues) = (list("shm")?, list("sem")?, list("msg")?);
            Ok(Self { root, of_host, segments, semaphores, queues })
        })?
    }

    /// All segments; those that were not known become objects, whose numbers come with them.
    pub(super) fn segments(
        &mut self,
        objects: &mut Objects,
    ) -> Result<BTreeMap<u32, Segment>, CaptureError> {
        let root = self.root;
        let mut all = BTreeMap::new();
        for fields in self.segments.lines()? {
            // key, id, perms, size, cpid, lpid, nattch, uid, gid, ...
            let [key, id, mode, size, _, _, count, uid, gid, ..] = fields[..] else { continue };
            let identity = identity(key, id, mode, uid, gid);
            let (size, deleted) = (size as u64, mode & 0o1000 != 0);
            let attached = self.of_host.then_some(count);
            let segment = Segment { identity, size, deleted, attached };
            let name = format!("/SYSV{:08x}", key as u32);
            let key =
                Key { class: Class::SystemV, device: objects.kernel_tmpfs(), inode: id as u64 };
            if self.of_host && !objects.knows(key) {
                continue;
            }
            let open = || {
                in_ipc_of(root, || sysv::open_segment(id as i32, size, false))?
                    .map_err(CaptureError::from)
            };
            all.insert(objects.number(key, &name, open)?, segment);
        }
        Ok(all)
    }

    /// All semaphores and message queues.
    pub(super) fn take(&mut self) -> Result<(Vec<Semaphores>, Vec<MessageQueue>), CaptureError> {
        let (mut semaphores, mut queues) = (Vec::new(), Vec::new());
        if self.of_host {
            return Ok((semaphores, queues));
        }
        let (sets, lists) = (self.semaphores.lines()?, self.queues.lines()?);
        if sets.is_empty() && lists.is_empty() {
            return Ok((semaphores, queues));
        }
        in_ipc_of(self.root, || {
            for fields in sets {
                // key, id, perms, number, uid, gid, ...
                let [key, id, mode, count, uid, gid, ..] = fields[..] else { continue };
                let values = sysv::semaphore_values(id as i32, count as usize)?;
                semaphores.push(Semaphores { identity: identity(key, id, mode, uid, gid), values });
            }
            for fields in lists {
                // key, id, perms, bytes, messages, lspid, lrpid, uid, gid, ...
                let [key, id, mode, bytes, count, _, _, uid, gid, ..] = fields[..] else {
                    continue;
                };
                if bytes as u64 > MOST_BYTES {
                    let why = format!("it holds {bytes} bytes, at most {MOST_BYTES} are carried");
                    return Err(CaptureError::unsupported(format!("message queue {id}"), why));
                }
                let mut messages = Vec::with_capacity(count as usize);
                for index in 0..count as usize {
                    messages.extend(sysv::peek_message(id as i32, index, bytes as usize)?);
                }
                queues.push(MessageQueue {
                    identity: identity(key, id, mode, uid, gid),
                    max_bytes: sysv::queue_limit(id as i32)?,
                    messages,
                });
            }
            Ok(())
        })??;
        Ok((semaphores, queues))
    }
}

fn identity(key: i64, id: i64, mode: i64, uid: i64, gid: i64) -> Identity {
    let (id, key, mode) = (id as i32, key as i32, mode as u32 & 0o777);
    Identity { id, key, mode, uid: uid as u32, gid: gid as u32 }
}

impl List {
    /// The numbers in each line, permission bits read as the octal that they are.
    fn lines(&mut self) -> Result<Vec<Vec<i64>>, CaptureError> {
        let mut used = 0;
        loop {
            let read = self.file.read_at(&mut self.text[used..], used as u64);
            used += match read.map_err(|e| CaptureError::proc("/proc/sysvipc", e))? {
                0 => break,
                n => n,
            };
            // A read gives as many lines as there is room for, or all.
            if used + LONGEST <= self.text.len() {
                break;
            }
            if used == self.text.len() {
                self.text.resize(2 * used, 0);
            }
        }
        let text = String::from_utf8_lossy(&self.text[..used]);
        let number = |(at, field): (usize, &str)| {
            i64::from_str_radix(field, if at == 2 { 8 } else { 10 }).unwrap_or(0)
        };
        let lines = text.lines().skip(1);
        Ok(lines.map(|l| l.split_whitespace().enumerate().map(number).collect()).collect())
    }
}

/// Refuses segments that cannot be attached again as they are.
pub(super) fn check_attached(processes: &[Process], objects: &Objects) -> Result<(), CaptureError> {
    let mut counts: BTreeMap<u32, i64> = BTreeMap::new();
    let all = || processes.iter().flat_map(|p| p.mappings.iter().map(move |m| (p, m)));
    for (process, m) in all() {
        let Source::Object { id, offset, .. } = m.source else { continue };
        let why = match objects.segment(id) {
            None => continue,
            Some(None) => "a System V segment of the host's ipc namespace; make a namespace for it",
            Some(Some(s)) if offset == 0 && m.end - m.start == s.size.next_multiple_of(4096) => {
                *counts.entry(id).or_default() += 1;
                continue;
            }
            Some(Some(_)) => "a part of a System V segment; attach it whole, with the same rights",
        };
        return refuse(process, m, why);
    }
    for (process, m) in all() {
        let Source::Object { id, .. } = m.source else { continue };
        let Some(Some(segment)) = objects.segment(id) else { continue };
        if segment.attached.is_some_and(|n| n != counts.get(&id).copied().unwrap_or(0)) {
            return refuse(
                process,
                m,
                "a System V segment that a process outside has attached too",
            );
        }
    }
    Ok(())
}

fn refuse(process: &Process, m: &Mapping, why: &str) -> Result<(), CaptureError> {
    let object = format!("mapping {:#x}-{:#x} of pid {}", m.start, m.end, process.pid);
    Err(CaptureError::unsupported(object, why.into()))
}
