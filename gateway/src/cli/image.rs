//! `nilicon image`: what is in an image, how two differ, and whether one is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use anyhow::{Context, Result};
use replicator::image::file::Reader;
use replicator::image::info::Info;
use replicator::image::pages::{Content, PAGE, PageSet};
use replicator::image::{Process, State};
use serde::Serialize;
use serde_json::{Value, json};

use super::args::{ImageVerb, Output};
use super::numbers::{bytes, grouped};
use super::objects::{self, Object};

/// `nilicon image`. Gives whether all is well (`verify`) or the same (`diff`).
pub(super) fn image(verb: &ImageVerb) -> Result<bool> {
    match verb {
        ImageVerb::Show { file, output } => show(file, output.output).map(|()| true),
        ImageVerb::Verify { file, output } => verify(file, output.output),
        ImageVerb::Diff { one, other, output } => diff(one, other, output.output),
    }
}

/// Pages of one process: address and a hash of the contents, none if they were given back.
type Pages = BTreeMap<u64, Option<u64>>;

/// An image without the contents of its pages.
struct Image {
    info: Info,
    state: State,
    bytes: u64,
    sections: u32,
    pages: Vec<Pages>,
}

fn load(path: &Path) -> Result<Image> {
    let what = || format!("cannot read {}", path.display());
    let mut reader = Reader::open(path).with_context(what)?;
    // Of each process, and behind them of each object that several may share.
    let owners = reader.state().processes.len() + reader.state().objects.len();
    let mut pages = vec![Pages::new(); owners];
    let mut part = PageSet::default();
    while reader.next_pages(&mut part).with_context(what)? {
        for run in &part.runs {
            for i in 0..u64::from(run.count) {
                let hash = match run.content {
                    Content::Data(at) => {
                        let mut hasher = DefaultHasher::new();
                        let at = at + i as usize * PAGE;
                        part.bytes[at..at + PAGE].hash(&mut hasher);
                        Some(hasher.finish())
                    }
                    Content::Dropped => None,
                };
                pages[run.process as usize].insert(run.start + i * PAGE as u64, hash);
            }
        }
    }
    let summary = reader.summary().unwrap_or_default();
    let (info, state) = (reader.info().clone(), reader.state().clone());
    Ok(Image { info, state, bytes: summary.bytes, sections: summary.sections, pages })
}

/// A process, for programs.
#[derive(Serialize)]
struct ProcessView {
    pid: i32,
    ppid: i32,
    pgid: i32,
    sid: i32,
    name: String,
    exe: String,
    cwd: String,
    threads: usize,
    pages: usize,
    objects: Vec<Object>,
}

fn view(image: &Image, index: usize, process: &Process) -> ProcessView {
    ProcessView {
        pid: process.pid,
        ppid: process.ppid,
        pgid: process.pgid,
        sid: process.sid,
        name: process.threads.first().map_or_else(String::new, |t| t.comm.clone()),
        exe: process.exe.clone(),
        cwd: process.cwd.clone(),
        threads: process.threads.len(),
        pages: image.pages[index].values().filter(|hash| hash.is_some()).count(),
        objects: objects::of_process(&image.state, process),
    }
}

fn show(path: &Path, output: Output) -> Result<()> {
    let image = load(path)?;
    let views: Vec<ProcessView> =
        image.state.processes.iter().enumerate().map(|(i, p)| view(&image, i, p)).collect();
    let pages: usize = views.iter().map(|v| v.pages).sum();
    if output == Output::Json {
        let whole = json!({
            "info": image.info,
            "bytes": image.bytes,
            "sections": image.sections,
            "pages": pages,
            "descriptions": image.state.descriptions.len(),
            "processes": views,
        });
        println!("{}", serde_json::to_string_pretty(&whole)?);
        return Ok(());
    }
    let info = &image.info;
    println!("{} ({}, {} sections)", path.display(), bytes(image.bytes), image.sections);
    println!("  command     {}", info.command);
    println!("  taken       on {}, Linux {}, nilicon {}", info.host, info.kernel, info.release);
    let own: Vec<&str> = info.namespaces.iter().filter(|n| n.own).map(|n| n.kind.name()).collect();
    let own = if own.is_empty() { "those of the host".to_owned() } else { own.join(", ") };
    println!("  namespaces  {own}");
    println!("  memory      {} pages ({})", grouped(pages as u64), bytes((pages * PAGE) as u64));
    for v in &views {
        let depth = depth(&image.state, v.pid);
        println!();
        println!(
            "{:indent$}pid {} {} ({} threads, {} pages; parent {}, group {}, session {})",
            "",
            v.pid,
            v.name,
            v.threads,
            v.pages,
            v.ppid,
            v.pgid,
            v.sid,
            indent = 2 * depth
        );
        for object in &v.objects {
            println!("{:indent$}  {:<11} {}", "", object.kind, object.what, indent = 2 * depth);
        }
    }
    Ok(())
}

/// How many ancestors of a process are in the tree.
fn depth(state: &State, pid: i32) -> usize {
    let parent = |pid| state.processes.iter().find(|p| p.pid == pid).map(|p| p.ppid);
    let mut depth = 0;
    let mut at = pid;
    while let Some(next) = parent(at)
        && depth < state.processes.len()
        && parent(next).is_some()
    {
        (at, depth) = (next, depth + 1);
    }
    depth
}

fn verify(path: &Path, output: Output) -> Result<bool> {
    let verdict = Reader::open(path).and_then(|reader| {
        let processes = reader.state().processes.len();
        reader.verify().map(|summary| (processes, summary))
    });
    match (verdict, output) {
        (Ok((processes, s)), Output::Text) => {
            println!(
                "{}: whole; {processes} processes, {} pages, {} sections, {}",
                path.display(),
                grouped(s.pages),
                s.sections,
                bytes(s.bytes)
            );
            Ok(true)
        }
        (Ok((processes, s)), Output::Json) => {
            let (pages, sections, bytes) = (s.pages, s.sections, s.bytes);
            let whole = json!({"whole": true, "why": null, "processes": processes,
                "pages": pages, "sections": sections, "bytes": bytes});
            println!("{whole:#}");
            Ok(true)
        }
        (Err(e), Output::Json) => {
            println!("{:#}", json!({"whole": false, "why": e.to_string(), "at": e.at}));
            Ok(false)
        }
        (Err(e), Output::Text) => {
            println!("{}: NOT WHOLE: {e}", path.display());
            Ok(false)
        }
    }
}

/// One difference: where, and what stands there in each.
#[derive(Debug, PartialEq, Serialize)]
struct Difference {
    place: String,
    one: Value,
    other: Value,
}

fn diff(one: &Path, other: &Path, output: Output) -> Result<bool> {
    let (a, b) = (load(one)?, load(other)?);
    let mut found = Vec::new();
    // When and where an image was taken is no difference of the trees.
    let strip = |state: &State| -> Result<Value> {
        let mut value = serde_json::to_value(State { processes: Vec::new(), ..state.clone() })?;
        if let Some(map) = value.as_object_mut() {
            map.remove("clocks");
        }
        Ok(value)
    };
    compare("", &strip(&a.state)?, &strip(&b.state)?, &mut found);
    let pids: BTreeSet<i32> =
        a.state.processes.iter().chain(&b.state.processes).map(|p| p.pid).collect();
    for pid in pids {
        let at = |image: &Image| image.state.processes.iter().position(|p| p.pid == pid);
        let place = format!("pid {pid}");
        match (at(&a), at(&b)) {
            (Some(i), Some(j)) => {
                let (p, q) = (&a.state.processes[i], &b.state.processes[j]);
                compare(&place, &serde_json::to_value(p)?, &serde_json::to_value(q)?, &mut found);
                let changed = a.pages[i]
                    .iter()
                    .filter(|(at, h)| b.pages[j].get(at).is_some_and(|other| other != *h));
                let changed = changed.count();
                let only = |x: &Pages, y: &Pages| x.keys().filter(|k| !y.contains_key(k)).count();
                let (gone, new) = (only(&a.pages[i], &b.pages[j]), only(&b.pages[j], &a.pages[i]));
                if changed + gone + new > 0 {
                    found.push(Difference {
                        place: format!("{place} pages"),
                        one: json!({"only_here": gone, "other_contents": changed}),
                        other: json!({"only_here": new, "other_contents": changed}),
                    });
                }
            }
            (i, j) => {
                found.push(Difference { place, one: i.is_some().into(), other: j.is_some().into() })
            }
        }
    }
    if output == Output::Json {
        let whole = json!({"same": found.is_empty(), "differences": found});
        println!("{}", serde_json::to_string_pretty(&whole)?);
    } else if found.is_empty() {
        println!("the same tree");
    } else {
        for d in &found {
            println!("{}: {} | {}", d.place, d.one, d.other);
        }
    }
    Ok(found.is_empty())
}

/// Longest list that is compared item by item; longer ones are contents.
const LIST: usize = 64;

/// Compares two values of the same type, whatever it is.
fn compare(place: &str, one: &Value, other: &Value, found: &mut Vec<Difference>) {
    let inside = |key: &str| match place {
        "" => key.to_owned(),
        _ => format!("{place} {key}"),
    };
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let of = |map: &serde_json::Map<String, Value>| {
                    map.get(key).cloned().unwrap_or(Value::Null)
                };
                compare(&inside(key), &of(a), &of(b), found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            let numbers = |list: &[Value]| list.len() > LIST && list.iter().all(Value::is_number);
            if a == b {
            } else if numbers(a) || numbers(b) {
                let len = |list: &[Value]| json!(format!("{} numbers", list.len()));
                found.push(Difference { place: place.to_owned(), one: len(a), other: len(b) });
            } else {
                for i in 0..a.len().max(b.len()) {
                    let of = |list: &[Value]| list.get(i).cloned().unwrap_or(Value::Null);
                    compare(&inside(&i.to_string()), &of(a), &of(b), found);
                }
            }
        }
        (a, b) if a == b => {}
        (a, b) => {
            found.push(Difference { place: place.to_owned(), one: a.clone(), other: b.clone() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_by_their_place() {
        let one = json!({"a": 1, "list": [{"b": 2}], "same": [1, 2], "blob": vec![0; 100]});
        let other = json!({"a": 1, "list": [{"b": 3}, 4], "same": [1, 2], "blob": vec![1; 100]});
        let mut found = Vec::new();
        compare("pid 7", &one, &other, &mut found);
        let places: Vec<&str> = found.iter().map(|d| d.place.as_str()).collect();
        assert_eq!(places, ["pid 7 blob", "pid 7 list 0 b", "pid 7 list 1"]);
    }
}
