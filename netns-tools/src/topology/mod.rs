//! Topology files: what a lab consists of, as YAML in the spirit of containerlab.
//!
//! [`Topology::load`] reads a file, and hands out only topologies that keep all rules (`check`):
//! every name that is mentioned exists, no interface or address is used twice, no address is
//! outside its subnet. A file that breaks a rule is refused with every place that does, by line
//! and column. [`schema`] describes the files to editors.

mod check;
mod error;
mod lookup;
mod model;
mod names;
mod spans;
mod units;
mod volumes;
mod worse;

use std::path::Path;
use std::sync::Arc;

use miette::NamedSource;

pub use error::{Problem, TopologyError};
pub use model::{
    ArbiterKind, Client, ClientProtocol, Container, Detector, Device, Embedded, Epochs, Event,
    Fault, Impair, Link, Node, NodeKind, OnBackupLoss, OnContainerLoss, OnUnprotectable, Protect,
    Ready, Topology, Witness, Workload,
};
pub use names::{Cidr, Endpoint, Mac, Target};
pub use units::{BadValue, BitRate, Period, Ratio, Size, SizeRange};
pub use volumes::{FsyncRule, Volume, VolumeKind, VolumeStart};

impl Topology {
    /// Reads and checks a topology file. Relative working directories are counted from where it
    /// lies.
    ///
    /// # Errors
    /// The file cannot be read, is not YAML, or breaks a rule.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TopologyError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|source| TopologyError::Read { path: path.to_owned(), source })?;
        let mut topology = Self::parse(&path.display().to_string(), &text)?;
        let directory = std::path::absolute(path)
            .map_err(|source| TopologyError::Read { path: path.to_owned(), source })?;
        for container in topology.containers.values_mut() {
            let workdir = directory.with_file_name(&container.workdir);
            container.workdir = workdir.to_string_lossy().into_owned();
        }
        Ok(topology)
    }

    /// Reads and checks the text of a topology; `name` is what errors call it.
    ///
    /// # Errors
    /// The text is not YAML, or breaks a rule.
    pub fn parse(name: &str, text: &str) -> Result<Self, TopologyError> {
        let source = Arc::new(NamedSource::new(name, text.to_owned()).with_language("yaml"));
        let problems = match serde_saphyr::from_str::<Self>(text) {
            Err(_) if is_empty(text) => vec![empty_problem(&source)],
            Err(error) => vec![syntax_problem(&source, &error)],
            Ok(topology) => {
                let problems = check::problems(&topology, &source);
                if problems.is_empty() {
                    return Ok(topology);
                }
                problems
            }
        };
        Err(TopologyError::Invalid { name: name.to_owned(), problems })
    }

    /// Checks a topology that was made or changed by a program.
    ///
    /// # Errors
    /// It breaks a rule; the places are those in its text as JSON.
    pub fn check(&self) -> Result<(), TopologyError> {
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        Self::parse(&self.name, &text).map(|_| ())
    }
}

/// The JSON schema of topology files.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Topology).to_value()
}

/// Whether a YAML text has nothing but blanks, comments and document marks.
fn is_empty(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .all(|line| line.is_empty() || line.starts_with('#') || line == "---" || line == "...")
}

fn empty_problem(source: &Arc<NamedSource<String>>) -> Problem {
    let help = "a topology has a name and nodes at least; `nilicon schema` describes all keys";
    let place = spans::Place { offset: 0, len: 0 };
    Problem::new(source, place, "the file is empty".to_owned(), Some(help.to_owned()))
}

/// What the YAML reader found, with a suggestion for misspelt words.
fn syntax_problem(source: &Arc<NamedSource<String>>, error: &serde_saphyr::Error) -> Problem {
    use serde_saphyr::Error;

    let error = error.without_snippet();
    let mut place = error
        .location()
        .map_or(spans::Place { offset: 0, len: 0 }, |at| spans::Place::of(at, source.inner()));
    let (message, mut help) = match error {
        Error::SerdeUnknownField { field, expected, .. } => {
            (format!("there is no key `{field}` here"), suggest(field, expected))
        }
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            (format!("`{variant}` is not known here"), suggest(variant, expected))
        }
        Error::SerdeMissingField { field, .. } => (format!("the key `{field}` is missing"), None),
        Error::Message { msg, .. } => (msg.clone(), None),
        other => (plain_message(other), None),
    };
    // The reader notices that at the end, and points at the beginning.
    if message.starts_with("unclosed") && place.offset == 0 {
        place = spans::Place { offset: source.inner().trim_end().len(), len: 0 };
        help = Some("the file ends before it is closed".to_owned());
    }
    Problem::new(source, place, message, help)
}

/// The message without the position, which the diagnostic shows itself.
fn plain_message(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    let end = first.find(" at line ").unwrap_or(first.len());
    first[..end].trim_start_matches("error: ").to_owned()
}

fn suggest(word: &str, known: &[&'static str]) -> Option<String> {
    match error::similar(word, known.iter().copied()) {
        Some(similar) => Some(format!("did you mean `{similar}`?")),
        None if known.is_empty() => None,
        None => Some(format!("known are: {}", known.join(", "))),
    }
}
