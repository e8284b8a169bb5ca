//! Memory as checkpoints tell of it, beside the real memory of the stopped process.

use replicator::Epoch;
use replicator::capture::Boundary;
use replicator::image::pages::{Content, PAGE, PageSet};
use replicator::image::{Source, State};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Copies the real memory while the container is frozen, without a touch of what nobody has touched: a read would put
/// pages there.
#[derive(Default)]
pub struct Snapshot {
    pub pid: i32,
    pub wanted: bool,
    pub memory: Vec<(u64, Vec<u8>)>,
    /// The epochs that were sealed.
    pub sealed: Vec<Epoch>,
    /// What happens once, as soon as the container runs again.
    pub afterwards: Option<Box<dyn FnOnce()>>,
}

impl Boundary for Snapshot {
    fn hold_input(&mut self) {}
    fn release_input(&mut self) {
        if let Some(afterwards) = self.afterwards.take() {
            afterwards();
        }
    }
    fn seal(&mut self, epoch: Epoch) {
        self.sealed.push(epoch);
        if !self.wanted {
            return;
        }
        self.memory.clear();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid)).expect("maps");
        let open = |name| File::open(format!("/proc/{}/{name}", self.pid)).expect(name);
        let [mem, pagemap] = ["mem", "pagemap"].map(open);
        for line in maps.lines() {
            if line.contains("[v") || line.split_whitespace().nth(1).is_some_and(|p| p == "---p") {
                continue;
            }
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let start = u64::from_str_radix(start, 16).unwrap();
            let end = u64::from_str_radix(end, 16).unwrap();
            let is_anonymous = line.split_whitespace().nth(4) == Some("0");
            let mut bytes = vec![0; (end - start) as usize];
            let read = |page: u64, bytes: &mut [u8]| {
                is_anonymous && !is_there(&pagemap, page) || mem.read_exact_at(bytes, page).is_ok()
            };
            let mut pages = (start..end).step_by(PAGE).zip(bytes.chunks_mut(PAGE));
            if pages.all(|(page, bytes)| read(page, bytes)) {
                self.memory.push((start, bytes));
            }
        }
    }
}

/// Whether there is a page at this address. Where the kernel keeps only that a page would be protected it shows one that
/// was swapped out, which happens to none of these tests.
fn is_there(pagemap: &File, address: u64) -> bool {
    let mut entry = [0; 8];
    pagemap.read_exact_at(&mut entry, address / PAGE as u64 * 8).expect("its entry");
    u64::from_ne_bytes(entry) >> 63 != 0
}

/// Of struct rseq: where cpu_id_start, cpu_id, node_id and mm_cid are.
const NUMBERS: [u64; 4] = [0, 4, 20, 24];

/// The pages of the first process.
#[derive(Default)]
pub struct Shadow(HashMap<u64, Box<[u8]>>);

impl Shadow {
    pub fn apply(&mut self, state: &State, pages: &PageSet) {
        for m in state.processes[0].mappings.iter().filter(|m| m.fresh) {
            self.0.retain(|at, _| *at < m.start || *at >= m.end);
        }
        for run in pages.runs.iter().filter(|run| run.process == 0) {
            for i in 0..u64::from(run.count) {
                let address = run.start + i * PAGE as u64;
                match run.content {
                    Content::Data(at) => {
                        let at = at + i as usize * PAGE;
                        self.0.insert(address, pages.bytes[at..at + PAGE].into());
                    }
                    Content::Dropped => {
                        self.0.remove(&address);
                    }
                }
            }
        }
    }

    /// Pages that differ from the real memory, but for the numbers of processors that the kernel writes when a
    /// thread goes on (rseq(2)), and writes anew wherever it is restored.
    pub fn wrong(&self, state: &State, real: &[(u64, Vec<u8>)]) -> (usize, usize) {
        let (mut compared, mut wrong) = (0, 0);
        let rseqs = state.processes[0].threads.iter().filter_map(|t| t.rseq);
        let numbers: Vec<u64> = rseqs.flat_map(|r| NUMBERS.map(|at| r.address + at)).collect();
        for (start, bytes) in real {
            for (i, page) in bytes.chunks(PAGE).enumerate() {
                let address = start + (i * PAGE) as u64;
                let Some(mapping) = state.processes[0]
                    .mappings
                    .iter()
                    .find(|m| (m.start..m.end).contains(&address))
                else {
                    continue;
                };
                let is_number = |at: usize| numbers.contains(&((address + at as u64) / 4 * 4));
                let differ = |(at, (a, b)): (usize, (&u8, &u8))| a != b && !is_number(at);
                let same = match self.0.get(&address) {
                    Some(ours) => **ours == *page || !ours.iter().zip(page).enumerate().any(differ),
                    None if mapping.source == Source::Anonymous => page.iter().all(|b| *b == 0),
                    None => continue,
                };
                compared += 1;
                wrong += usize::from(!same);
                if !same {
                    let at = self
                        .0
                        .get(&address)
                        .map(|ours| ours.iter().zip(page).position(|(ours, real)| ours != real));
                    println!("wrong: {address:#x}, from byte {at:?}, of {mapping:x?}");
                }
            }
        }
        (compared, wrong)
    }
}
