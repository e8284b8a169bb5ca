//! Links that get worse for a while: what the process of an impaired link does to frames changes
//! while it carries them.
//!
//! What it is to do is written down in the lab's directory; SIGHUP makes the process read it. A
//! process that is started later reads it, too.

use nix::sys::signal::Signal;

use super::{Lab, LabError, state};
use crate::topology::{Endpoint, Impair};

/// What frames of one direction meet from now on, made of what the topology says.
type Change = fn(&Impair) -> Impair;

impl Lab {
    /// The link that ends at `endpoint` is slow from now on, until it is healed.
    ///
    /// # Errors
    /// There is no such link, its frames do not pass through user space, or the lab is not
    /// deployed whole.
    pub fn slow_link(&self, endpoint: &Endpoint) -> Result<(), LabError> {
        self.change_weather(endpoint, Impair::slow, Impair::slow)
    }

    /// The link that ends at `endpoint` loses, copies, reorders and changes frames from now on,
    /// until it is healed.
    ///
    /// # Errors
    /// As for [`Lab::slow_link`].
    pub fn lossy_link(&self, endpoint: &Endpoint) -> Result<(), LabError> {
        self.change_weather(endpoint, Impair::lossy, Impair::lossy)
    }

    /// What an impaired link does to the frames of its first end, and to those of its second.
    ///
    /// # Errors
    /// There is no such link, or what is written down cannot be read.
    pub(crate) fn weather_of(&self, index: usize) -> Result<[Impair; 2], LabError> {
        let link = self.topology().links.get(index);
        let impair =
            link.and_then(|link| link.impair.clone()).ok_or_else(|| LabError::Unknown {
                lab: self.name().to_owned(),
                what: format!("impaired link number {index}"),
            })?;
        let written = state::weather(self.name(), index)?;
        Ok(written.unwrap_or_else(|| [impair.clone(), impair]))
    }

    /// Whether the frames of the link that ends at `endpoint` pass through user space.
    pub(super) fn is_impaired(&self, endpoint: &Endpoint) -> bool {
        self.topology().link_at(endpoint).is_some_and(|(_, link)| link.impair.is_some())
    }

    /// Nothing of what `endpoint` sends arrives, or nothing of what is sent to it.
    pub(super) fn silence(&self, endpoint: &Endpoint, sends: bool) -> Result<(), LabError> {
        let (out, back): (Change, Change) =
            if sends { (Impair::silent, Impair::clone) } else { (Impair::clone, Impair::silent) };
        self.change_weather(endpoint, out, back)
    }

    /// An impaired link is as the topology says again.
    pub(super) fn clear_weather(&self, endpoint: &Endpoint) -> Result<(), LabError> {
        self.change_weather(endpoint, Impair::clone, Impair::clone)
    }

    /// Changes what happens to what `endpoint` sends, and to what it receives.
    fn change_weather(
        &self,
        endpoint: &Endpoint,
        out: Change,
        back: Change,
    ) -> Result<(), LabError> {
        let found = self.topology().link_at(endpoint);
        let (index, link) = found.ok_or_else(|| self.no_link_at(endpoint))?;
        let Some(impair) = &link.impair else {
            let (lab, endpoint) = (self.name().to_owned(), endpoint.clone());
            return Err(LabError::NotImpaired { lab, endpoint });
        };
        let is_first = link.endpoints.first() == Some(endpoint);
        let (first, second) = if is_first { (out, back) } else { (back, out) };
        state::write_weather(self.name(), index, &[first(impair), second(impair)])?;
        if self.signal_process(&format!("link-{index}"), Signal::SIGHUP)? {
            return Ok(());
        }
        Err(LabError::LinkProcess {
            link: endpoint.to_string(),
            problem: "has ended".to_owned(),
            log: self.directory().join(format!("link-{index}.log")),
        })
    }
}
