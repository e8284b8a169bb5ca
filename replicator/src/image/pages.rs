//! The pages of a checkpoint.

/// Size of a page in bytes.
pub const PAGE: usize = 4096;

/// What happened to a run of pages since the checkpoint before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// New contents, at this byte offset of [`PageSet::bytes`].
    Data(usize),
    /// The pages were given back (madvise(2) MADV_DONTNEED): a private anonymous page reads as
    /// zero, a private file page as the file, an object's page as zero.
    Dropped,
}

/// Adjacent pages of one owner with one kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Whose pages: index of the process in [`super::State::processes`], or behind those of the
    /// object in [`super::State::objects`].
    pub process: u32,
    /// Address of the first page; in an object, its offset.
    pub start: u64,
    /// Number of pages.
    pub count: u32,
    /// What they hold.
    pub content: Content,
}

/// Pages of one checkpoint. Runs stand in the order in which they were taken; where two cover
/// the same page, the later holds. The buffers are kept and used again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// The runs.
    pub runs: Vec<Run>,
    /// Contents of all data runs.
    pub bytes: Vec<u8>,
}

impl PageSet {
    /// Empties the set and keeps its memory.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.bytes.clear();
    }

    /// Number of pages with contents.
    pub fn pages(&self) -> usize {
        self.bytes.len() / PAGE
    }
}

/// Some bytes of a page, against its version in the checkpoint before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// As in a [`Run`]. Only processes are edited, no objects.
    pub process: u32,
    /// Address of the first byte; no edit reaches beyond its page.
    pub start: u64,
    /// Where its bytes begin in [`Edits::bytes`].
    pub at: usize,
    /// Number of bytes. None: the page is as before.
    pub len: usize,
}

/// Pages of one checkpoint of which little has changed. Edits of one page stand in the order in which they
/// were taken, and all before what a [`PageSet`] of the same checkpoint says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    /// The edits.
    pub list: Vec<Edit>,
    /// Contents of all of them.
    pub bytes: Vec<u8>,
}

impl Edits {
    /// The bytes of an edit of the list.
    pub fn of(&self, edit: &Edit) -> &[u8] {
        &self.bytes[edit.at..][..edit.len]
    }
}

impl Edit {
    /// Address of its page.
    pub fn page(&self) -> u64 {
        self.start - self.start % PAGE as u64
    }

    /// Its place in the page.
    pub fn offset(&self) -> usize {
        self.start as usize % PAGE
    }
}
