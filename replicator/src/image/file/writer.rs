//! Writing an image: [`Writer`] makes the bytes, [`Draft`] the file, which gets its name when it
//! is complete and on the disk.

use super::section::{self, Kind};
use super::{End, FORMAT, MAGIC, PAGES_IN_SECTION};
use crate::image::State;
use crate::image::info::Info;
use crate::image::pages::{Content, PAGE, PageSet, Run};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Most runs in one section of pages.
const RUNS_IN_SECTION: usize = 32 << 10;

/// Writes the sections of one image in order.
pub struct Writer<W> {
    out: W,
    digest: Box<Xxh3>,
    buffer: Vec<u8>,
    sections: u32,
    pages: u64,
}

impl<W: Write> Writer<W> {
    /// Begins an image: header, Info, Objects, Process. `info.processes` is set here.
    pub fn begin(out: W, info: &Info, state: &mut State) -> io::Result<Self> {
        let mut me =
            Self { out, digest: Box::default(), buffer: Vec::new(), sections: 0, pages: 0 };
        let mut header = MAGIC.to_vec();
        header.extend(FORMAT.to_le_bytes());
        header.extend((xxh3_64(&header) as u32).to_le_bytes());
        me.put(&header)?;
        let processes = std::mem::take(&mut state.processes);
        let info = Info { processes: processes.len() as u32, ..info.clone() };
        let written = me.section(Kind::Info, &info).and_then(|()| {
            me.section(Kind::Objects, state)?;
            processes.iter().try_for_each(|p| me.section(Kind::Process, p))
        });
        state.processes = processes;
        written.map(|()| me)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.digest.update(bytes);
        self.out.write_all(bytes)
    }

    fn section<T: Serialize>(&mut self, kind: Kind, value: &T) -> io::Result<()> {
        let payload = postcard::to_allocvec(value).map_err(io::Error::other)?;
        self.raw(kind, &payload)
    }

    fn raw(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        if payload.len() > kind.cap() {
            let (len, cap) = (payload.len(), kind.cap());
            return Err(io::Error::other(format!("{kind:?} of {len} bytes; the limit is {cap}")));
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        section::encode(&mut buffer, kind, self.sections, payload);
        self.sections += 1;
        let put = self.put(&buffer);
        self.buffer = buffer;
        put
    }

    /// Writes pages, in as many sections as it takes. May be called several times; runs hold the
    /// index of their process.
    pub fn pages(&mut self, pages: &PageSet) -> io::Result<()> {
        let mut part = Part::default();
        for run in &pages.runs {
            let Content::Data(at) = run.content else {
                part.make_room(self, run.process)?;
                part.runs.push(*run);
                continue;
            };
            let end = at + run.count as usize * PAGE;
            let bytes = pages.bytes.get(at..end);
            let mut bytes = bytes.ok_or_else(|| io::Error::other("a run without contents"))?;
            let mut start = run.start;
            while !bytes.is_empty() {
                part.make_room(self, run.process)?;
                let room = (PAGES_IN_SECTION - part.bytes.len()).min(bytes.len());
                let (now, later) = bytes.split_at(room);
                let content = Content::Data(part.bytes.len());
                let count = (now.len() / PAGE) as u32;
                part.runs.push(Run { process: run.process, start, count, content });
                part.bytes.extend_from_slice(now);
                start += now.len() as u64;
                bytes = later;
            }
        }
        part.flush(self)
    }

    /// Writes the last section.
    pub fn finish(mut self) -> io::Result<W> {
        let end =
            End { sections: self.sections, pages: self.pages, digest: self.digest.digest128() };
        self.section(Kind::End, &end)?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Pages of one process on their way into a section.
#[derive(Default)]
struct Part {
    runs: Vec<Run>,
    bytes: Vec<u8>,
}

impl Part {
    /// Makes sure that one more run of this process fits.
    fn make_room<W: Write>(&mut self, out: &mut Writer<W>, process: u32) -> io::Result<()> {
        let other = self.runs.first().is_some_and(|r| r.process != process);
        if other || self.bytes.len() >= PAGES_IN_SECTION || self.runs.len() >= RUNS_IN_SECTION {
            self.flush(out)?;
        }
        Ok(())
    }

    fn flush<W: Write>(&mut self, out: &mut Writer<W>) -> io::Result<()> {
        let Some(first) = self.runs.first() else { return Ok(()) };
        let mut payload = Vec::with_capacity(8 + 13 * self.runs.len() + self.bytes.len());
        payload.extend(first.process.to_le_bytes());
        payload.extend((self.runs.len() as u32).to_le_bytes());
        for run in &self.runs {
            payload.extend(run.start.to_le_bytes());
            payload.extend(run.count.to_le_bytes());
            payload.push(u8::from(run.content == Content::Dropped));
        }
        payload.extend_from_slice(&self.bytes);
        out.pages += (self.bytes.len() / PAGE) as u64;
        self.runs.clear();
        self.bytes.clear();
        out.raw(Kind::Pages, &payload)
    }
}

/// A file that is being written under another name. Dropping it removes it.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    draft: PathBuf,
    kept: bool,
}

impl Draft {
    /// Makes the draft of a file, readable by its owner alone: an image holds all the secrets
    /// of its programs.
    pub fn create(path: &Path) -> io::Result<(Self, BufWriter<File>)> {
        use std::os::unix::fs::OpenOptionsExt;
        let name = path.file_name().ok_or_else(|| io::Error::other("it names no file"))?;
        let name = format!(".{}.{}", name.to_string_lossy(), std::process::id());
        let draft = path.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        let me = Self { path: path.to_owned(), draft, kept: false };
        Ok((me, BufWriter::with_capacity(1 << 20, file)))
    }

    /// Brings the file to the disk and gives it its name.
    pub fn keep(mut self, file: BufWriter<File>) -> io::Result<()> {
        file.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        std::fs::rename(&self.draft, &self.path)?;
        self.kept = true;
        let dir = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            let _ = std::fs::remove_file(&self.draft);
        }
    }
}
