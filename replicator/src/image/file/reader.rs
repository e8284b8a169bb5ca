//! Reading an image, section by section.

use super::section::{self, Fault, FileError, HEAD, Kind};
use super::{End, FORMAT, MAGIC};
use crate::image::info::Info;
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::image::{Process, State};
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// What an image holds in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the file.
    pub bytes: u64,
    /// Sections.
    pub sections: u32,
    /// Pages with contents.
    pub pages: u64,
}

/// Reads an image from its start.
pub struct Reader<R> {
    source: R,
    at: u64,
    index: u32,
    raw: Vec<u8>,
    digest: Box<Xxh3>,
    pages: u64,
    info: Info,
    state: State,
    summary: Option<Summary>,
}

impl Reader<BufReader<File>> {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(|e| FileError::new(0, e.into()))?;
        Self::begin(BufReader::with_capacity(1 << 20, file))
    }
}

impl<R: Read> Reader<R> {
    /// Reads header, Info, Objects and all of Process.
    pub fn begin(mut source: R) -> Result<Self, FileError> {
        let mut header = Vec::new();
        (&mut source).take(16).read_to_end(&mut header).map_err(|e| FileError::new(0, e.into()))?;
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|n| header[i + n]));
        if header.len() < 16 || header[..8] != MAGIC {
            return Err(FileError::new(0, Fault::NoImage));
        }
        if xxh3_64(&header[..12]) as u32 != word(12) {
            return Err(FileError::new(12, Fault::Header));
        }
        if word(8) != FORMAT {
            return Err(FileError::new(8, Fault::Format { found: word(8) }));
        }
        let mut me = Self {
            source,
            at: 16,
            index: 0,
            raw: Vec::new(),
            digest: Box::default(),
            pages: 0,
            info: Info::default(),
            state: State::default(),
            summary: None,
        };
        me.digest.update(&header);
        me.info = me.expect(Kind::Info)?;
        me.state = me.expect(Kind::Objects)?;
        if !me.state.processes.is_empty() {
            return Err(me.malformed(Kind::Objects, "it holds processes".into()));
        }
        for _ in 0..me.info.processes {
            let process: Process = me.expect(Kind::Process)?;
            if me.state.processes.iter().any(|p| p.pid == process.pid) {
                let why = format!("pid {} is there twice", process.pid);
                return Err(me.out_of_place(Kind::Process, why));
            }
            me.state.processes.push(process);
        }
        me.check()?;
        Ok(me)
    }

    /// What the image says of itself.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The state of the tree.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What it holds in all, once [`Reader::next_pages`] has come to the end.
    pub fn summary(&self) -> Option<Summary> {
        self.summary
    }

    /// Reads the next pages into `out`, instead of what was there; false at the end of the image,
    /// which is found whole then.
    pub fn next_pages(&mut self, out: &mut PageSet) -> Result<bool, FileError> {
        out.clear();
        if self.summary.is_some() {
            return Ok(false);
        }
        match self.next()? {
            Some(Kind::Pages) => {
                self.take_pages(out)?;
                Ok(true)
            }
            Some(Kind::End) => {
                let end: End = self.decode(Kind::End)?;
                self.finish(&end)?;
                Ok(false)
            }
            Some(kind) => Err(self.out_of_place(kind, "it is doubled, or comes too late".into())),
            None => Err(self.missing(Kind::End, "the file ends")),
        }
    }

    /// Reads and checks all that is left.
    pub fn verify(mut self) -> Result<Summary, FileError> {
        let mut pages = PageSet::default();
        while self.next_pages(&mut pages)? {}
        Ok(self.summary.unwrap_or_default())
    }

    /// The next section is in `raw` afterwards, and `at` and `index` are those of the one behind.
    fn next(&mut self) -> Result<Option<Kind>, FileError> {
        let kind = section::read(&mut self.source, self.at, self.index, &mut self.raw)?;
        if let Some(kind) = kind {
            if kind != Kind::End {
                self.digest.update(&self.raw);
            }
            self.at += self.raw.len() as u64;
            self.index += 1;
        }
        Ok(kind)
    }

    fn expect<T: DeserializeOwned>(&mut self, wanted: Kind) -> Result<T, FileError> {
        match self.next()? {
            Some(kind) if kind == wanted => self.decode(kind),
            Some(kind) => {
                let mut error = self.missing(wanted, &format!("{kind:?} stands in its place"));
                error.at = self.start();
                Err(error)
            }
            None => Err(self.missing(wanted, "the file ends")),
        }
    }

    fn decode<T: DeserializeOwned>(&self, kind: Kind) -> Result<T, FileError> {
        match postcard::take_from_bytes(&self.raw[HEAD..]) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => {
                Err(self.malformed(kind, format!("{} bytes are left over in it", rest.len())))
            }
            Err(e) => Err(self.malformed(kind, e.to_string())),
        }
    }

    /// Offset of the section in `raw`.
    fn start(&self) -> u64 {
        self.at - self.raw.len() as u64
    }

    fn malformed(&self, kind: Kind, what: String) -> FileError {
        FileError::new(self.start(), Fault::Payload { index: self.index - 1, kind, what })
    }

    fn out_of_place(&self, kind: Kind, why: String) -> FileError {
        FileError::new(self.start(), Fault::OutOfPlace { index: self.index - 1, kind, why })
    }

    fn missing(&self, kind: Kind, why: &str) -> FileError {
        FileError::new(self.at, Fault::Missing { kind, why: why.into() })
    }

    fn take_pages(&mut self, out: &mut PageSet) -> Result<(), FileError> {
        let payload = &self.raw[HEAD..];
        let owners = self.state.processes.len() + self.state.objects.len();
        let parsed = parse_pages(payload, owners, out);
        parsed.map_err(|what| self.malformed(Kind::Pages, what))?;
        self.pages += out.pages() as u64;
        Ok(())
    }

    fn finish(&mut self, end: &End) -> Result<(), FileError> {
        if end.digest != self.digest.digest128() {
            return Err(FileError::new(self.start(), Fault::Digest));
        }
        if (end.sections, end.pages) != (self.index - 1, self.pages) {
            let what = format!(
                "it counts {} sections and {} pages, there are {} and {}",
                end.sections,
                end.pages,
                self.index - 1,
                self.pages
            );
            return Err(self.malformed(Kind::End, what));
        }
        let mut one = [0];
        match self.source.read(&mut one) {
            Ok(0) => {}
            Ok(_) => return Err(FileError::new(self.at, Fault::LeftOver)),
            Err(e) => return Err(FileError::new(self.at, e.into())),
        }
        let summary = Summary { bytes: self.at, sections: self.index, pages: self.pages };
        self.summary = Some(summary);
        Ok(())
    }

    /// What one section says of another.
    fn check(&self) -> Result<(), FileError> {
        let fail = |what: String| Err(self.malformed(Kind::Process, what));
        let State { processes, descriptions, .. } = &self.state;
        match processes.first() {
            None => return Err(self.missing(Kind::Process, "the image holds no process")),
            Some(p) if p.pid != self.info.root => {
                return fail(format!("pid {} is not the root {}", p.pid, self.info.root));
            }
            Some(_) => {}
        }
        for (i, p) in processes.iter().enumerate() {
            if i > 0 && !processes[..i].iter().any(|other| other.pid == p.ppid) {
                return fail(format!("the parent of pid {} does not stand before it", p.pid));
            }
            if let Some(fd) = p.fds.iter().find(|f| f.description as usize >= descriptions.len()) {
                return fail(format!(
                    "descriptor {} of pid {} refers to nothing",
                    fd.number, p.pid
                ));
            }
        }
        Ok(())
    }
}

fn parse_pages(payload: &[u8], owners: usize, out: &mut PageSet) -> Result<(), String> {
    const RUN: usize = 13;
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(payload.get(at..at + 4)?.try_into().ok()?))
    };
    let (Some(process), Some(count)) = (word(0), word(4)) else {
        return Err("it is too short".into());
    };
    if process as usize >= owners {
        return Err(format!("owner {process} of {owners}"));
    }
    let end = (count as usize).checked_mul(RUN).and_then(|n| n.checked_add(8));
    let Some(table) = end.and_then(|end| payload.get(8..end)) else {
        return Err(format!("{count} runs do not fit"));
    };
    let bytes = &payload[8 + table.len()..];
    let mut at = 0;
    for entry in table.chunks_exact(RUN) {
        let start = u64::from_le_bytes(std::array::from_fn(|n| entry[n]));
        let count = u32::from_le_bytes(std::array::from_fn(|n| entry[8 + n]));
        let len = u64::from(count) * PAGE as u64;
        if start % PAGE as u64 != 0 || start.checked_add(len).is_none() {
            return Err(format!("{count} pages at {start:#x}"));
        }
        let content = match entry[12] {
            0 => Content::Data(at),
            1 => Content::Dropped,
            other => return Err(format!("content {other}")),
        };
        if entry[12] == 0 {
            at += len as usize;
        }
        out.runs.push(Run { process, start, count, content });
    }
    if at != bytes.len() {
        return Err(format!("{} bytes of pages instead of {at}", bytes.len()));
    }
    out.bytes.extend_from_slice(bytes);
    Ok(())
}
