//! Connections at rest: nothing is in their queues, and a look before the stop has shown all that there is
//! to say of them. What a checkpoint says of such a one is put together while the container runs, and
//! the stop takes it as it is.
//!
//! Invariant: what was put together counts only as long as every look since, that of the stop included, has
//! found the descriptor and its socket as they were then, word for word ([`Glance::changed`]). After a
//! look that cannot say that, nothing of it counts.

use super::{Build, Files, Holder, Watcher, about};
use crate::capture::CaptureError;
use crate::capture::glance::{Clock, Glance, Row};
use crate::image::net::TcpConnection;
use crate::image::{Description, EpollTarget, Fd, Kind};

/// What there is to say of a connection at rest.
#[derive(Clone, Debug)]
pub(super) struct Resting {
    number: i32,
    flags: i32,
    inode: u64,
    file: u64,
    clock: Option<Clock>,
    /// None: a stop has taken it.
    connection: Option<Box<TcpConnection>>,
}

/// Puts what a glance shows of epoll behind what others have shown.
pub(super) fn add_watchers(glance: &Glance, all: &mut Vec<Watcher>) {
    for row in glance.rows() {
        if let Some((by, fd, events, data)) = row.watcher() {
            let target = EpollTarget { fd, events, data };
            all.push((by, row.file(), target, row.inode()));
        }
    }
}

impl Files {
    /// Whether a stop may take this row as it was put together.
    pub(super) fn rests(&self, nth: usize) -> bool {
        matches!(self.resting.get(nth), Some(Some(Resting { connection: Some(_), .. })))
    }

    /// After each look: what it does not confirm counts no longer.
    pub(super) fn heed(&mut self, glance: &Glance) {
        self.knows_watchers &= glance.is_watched_as_before();
        let mut resting = std::mem::take(&mut self.resting);
        match glance.changed() {
            Some(changed) => {
                for nth in changed {
                    let gone = resting.get_mut(*nth as usize).and_then(Option::take);
                    gone.into_iter().for_each(|gone| self.give_back(gone));
                }
            }
            None => resting.drain(..).flatten().for_each(|gone| self.give_back(gone)),
        }
        self.resting = resting;
    }

    /// The next stop fills in what has changed. To be called before anything else is remembered of its
    /// number.
    fn give_back(&mut self, gone: Resting) {
        let seen = self.seen.get_mut(&gone.number).and_then(|s| s.remembered.as_mut());
        if let (Some(remembered), Some(connection)) = (seen, gone.connection) {
            remembered.give_back(connection);
        }
    }

    /// While the container runs: puts together again what a stop has taken, if it counts still. Says
    /// whether there is nothing more to be done for this row.
    pub(super) fn renew(&mut self, nth: usize, glance: &Glance) -> bool {
        let Some(Some(resting)) = self.resting.get_mut(nth) else { return false };
        if resting.connection.is_none() {
            let seen = self.seen.get_mut(&resting.number).and_then(|s| s.remembered.as_mut());
            resting.connection = seen.zip(glance.nth(nth).tcp).and_then(|(r, tcp)| r.at_rest(tcp));
        }
        resting.connection.is_some()
    }

    /// While the container runs, once all is known of a row: puts together what there is to say of it, if it
    /// is a connection at rest.
    pub(super) fn put_to_rest(&mut self, nth: usize, glance: &Glance) {
        // Later looks do not say what has changed.
        if glance.time().is_none() {
            return;
        }
        if self.resting.len() <= nth {
            self.resting.resize(glance.len(), None);
        }
        self.resting[nth] = self.resting_of(&glance.nth(nth));
    }

    fn resting_of(&mut self, row: &Row<'_>) -> Option<Resting> {
        let (tcp, flags) = (row.tcp?, row.flags());
        if row.may_be_locked() || row.may_tell() || flags & libc::O_DIRECT != 0 {
            return None;
        }
        let (number, inode, file) = (row.number(), row.inode(), row.file());
        let seen = self.seen.get_mut(&number).filter(|s| s.is_of(row))?;
        let remembered = seen.remembered.as_mut().filter(|r| r.is_of(tcp))?;
        let connection = Some(remembered.at_rest(tcp)?);
        Some(Resting { number, flags, inode, file, clock: tcp.clock(), connection })
    }

    /// While the container runs, after a look: puts what it shows of epoll in order.
    pub(super) fn learn_watchers(&mut self, glance: &Glance) {
        if !self.knows_watchers && glance.time().is_some() {
            self.watchers.clear();
            add_watchers(glance, &mut self.watchers);
            self.watchers.sort_unstable_by_key(|(by, file, ..)| (*by, *file));
            self.knows_watchers = true;
        }
    }

    /// In a stop: captures a connection at rest, as a look at this time has shown it.
    pub(super) fn capture_resting(
        &mut self,
        holder: Holder<'_>,
        nth: usize,
        time: u64,
        (builder, state, world, _): &mut Build<'_, '_>,
    ) -> Result<Option<Fd>, CaptureError> {
        let Some(Some(resting)) = self.resting.get_mut(nth) else { return Ok(None) };
        let Some(mut connection) = resting.connection.take() else { return Ok(None) };
        let (number, inode, file) = (resting.number, resting.inode, resting.file);
        let (flags, pid) = (resting.flags, holder.pid);
        (builder.glanced, builder.resting) = (builder.glanced + 1, builder.resting + 1);
        let next = state.descriptions.len() as u32;
        let known = builder.enter((pid, number), file, inode, next)?;
        if known.is_some() {
            resting.connection = Some(connection);
        } else {
            let stamp = resting.clock.map(|clock| clock.at(time));
            builder.stamps.extend(stamp.map(|stamp| (next, stamp)));
            if self.checked {
                connection.timestamp = stamp;
                let (kind, what) = (Kind::Tcp(connection.clone()), about(number, pid));
                self.check(holder, number, &kind, &mut world.with(builder, state), &what)?;
            }
            let (flags, kind) = (flags & !libc::O_CLOEXEC, Kind::Tcp(connection));
            state.descriptions.push(Description { flags, kind });
        }
        let description = known.unwrap_or(next);
        let close_on_exec = flags & libc::O_CLOEXEC != 0;
        Ok(Some(Fd { number, description, close_on_exec }))
    }
}
