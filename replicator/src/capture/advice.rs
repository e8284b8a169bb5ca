//! Flags of mappings that /proc/PID/smaps alone tells: what was said by madvise(2), mlock(2),
//! mseal(2).
//!
//! Reading smaps walks all page tables, so it happens in pre-copy, when mappings changed or the
//! amount of locked memory did, and from time to time for what leaves no other trace: nothing does
//! where a [`glance`](super::glance) shows the flags of mappings. An advice that is younger than that may be
//! missing in a checkpoint; no contents depend on it.

use super::CaptureError;
use super::memory::is_scratch;
use crate::image::advice::Advice;
use std::time::{Duration, Instant};

/// Looks are at least this far apart if nothing shows that something changed.
const PERIOD: Duration = Duration::from_millis(250);

/// The flags of one process as last read.
#[derive(Debug, Default)]
pub(super) struct Advices {
    all: Vec<Advice>,
    refused: Option<(u64, u64, &'static str)>,
    locked: u64,
    last: Option<(Instant, Duration)>,
    /// Mappings have changed since.
    stale: bool,
    /// A copy for the next checkpoint.
    ready: Vec<Advice>,
}

impl Advices {
    /// Reads them if it is time to. `locked` is the amount of locked memory, `changed` says that
    /// mappings changed, `shown` that a change of flags is one.
    pub(super) fn look(
        &mut self,
        pid: i32,
        locked: u64,
        changed: bool,
        shown: bool,
    ) -> Result<(), CaptureError> {
        let begin = Instant::now();
        self.stale |= changed;
        if let Some((last, cost)) = self.last {
            let since = begin - last;
            let due = !shown && since >= PERIOD.max(cost * 100);
            if !due && locked == self.locked && !(self.stale && since >= cost * 10) {
                return Ok(());
            }
        }
        let path = format!("/proc/{pid}/smaps");
        let text = std::fs::read(&path).map_err(|e| CaptureError::proc(&path, e))?;
        (self.all, self.refused) = parse(&String::from_utf8_lossy(&text));
        self.locked = locked;
        (self.last, self.stale) = (Some((begin, begin.elapsed())), false);
        Ok(())
    }

    /// Those for a checkpoint; reads them if that never happened.
    /// `changed` says that mappings changed since the look before the stop.
    pub(super) fn take(
        &mut self,
        pid: i32,
        locked: u64,
        changed: bool,
    ) -> Result<Vec<Advice>, CaptureError> {
        self.stale |= changed;
        if self.last.is_none() {
            self.look(pid, locked, true, false)?;
        }
        if let Some((start, end, why)) = self.refused {
            let object = format!("mapping {start:#x}-{end:#x} of pid {pid}");
            return Err(CaptureError::unsupported(object, why.into()));
        }
        Ok(super::or_copy(std::mem::take(&mut self.ready), &self.all))
    }

    /// Before a stop: makes the copy that its checkpoint takes, with room for as many more.
    pub(super) fn make_ready(&mut self, more: usize) {
        if self.ready.capacity() < self.all.len() + more {
            self.ready = Vec::with_capacity(self.all.len() + more);
        }
        self.ready.clone_from(&self.all);
    }
}

fn bit(flag: &str) -> u32 {
    match flag {
        "dc" => Advice::DONTFORK,
        "wf" => Advice::WIPEONFORK,
        "dd" => Advice::DONTDUMP,
        "mg" => Advice::MERGEABLE,
        "hg" => Advice::HUGEPAGE,
        "nh" => Advice::NOHUGEPAGE,
        "sr" => Advice::SEQUENTIAL,
        "rr" => Advice::RANDOM,
        "lo" => Advice::LOCKED,
        "lf" => Advice::LOCKED_ON_FAULT,
        "sl" => Advice::SEALED,
        _ => 0,
    }
}

/// The mappings with flags, neighbours with the same ones as one; and one that cannot be captured.
fn parse(smaps: &str) -> (Vec<Advice>, Option<(u64, u64, &'static str)>) {
    let mut all: Vec<Advice> = Vec::new();
    let mut refused = None;
    // The mapping that the lines are about; none for the kernel's own.
    let mut here: Option<(u64, u64, bool)> = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let Some((start, end, is_stack)) = here else { continue };
            if flags.split_whitespace().any(|f| f == "gd") && !is_stack {
                let why = "memory that grows down (MAP_GROWSDOWN) and is not the main stack; map it whole";
                refused = Some((start, end, why));
            }
            let bits = flags.split_whitespace().map(bit).fold(0, |a, b| a | b);
            match all.last_mut() {
                _ if bits == 0 => {}
                Some(last) if last.end == start && last.bits == bits => last.end = end,
                _ => all.push(Advice { start, end, bits }),
            }
        } else if let Some(key) = line.strip_prefix("ProtectionKey:") {
            if let Some((start, end, _)) = here
                && key.trim() != "0"
            {
                refused = Some((
                    start,
                    end,
                    "memory with a protection key (pkey_mprotect); run it without",
                ));
            }
        } else if line
            .as_bytes()
            .first()
            .is_some_and(|c| c.is_ascii_digit() || c.is_ascii_lowercase())
        {
            here = header(line);
        }
    }
    (all, refused)
}

fn header(line: &str) -> Option<(u64, u64, bool)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let kernels = ["[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"];
    let skipped = is_scratch(start, end) || kernels.iter().any(|name| line.ends_with(name));
    (!skipped).then(|| (start, end, line.ends_with("[stack]")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_neighbours_are_joined() {
        let text = "70000000-70001000 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr mr mw me ac dc \n\
                    70001000-70003000 rw-p 00000000 00:00 0 \nVmFlags: rd wr dc\n\
                    70003000-70004000 rw-p 00000000 00:00 0 \nVmFlags: rd wr mr\n\
                    70004000-70005000 rw-p 00000000 00:00 0 \nVmFlags: rd wr lo lf\n\
                    7ffd0000-7ffd2000 rw-p 00000000 00:00 0   [stack]\nVmFlags: rd gd\n\
                    7fff0000-7fff2000 r-xp 00000000 00:00 0   [vdso]\nVmFlags: rd de dd\n";
        let locked = Advice::LOCKED | Advice::LOCKED_ON_FAULT;
        let wanted = [
            Advice { start: 0x7000_0000, end: 0x7000_3000, bits: Advice::DONTFORK },
            Advice { start: 0x7000_4000, end: 0x7000_5000, bits: locked },
        ];
        assert_eq!(parse(text), (wanted.to_vec(), None));
        let text = "70000000-70001000 rw-p 00000000 00:00 0 \nVmFlags: rd wr gd\n";
        assert!(parse(text).1.is_some());
        let text = "70000000-70001000 rw-p 00000000 00:00 0 \nProtectionKey: 3\nVmFlags: rd\n";
        assert!(parse(text).1.is_some());
    }
}
