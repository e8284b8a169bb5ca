//! Why a topology cannot be used, with the places in its file.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode};

use super::spans::Place;

/// Why a topology cannot be used. As a `miette` diagnostic it shows each place in the file.
#[derive(Debug, thiserror::Error, Diagnostic)]
pub enum TopologyError {
    /// The file cannot be read.
    #[error("cannot read the topology file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text breaks a rule of topology files.
    #[error("{name} is not a usable topology: {}", Summary(problems))]
    Invalid {
        /// The name of the text, as given by the caller.
        name: String,
        /// Everything that is wrong with it, at least one.
        #[related]
        problems: Vec<Problem>,
    },
}

impl TopologyError {
    /// What is wrong with the text; nothing if it could not be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Read { .. } => &[],
            Self::Invalid { problems, .. } => problems,
        }
    }
}

struct Summary<'a>(&'a [Problem]);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.0.first() else { return Ok(()) };
        write!(f, "line {}, column {}: {first}", first.line, first.column)?;
        match self.0.len() - 1 {
            0 => Ok(()),
            1 => write!(f, " (and one more problem)"),
            more => write!(f, " (and {more} more problems)"),
        }
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// What is wrong.
    pub message: String,
    /// What to do about it, if that is known.
    pub help: Option<String>,
    /// Line in the text, from 1.
    pub line: usize,
    /// Column in the line, in characters, from 1.
    pub column: usize,
    place: Place,
    source_text: Arc<NamedSource<String>>,
}

impl Problem {
    pub(super) fn new(
        source: &Arc<NamedSource<String>>,
        place: Place,
        message: String,
        help: Option<String>,
    ) -> Self {
        let before = &source.inner()[..place.offset];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            message,
            help,
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            place,
            source_text: Arc::clone(source),
        }
    }
}

impl Diagnostic for Problem {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(self.source_text.as_ref())
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let label = LabeledSpan::new(Some("here".to_owned()), self.place.offset, self.place.len);
        Some(Box::new(std::iter::once(label)))
    }
}

/// The one of `known` that `word` is most likely a misspelling of.
pub(super) fn similar<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(3) / 3)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Letters to insert, delete or replace to make one word of the other.
fn distance(one: &str, two: &str) -> usize {
    let two: Vec<char> = two.chars().collect();
    let mut row: Vec<usize> = (0..=two.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in two.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[two.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspellings_are_recognised() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(similar("endpoint", ["endpoints", "addresses"]), Some("endpoints"));
        assert_eq!(similar("adress", ["address", "uplink"]), Some("address"));
        assert_eq!(similar("gamma", ["alpha", "beta"]), None);
    }
}
