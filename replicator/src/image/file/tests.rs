//! The format is pinned by a golden file; damage of any kind is a clean error.

use super::section::{self, Fault, HEAD};
use super::{Draft, FileError, Kind, Reader, Summary, Writer};
use crate::image::info::{Info, Namespace, NamespaceKind, TmpfsMount};
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::image::{Description, Fd, Process, State, Thread};
use proptest::prelude::*;

fn info() -> Info {
    Info {
        release: "0.1.0".into(),
        taken_ms: 1_700_000_000_000,
        kernel: "6.18".into(),
        boot: "a boot".into(),
        host: "a host".into(),
        root: 4711,
        host_pid: 4711,
        command: "sleep 5".into(),
        processes: 2,
        namespaces: vec![Namespace { kind: NamespaceKind::Pid, own: true, inode: 7 }],
        notes: vec!["a note".into()],
        tmpfs: vec![TmpfsMount { point: "/tmp".into(), ..TmpfsMount::default() }],
    }
}

/// A tree whose root is not pid 1.
fn state() -> State {
    let process = |pid, ppid| Process {
        pid,
        ppid,
        fds: vec![Fd { number: 3, description: 0, close_on_exec: false }],
        threads: vec![Thread { tid: pid, ..Thread::default() }],
        ..Process::default()
    };
    State {
        processes: vec![process(4711, 0), process(4712, 4711)],
        descriptions: vec![Description {
            flags: 2,
            kind: crate::image::Kind::EventFd { count: 5, semaphore: false },
        }],
        ..State::default()
    }
}

fn pages() -> PageSet {
    let run = |process, start, count, content| Run { process, start, count, content };
    PageSet {
        runs: vec![
            run(0, 0x10000, 2, Content::Data(0)),
            run(0, 0x80000, 9, Content::Dropped),
            run(1, 0x10000, 1, Content::Data(2 * PAGE)),
        ],
        bytes: (0..3 * PAGE).map(|i| (i / 7) as u8).collect(),
    }
}

fn write(pages: &PageSet) -> Vec<u8> {
    let mut state = state();
    let mut writer = Writer::begin(Vec::new(), &info(), &mut state).expect("begun");
    writer.pages(pages).expect("pages");
    writer.finish().expect("finished")
}

fn read(mut bytes: &[u8]) -> Result<(State, PageSet, Summary), FileError> {
    let mut reader = Reader::begin(&mut bytes)?;
    let (mut all, mut part) = (PageSet::default(), PageSet::default());
    while reader.next_pages(&mut part)? {
        for run in &part.runs {
            let content = match run.content {
                Content::Data(at) => Content::Data(all.bytes.len() + at),
                Content::Dropped => Content::Dropped,
            };
            all.runs.push(Run { content, ..*run });
        }
        all.bytes.extend_from_slice(&part.bytes);
    }
    Ok((reader.state().clone(), all, reader.summary().expect("at the end")))
}

#[test]
fn what_is_written_is_read() {
    let bytes = write(&pages());
    let (state_read, pages_read, summary) = read(&bytes).expect("read");
    assert_eq!((state_read, pages_read), (state(), pages()));
    // Info, Objects, two processes, pages of each, End.
    assert_eq!(summary, Summary { bytes: bytes.len() as u64, sections: 7, pages: 3 });
}

#[test]
fn many_pages_come_in_many_sections_and_long_runs_are_cut() {
    let count = 3000;
    let run = Run { process: 0, start: 0x10_0000, count, content: Content::Data(0) };
    let bytes = (0..count as usize * PAGE).map(|i| (i / PAGE) as u8).collect();
    let pages = PageSet { runs: vec![run], bytes };
    let (_, back, summary) = read(&write(&pages)).expect("read");
    assert_eq!(back.bytes, pages.bytes);
    assert_eq!(back.runs.len(), 3);
    assert!(back.runs.windows(2).all(|w| w[0].start + u64::from(w[0].count) * 4096 == w[1].start));
    assert_eq!(summary.pages, u64::from(count));
}

/// A small image, byte for byte, and what it says. `NILICON_BLESS=1` writes the file anew. The types
/// behind it are pinned one by one in [`crate::image`]'s `format.txt`.
#[test]
fn the_format_is_pinned() {
    let bytes = write(&pages());
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/image/file/golden.bin");
    if std::env::var_os("NILICON_BLESS").is_some() {
        std::fs::write(path, &bytes).expect("written");
    }
    let golden = std::fs::read(path).expect("golden.bin");
    assert!(bytes == golden, "the format has changed: bump FORMAT or a section's version");
    let (state_read, pages_read, _) = read(&golden).expect("an image of this format is read");
    assert_eq!((state_read, pages_read), (state(), pages()));
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = write(&pages());
    for len in 0..bytes.len() {
        let error = read(&bytes[..len]).expect_err("cut");
        assert!(error.at <= len as u64, "{error} of {len}");
    }
}

#[test]
fn every_flipped_bit_is_an_error() {
    let bytes = write(&pages());
    let mut damaged = bytes.clone();
    for at in 0..bytes.len() {
        // Every bit of what is parsed, one bit of each byte of page contents.
        let bits = if at < 2048 || at % 512 < HEAD { 0..8 } else { at % 8..at % 8 + 1 };
        for bit in bits {
            damaged[at] ^= 1 << bit;
            assert!(read(&damaged).is_err(), "byte {at}, bit {bit}");
            damaged[at] = bytes[at];
        }
    }
}

/// The sections of a file, head included, without its header.
fn sections(bytes: &[u8]) -> Vec<(Kind, Vec<u8>)> {
    let mut source = &bytes[16..];
    let (mut all, mut raw, mut at) = (Vec::new(), Vec::new(), 16);
    while let Some(kind) = section::read(&mut source, at, all.len() as u32, &mut raw).unwrap() {
        at += raw.len() as u64;
        all.push((kind, raw[HEAD..].to_vec()));
    }
    all
}

/// A file of these sections, each sound by itself, numbered in order.
fn file(header: &[u8], sections: &[(Kind, Vec<u8>)]) -> Vec<u8> {
    let mut out = header[..16].to_vec();
    for (index, (kind, payload)) in sections.iter().enumerate() {
        section::encode(&mut out, *kind, index as u32, payload);
    }
    out
}

#[test]
fn sections_that_are_missing_doubled_or_left_over_are_named() {
    let bytes = write(&pages());
    let whole = sections(&bytes);
    assert!(read(&file(&bytes, &whole)).is_ok());
    for gone in 0..whole.len() {
        let mut less = whole.clone();
        let (kind, _) = less.remove(gone);
        let error = read(&file(&bytes, &less)).expect_err("a section is missing").to_string();
        let named = error.contains(&format!("{kind:?}")) || error.contains("digest");
        assert!(named && error.starts_with("at byte "), "{kind:?}: {error}");
    }
    for twice in 0..whole.len() {
        let mut more = whole.clone();
        more.insert(twice, whole[twice].clone());
        let error = read(&file(&bytes, &more)).expect_err("a section is doubled");
        assert!(error.at > 0, "{error}");
    }
    for at in 0..whole.len() - 1 {
        let mut swapped = whole.clone();
        swapped.swap(at, at + 1);
        assert!(read(&file(&bytes, &swapped)).is_err());
    }
    let mut longer = bytes.clone();
    longer.push(0);
    let error = read(&longer).expect_err("a byte more");
    assert!(matches!(error.fault, Fault::LeftOver) && error.at == bytes.len() as u64, "{error}");
}

#[test]
fn unknown_kinds_and_versions_are_named() {
    let bytes = write(&pages());
    let patch = |offset: usize, value: u16| {
        let mut patched = bytes.clone();
        patched[16 + offset..18 + offset].copy_from_slice(&value.to_le_bytes());
        let check = xxhash_rust::xxh3::xxh3_64(&patched[16..32]) as u32;
        patched[32..36].copy_from_slice(&check.to_le_bytes());
        read(&patched).expect_err("patched").to_string()
    };
    assert!(patch(4, 99).contains("unknown kind 99"), "{}", patch(4, 99));
    assert!(patch(6, 2).contains("version 2"), "{}", patch(6, 2));
}

#[test]
fn a_length_that_lies_allocates_nothing() {
    let bytes = write(&pages());
    let mut raw = Vec::new();
    let mut out = Vec::new();
    section::encode(&mut out, Kind::Objects, 0, &[1, 2, 3]);
    out[12..16].copy_from_slice(&(200u32 << 20).to_le_bytes());
    let check = xxhash_rust::xxh3::xxh3_64(&out[..16]) as u32;
    out[16..20].copy_from_slice(&check.to_le_bytes());
    let error = section::read(&mut out.as_slice(), 0, 0, &mut raw).expect_err("too short");
    assert!(matches!(error.fault, Fault::Truncated { .. }), "{error}");
    assert!(raw.capacity() <= 4 << 20, "{}", raw.capacity());
    // A list that claims to be long, within a sound section.
    let mut lying = sections(&bytes);
    lying[1].1 = vec![0, 0xff, 0xff, 0xff, 0xff, 0x0f];
    assert!(read(&file(&bytes, &lying)).is_err());
}

#[test]
fn a_draft_has_its_name_only_when_it_is_whole() {
    let dir = std::env::temp_dir().join(format!("nilicon-draft-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let path = dir.join("image");
    let count = || std::fs::read_dir(&dir).expect("a directory").count();
    let (draft, file) = Draft::create(&path).expect("a draft");
    assert!(!path.exists() && count() == 1);
    drop((draft, file));
    assert_eq!(count(), 0, "given up");
    let (draft, file) = Draft::create(&path).expect("a draft");
    draft.keep(file).expect("kept");
    assert!(path.exists() && count() == 1);
    std::fs::remove_dir_all(&dir).expect("removed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Payloads of any bytes in sound sections, and any changes to a sound file.
    #[test]
    fn no_bytes_make_the_reader_panic(
        at in any::<prop::sample::Index>(),
        junk in prop::collection::vec(any::<u8>(), 0..64),
        section in 0usize..7,
    ) {
        let bytes = write(&pages());
        let mut damaged = bytes.clone();
        let at = at.index(damaged.len());
        let end = (at + junk.len()).min(damaged.len());
        damaged.splice(at..end, junk.clone());
        if damaged != bytes {
            prop_assert!(read(&damaged).is_err());
        }
        let mut whole = sections(&bytes);
        whole[section].1 = junk;
        prop_assert!(read(&file(&bytes, &whole)).is_err());
    }
}
