//! A survey: everything that a tree holds, and what of it cannot be captured. It stops the tree
//! for a moment, copies no memory, and leaves nothing behind.

use super::{CaptureError, Capturer, Refusal, namespaces_of, outside};
use crate::image::State;
use crate::image::info::Namespace;
use std::time::{Duration, Instant};

/// For how long what passes by itself is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(2);

/// What a survey has found.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Everything that can be captured, without pages.
    pub state: State,
    /// The namespaces of the tree.
    pub namespaces: Vec<Namespace>,
    /// Everything that cannot.
    pub refusals: Vec<Refusal>,
    /// What a restore of a one-shot image would find cut off, in words.
    pub notes: Vec<String>,
    /// How long the tree stood still, the last time.
    pub stopped: Duration,
}

impl Capturer {
    /// Looks at everything. The tree runs on; the next checkpoint is a full one.
    ///
    /// `host` says that the tree is in the host's namespaces, where it shares things with others.
    pub fn survey(&mut self, host: bool) -> Result<Survey, CaptureError> {
        let begin = Instant::now();
        loop {
            self.pump()?;
            self.begin_full();
            self.refusals.collect();
            let frozen = Instant::now();
            let looked = self.freeze().and_then(|()| {
                let looked = self.look(host);
                self.tracer.thaw()?;
                looked
            });
            let mut refusals = self.refusals.take();
            self.begin_full();
            let (state, notes) = match looked {
                Ok(looked) => looked,
                Err(CaptureError::Transient(_)) if begin.elapsed() < PATIENCE => {
                    std::thread::sleep(RETRY);
                    continue;
                }
                Err(CaptureError::Transient(what)) => {
                    refusals.push(Refusal {
                        object: "the tree".into(),
                        reason: format!("{what}, and that does not pass; try again later"),
                    });
                    Default::default()
                }
                Err(e) => return Err(e),
            };
            let (namespaces, stopped) = (namespaces_of(self.root)?, frozen.elapsed());
            return Ok(Survey { state, namespaces, refusals, notes, stopped });
        }
    }

    fn look(&mut self, host: bool) -> Result<(State, Vec<String>), CaptureError> {
        let mut times = super::StopTimes::default();
        let state = self.capture(&mut times, &mut super::times::Lap(Instant::now()))?;
        let mut notes = Vec::new();
        if host {
            notes = outside::check(&self.pids(), &mut self.refusals)?;
            notes.extend(outside::terminals(&self.pids(), &state)?);
            let connected = super::one_shot::check_connections(&state);
            self.refusals.admit(connected)?;
        }
        Ok((state, notes))
    }
}
