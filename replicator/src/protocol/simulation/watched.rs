//! The cores of a world, with all that they are told and all that they then want in the chronicle.
//!
//! Invariant: the core itself runs, unchanged; this hands on what it is given.

use super::chronicle;
use crate::ack::AckLedger;
use crate::protocol::{backup, primary};
use crate::{Epoch, Generation};
use std::fmt::Debug;
use std::ops::Deref;
use std::time::Duration;

/// A core on a host, with a word for what it is there.
#[derive(Debug)]
pub(super) struct Watched<C> {
    core: C,
    host: Option<&'static str>,
}

/// The core of a primary.
pub(super) type Primary = Watched<primary::Primary>;
/// The core of a backup.
pub(super) type Backup = Watched<backup::Backup>;

impl<C> Watched<C> {
    /// On which host it is.
    pub(super) fn on(mut self, host: usize) -> Self {
        self.host = Some(chronicle::name_of(host));
        self
    }

    fn tell(&self, role: &str, input: &str, actions: &[impl Debug]) {
        let host = self.host.unwrap_or("?");
        chronicle::note(|| match actions {
            [] => format!("{host:<5} {role}: {input}"),
            actions => format!("{host:<5} {role}: {input} => {actions:?}"),
        });
    }
}

impl<C> Deref for Watched<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.core
    }
}

impl Primary {
    pub(super) fn new(
        config: primary::Config,
        generation: Generation,
        ledger: AckLedger,
        now: Duration,
    ) -> Self {
        Self { core: primary::Primary::new(config, generation, ledger, now), host: None }
    }

    pub(super) fn alone(
        config: primary::Config,
        ledger: AckLedger,
        from: Epoch,
        now: Duration,
    ) -> Self {
        Self { core: primary::Primary::alone(config, ledger, from, now), host: None }
    }

    pub(super) fn handle(&mut self, now: Duration, input: primary::Input) -> Vec<primary::Action> {
        let quiet = matches!(
            input,
            primary::Input::Tick | primary::Input::Heard(_) | primary::Input::Pulse { .. }
        );
        let text = if chronicle::is_kept() { format!("{input:?}") } else { String::new() };
        let actions = self.core.handle(now, input);
        if !quiet || !actions.is_empty() {
            self.tell("primary", &text, &actions);
        }
        actions
    }
}

impl Backup {
    pub(super) fn new(config: backup::Config, newest: Generation, now: Duration) -> Self {
        Self { core: backup::Backup::new(config, newest, now), host: None }
    }

    pub(super) fn handle(&mut self, now: Duration, input: backup::Input) -> Vec<backup::Action> {
        let quiet = matches!(
            input,
            backup::Input::Tick | backup::Input::Heard(_) | backup::Input::Pulse { .. }
        );
        let text = if chronicle::is_kept() { format!("{input:?}") } else { String::new() };
        let actions = self.core.handle(now, input);
        if !quiet || !actions.is_empty() {
            self.tell("backup", &text, &actions);
        }
        actions
    }
}
