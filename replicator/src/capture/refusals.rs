//! What cannot be captured: a stop ends with the first such thing, a survey lists all of them.
//!
//! Invariant: there is one list of what is refused, the code that captures. A survey runs the
//! same code and goes on where a stop would give up.

use super::CaptureError;

/// Something that cannot be captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Where it was found.
    pub object: String,
    /// What it is, and what to do about it, parted by a semicolon.
    pub reason: String,
}

/// Where refusals go.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    collecting: bool,
    found: Vec<Refusal>,
}

impl Refusals {
    /// Keeps all refusals from now on.
    pub(super) fn collect(&mut self) {
        self.collecting = true;
        self.found.clear();
    }

    /// Whether refusals are kept, and pages need not be read.
    pub(super) fn collecting(&self) -> bool {
        self.collecting
    }

    /// Ends the collection.
    pub(super) fn take(&mut self) -> Vec<Refusal> {
        self.collecting = false;
        std::mem::take(&mut self.found)
    }

    /// The value; none if it was refused and refusals are kept; else the error.
    pub(super) fn admit<T>(
        &mut self,
        result: Result<T, CaptureError>,
    ) -> Result<Option<T>, CaptureError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(CaptureError::Unsupported { object, reason }) if self.collecting => {
                let refusal = Refusal { object, reason };
                if !self.found.contains(&refusal) {
                    self.found.push(refusal);
                }
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

impl Refusal {
    /// What it is.
    pub fn why(&self) -> &str {
        self.reason.split_once("; ").map_or(&self.reason, |(why, _)| why)
    }

    /// What to do about it, if anybody knows.
    pub fn remedy(&self) -> Option<&str> {
        let (_, remedy) = self.reason.split_once("; ")?;
        (!remedy.contains("not protected yet")).then_some(remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ends_a_stop_and_a_survey_keeps_all() {
        let refused = || -> Result<u8, CaptureError> {
            Err(CaptureError::unsupported("descriptor 3".into(), "a lock; let it go".into()))
        };
        let mut all = Refusals::default();
        assert!(all.admit(refused()).is_err());
        all.collect();
        assert_eq!(all.admit(refused()).expect("kept"), None);
        assert_eq!(all.admit(Ok(7)).expect("a value"), Some(7));
        assert!(all.admit::<u8>(Err(CaptureError::Ended)).is_err());
        let found = all.take();
        assert_eq!((found.len(), found[0].why()), (1, "a lock"));
        assert_eq!(found[0].remedy(), Some("let it go"));
        assert!(all.admit(refused()).is_err());
    }
}
