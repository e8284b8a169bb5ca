//! What rarely changes of descriptors, read while the container runs so that the stop does not pay
//! for it.

use super::seen::SOON;
use super::{Files, about, describe, numbers};
use crate::capture::glance::Row;
use crate::capture::objects::Objects;
use crate::capture::{CaptureError, locks, options, remembered, tcp};
use crate::sys::pidfd;
use crate::sys::unix_diag::UnixDiag;
use std::os::fd::{AsFd, BorrowedFd};

impl Files {
    /// Reads what rarely changes of sockets, while the container runs.
    pub(in crate::capture) fn look_ahead(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        objects: &mut Objects,
        diag: &UnixDiag,
    ) -> Result<(), CaptureError> {
        self.forget_closed();
        let Some(mut glance) = self.glance.take() else {
            for number in numbers(pid)? {
                self.look_ahead_at(pid, handle, number, None, objects, diag)?;
            }
            return Ok(());
        };
        let looked = glance.look().map_err(CaptureError::from).and_then(|()| {
            self.heed(&glance);
            if glance.changed().is_none() {
                glance.learn();
            }
            self.learn_watchers(&glance);
            (0..glance.len()).try_for_each(|nth| {
                if self.renew(nth, &glance) {
                    return Ok(());
                }
                let row = glance.nth(nth);
                if !self.is_up_to_date(&row) {
                    self.look_ahead_at(pid, handle, row.number(), Some(&row), objects, diag)?;
                }
                self.note(row.number(), row.inode(), row.flags());
                self.put_to_rest(nth, &glance);
                Ok(())
            })
        });
        self.glance = Some(glance);
        looked
    }

    /// Whether a look ahead would read nothing new. Then what the stop needs is made ready.
    fn is_up_to_date(&mut self, row: &Row<'_>) -> bool {
        let Some(seen) = self.seen.get_mut(&row.number()).filter(|s| s.is_of(row)) else {
            return false;
        };
        if row.may_tell() || seen.link.ends_with(" (deleted)") {
            return false;
        }
        if seen.is_old(row.name()) {
            return false;
        }
        match (row.tcp, &mut seen.remembered) {
            (Some(tcp), Some(remembered)) => remembered.is_of(tcp) && remembered.make_ready(),
            (Some(_), None) => false,
            _ => !seen.is_socket(),
        }
    }

    fn look_ahead_at(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        number: i32,
        row: Option<&Row<'_>>,
        objects: &mut Objects,
        diag: &UnixDiag,
    ) -> Result<(), CaptureError> {
        // A descriptor that is closed meanwhile is looked at in the stop, if it is there.
        let Ok(info) = self.info(pid, number, row) else { return Ok(()) };
        let looked = self.look(pid, handle, number, &info, SOON).is_ok();
        self.note(number, info.inode, info.flags);
        let Some(seen) = self.seen.get_mut(&number).filter(|_| looked) else { return Ok(()) };
        let is_deleted = seen.link.ends_with(" (deleted)");
        let link = seen.link.clone();
        // Its path was read anew, and nobody is told of anything.
        if row.is_some_and(|row| !row.may_tell()) && !seen.is_socket() && !is_deleted {
            return Ok(());
        }
        let Ok(dup) = pidfd::get_fd(handle, number) else { return Ok(()) };
        seen.told = Some(locks::told(dup.as_fd())?);
        if !seen.is_socket() && !is_deleted {
            return Ok(());
        }
        if is_deleted {
            // Known now, its contents are copied before the stop. What is wrong with it is
            // said in the stop, if it is there still.
            let name = link.trim_end_matches(" (deleted)");
            let _ = describe::deleted(name, dup, &info, objects, "");
            return Ok(());
        }
        let what = about(number, pid);
        if let Some(tcp) = row.and_then(|r| r.tcp) {
            seen.remembered = remembered::remember(dup.as_fd(), tcp, &what, diag)?;
        } else if seen.is_tcp() {
            let ahead = tcp::ahead(dup.as_fd(), &what, Some(&mut seen.known), diag)?;
            seen.ahead = ahead.map(|ahead| (info.flags, ahead));
        } else {
            let socket = (seen.domain, seen.kind, seen.protocol);
            seen.options = Some(options::read(dup.as_fd(), socket, &what)?);
        }
        Ok(())
    }
}
