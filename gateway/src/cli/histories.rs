//! What the histories say that clients wrote of the keys they share, of one run and of many.
//!
//! Invariant: a history that cannot be explained, or that could not be judged, is never passed over:
//! there is a complaint, and so no success.

use std::fmt::Write;

use nilicon_clients::load::HistoryReport;
use serde::Serialize;

use super::numbers::grouped;
use super::report::RunReport;

/// The histories of many runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Histories {
    /// Of so many clients.
    pub(super) judged: u32,
    pub(super) operations: u64,
    /// Operations that got no answer.
    pub(super) unanswered: u64,
    /// Histories that cannot be explained.
    pub(super) violated: u32,
    /// Histories that could not be judged.
    pub(super) unknown: u32,
}

impl Histories {
    /// Puts together what all clients of all these runs wrote.
    pub(super) fn of<'a>(runs: impl Iterator<Item = &'a RunReport>) -> Self {
        let mut all = Self::default();
        for history in runs.flat_map(of_run) {
            all.judged += 1;
            all.operations += history.operations;
            all.unanswered += history.unanswered;
            all.violated += u32::from(history.linearizable == Some(false));
            all.unknown += u32::from(history.linearizable.is_none());
        }
        all
    }

    /// Whether all can be explained; none if there is no history, or one could not be judged.
    pub(super) fn linearizable(&self) -> Option<bool> {
        match self {
            Self { violated: 1.., .. } => Some(false),
            Self { judged: 1.., unknown: 0, .. } => Some(true),
            _ => None,
        }
    }

    /// The same in a line; nothing without a history.
    pub(super) fn line(&self) -> Option<String> {
        let Self { judged, operations, unanswered, violated, unknown } = self;
        let mut verdict = match self.linearizable() {
            Some(true) => "linearizable".to_owned(),
            _ => format!("{violated} NOT LINEARIZABLE"),
        };
        if *unknown > 0 {
            let _ = write!(verdict, ", {unknown} NOT JUDGED");
        }
        let what = if *judged == 1 { "history" } else { "histories" };
        let (operations, unanswered) = (grouped(*operations), grouped(*unanswered));
        (*judged > 0).then(|| {
            format!(
                "{judged} {what} of {operations} operations, {unanswered} unanswered: {verdict}"
            )
        })
    }
}

/// The histories of a run.
fn of_run(run: &RunReport) -> impl Iterator<Item = &HistoryReport> {
    run.clients.iter().filter_map(|client| client.report.history.as_ref())
}

/// What is wrong with the histories of a run, one complaint for each.
pub(super) fn complaints(run: &RunReport) -> impl Iterator<Item = String> {
    of_run(run).filter_map(|history| match (history.linearizable, &history.offence) {
        (Some(true), _) => None,
        (Some(false), Some(offence)) => {
            Some(format!("the history of {} is not linearizable", offence.key))
        }
        (Some(false), None) => Some("a history is not linearizable".to_owned()),
        (None, _) => Some("a history could not be judged".to_owned()),
    })
}

/// The histories of a run for people: a line, and around the first offending key what happened.
pub(super) fn text(run: &RunReport) -> String {
    let mut out = String::new();
    let Some(line) = Histories::of(std::iter::once(run)).line() else { return out };
    // Writing to a String cannot fail; the results say nothing.
    let _ = writeln!(out, "\n  history   {line}");
    if let Some(offence) = of_run(run).find_map(|history| history.offence.as_ref()) {
        let _ = writeln!(out, "  {}", offence.key);
        for operation in &offence.operations {
            let _ = writeln!(out, "    {operation}");
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use nilicon_clients::load::Offence;

    /// A history with this verdict.
    pub(in super::super) fn history(linearizable: Option<bool>) -> HistoryReport {
        let offence = (linearizable == Some(false)).then(|| Offence {
            key: "client-0:shared-1".to_owned(),
            operations: vec!["get -> 3 (client 1, 0.004 ms to 0.009 ms)".to_owned()],
        });
        HistoryReport { connections: 4, operations: 1200, unanswered: 1, linearizable, offence }
    }

    #[test]
    fn one_that_cannot_be_explained_outweighs_all_others() {
        let of = |judged, violated, unknown| Histories {
            judged,
            violated,
            unknown,
            ..Histories::default()
        };
        assert_eq!(of(0, 0, 0).linearizable(), None);
        assert_eq!(of(3, 0, 0).linearizable(), Some(true));
        assert_eq!(of(3, 0, 1).linearizable(), None);
        assert_eq!(of(3, 1, 1).linearizable(), Some(false));
        assert_eq!(of(0, 0, 0).line(), None);
        assert!(of(3, 0, 1).line().is_some_and(|line| line.contains("1 NOT JUDGED")));
    }
}
