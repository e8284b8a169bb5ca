//! The mappings of a process: a program for the `task_vma` iterator, and the rows that it writes. One
//! read instead of a request for each mapping, which is most of what a stop costs a process with many
//! of them; and it tells by whom a mapping is watched, so that one which took the place of another just
//! like it is seen, and all flags (vm_flags), so that what was said of it by madvise(2) and its like is.
//!
//! ```text
//! a row:   | first address, end, flags, page in the file, inode, who watches it |
//! ```

use crate::bpf::asm::{Assembler, FP, If, Size, helper};
use crate::bpf::btf::Btf;
use crate::sys::procmap::Extent;
use crate::sys::{SysError, SysResult, bpf};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Words of a row.
const WORDS: usize = 6;
const ROW: usize = WORDS * 8;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// How often a list is begun again because mappings changed while it was read.
const TRIES: usize = 16;

/// The program, loaded.
#[derive(Debug)]
pub(super) struct Mappings {
    program: OwnedFd,
}

impl Mappings {
    pub(super) fn load() -> SysResult<Self> {
        let failed = |source| SysError {
            call: "look for fields of the kernel's structures",
            object: "an iterator over mappings".into(),
            source,
        };
        let btf = Btf::of_kernel().map_err(failed)?;
        let code = assemble(&btf).map_err(failed)?;
        let target = btf.function("bpf_iter_task_vma").map_err(failed)?;
        Ok(Self { program: bpf::load_iterator(&code, target)? })
    }
}

/// Register 6 is the context, 7 where to write to, 8 the mapping.
fn assemble(btf: &Btf) -> io::Result<Vec<u8>> {
    use Size::Double;
    let offset = |of, path| {
        let member = btf.member(btf.structure(of)?, path)?;
        i16::try_from(member.offset).map_err(io::Error::other)
    };
    let vma = |path| offset("vm_area_struct", path);
    let mut a = Assembler::default();
    a.mov(6, 1);
    a.load(Double, 7, 6, offset("bpf_iter__task_vma", "meta")?);
    a.load(Double, 7, 7, offset("bpf_iter_meta", "seq")?);
    a.load(Double, 8, 6, offset("bpf_iter__task_vma", "vma")?);
    a.jump(If::Equal, 8, 0, "last");
    let place = |word: usize| (8 * word) as i16 - ROW as i16;
    for (word, path) in [
        (0, "vm_start"),
        (1, "vm_end"),
        (2, "vm_flags"),
        (3, "vm_pgoff"),
        (5, "vm_userfaultfd_ctx.ctx"),
    ] {
        a.load(Double, 1, 8, vma(path)?);
        a.store(Double, FP, place(word), 1);
    }
    a.load(Double, 2, 8, vma("vm_file")?);
    a.load(Double, 2, 2, offset("file", "f_inode")?);
    a.load(Double, 1, 2, offset("inode", "i_ino")?);
    a.store(Double, FP, place(4), 1);
    a.mov(1, 7);
    a.place(2, place(0));
    a.set(3, ROW as i32);
    a.call(helper::SEQ_WRITE);
    super::write_end(&mut a);
    Ok(a.finish())
}

/// The mappings of one process.
#[derive(Debug)]
pub(in crate::capture) struct MappingGlance {
    link: OwnedFd,
    bytes: Vec<u8>,
}

impl MappingGlance {
    /// For the process with this host pid. None if this kernel cannot do it.
    pub(in crate::capture) fn open(pid: i32) -> Option<Self> {
        let known = super::mappings()?;
        match bpf::iterate_thread(known.program.as_fd(), pid) {
            Ok(link) => Some(Self { link, bytes: Vec::new() }),
            Err(error) => {
                tracing::debug!(pid, %error, "its mappings are asked for one by one");
                None
            }
        }
    }

    /// Replaces the contents of `out` by all mappings in order of address.
    ///
    /// # Errors
    /// The kernel refuses, or mappings change faster than they can be listed (EAGAIN).
    pub(in crate::capture) fn list(&mut self, out: &mut Vec<Extent>) -> SysResult<()> {
        for _ in 0..TRIES {
            if self.try_list(out)? {
                return Ok(());
            }
        }
        Err(SysError::errno("read", "an iterator over mappings", libc::EAGAIN))
    }

    /// False if they were changed meanwhile, so that one was shown before and after it had grown.
    fn try_list(&mut self, out: &mut Vec<Extent>) -> SysResult<bool> {
        out.clear();
        let len = bpf::iterate(self.link.as_fd(), &mut self.bytes)?;
        let (rows, rest) = self.bytes[..len].as_chunks::<ROW>();
        if !rest.is_empty() {
            return Err(SysError::errno("read", "an iterator over mappings", libc::EIO));
        }
        let mut behind = 0;
        for row in rows {
            let [start, end, flags, page, inode, watcher] = words(row);
            if start < behind {
                return Ok(false);
            }
            behind = end;
            // Without a file the kernel keeps the place of origin there.
            let offset = if inode == 0 { 0 } else { page * PAGE };
            out.push(Extent { start, end, flags, offset, inode, watcher });
        }
        Ok(true)
    }
}

fn words(row: &[u8; ROW]) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(row.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::procmap::ProcMap;
    use memmap2::{Mmap, MmapMut};
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_glance_shows_the_mappings_that_the_kernel_lists() {
        let me = std::process::id() as i32;
        let Some(mut glance) = MappingGlance::open(me) else {
            println!("skipped: this kernel shows mappings one by one only");
            return;
        };
        let (mut shown, mut listed) = (Vec::new(), Vec::new());
        let procmap = ProcMap::open(me).expect("/proc/self/maps");
        // Other tests run beside this one.
        for tries in 1.. {
            glance.list(&mut shown).expect("a glance");
            procmap.list(&mut listed).expect("a list");
            let plain = |e: &Extent| {
                let offset = if e.inode == 0 { 0 } else { e.offset };
                (e.start, e.end, e.flags & 7, offset, e.inode, e.watcher)
            };
            if shown.iter().map(plain).eq(listed.iter().map(plain)) {
                break;
            }
            assert!(tries < 1000, "{shown:#x?} and {listed:#x?}");
        }
        assert!(shown.len() > 10);
    }

    /// Every other page is read-only, so that the kernel joins no two of them.
    fn pages(count: usize) -> Vec<(MmapMut, Mmap)> {
        let page = || MmapMut::map_anon(PAGE as usize).expect("a page");
        (0..count).map(|_| (page(), page().make_read_only().expect("a page"))).collect()
    }

    /// What does not fit into one read is shown once and not again and again.
    #[test]
    fn a_long_list_ends() {
        let Some(mut glance) = MappingGlance::open(std::process::id() as i32) else {
            println!("skipped: this kernel shows mappings one by one only");
            return;
        };
        for count in [700, 1400, 4000] {
            let own = pages(count);
            let mut shown = Vec::new();
            glance.list(&mut shown).expect("a glance");
            let first = |(one, two): &(MmapMut, Mmap)| [one.as_ptr(), two.as_ptr()];
            for start in own.iter().flat_map(first).map(|at| at as u64) {
                let found = shown.iter().filter(|e| e.start <= start && e.end > start).count();
                assert_eq!(found, 1, "{start:#x} of {}", shown.len());
            }
            assert!(shown.len() > count, "{}", shown.len());
        }
    }

    /// The kernel lets go of its lock when someone waits who changes mappings, and looks for its
    /// place afterwards.
    #[test]
    fn a_list_ends_while_others_change_mappings() {
        let Some(mut glance) = MappingGlance::open(std::process::id() as i32) else {
            println!("skipped: this kernel shows mappings one by one only");
            return;
        };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        drop(pages(8));
                    }
                });
            }
            let (mut shown, mut listed) = (Vec::new(), 0);
            for _ in 0..3000 {
                match glance.list(&mut shown) {
                    Ok(()) => listed += 1,
                    Err(e) => assert_eq!(e.source.raw_os_error(), Some(libc::EAGAIN), "{e}"),
                }
                assert!(shown.is_sorted_by_key(|e| e.start));
            }
            done.store(true, Ordering::Relaxed);
            assert!(listed > 0);
        });
    }
}
