//! What a host asks the other one that does not run the container: who does, and to go on with it.
//!
//! Invariant: nothing is begun here before the other side has said that nobody runs it there.

use super::{Order, Standby};
use crate::agent::primary::lock;
use crate::agent::status::{Phase, Role};
use crate::agent::volumes::Files;
use replicator::transport::PrimaryLink;
use replicator::transport::link::PrimaryConfig;
use replicator::wire::message::RefuseCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Pause before the other side is asked again who runs the container.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// For how long a backup that does not answer is asked to go on with a container that was killed. It
/// takes over by itself, if it only cannot be reached.
const LAST_CHANCE: Duration = Duration::from_secs(10);
/// Asks the other side who runs the container, until that is known: an agent that starts must not
/// begin a second life of it. Either a primary comes, or nobody is known to run it, and then it
/// begins here.
pub(in crate::agent) async fn find_out(
    standby: Arc<Standby>,
    files: Option<Arc<Files>>,
    config: PrimaryConfig,
    orders: mpsc::UnboundedSender<Order>,
) {
    loop {
        if standby.admitted.load(Ordering::Acquire) {
            return;
        }
        match PrimaryLink::inquire(config.clone()).await {
            Ok((RefuseCode::Vacant, newest)) => {
                let base = newest.max(standby.core.newest());
                if let Some(Err(error)) = files.as_ref().map(|f| f.check_are_newest(base)) {
                    tracing::error!(container = standby.name, %error, "not begun");
                    let mut status = lock(&standby.status);
                    (status.phase, status.reason) = (Phase::Failed, Some(error.to_string()));
                    return;
                }
                let generation = standby.judge.begin(&standby, base).await;
                if standby.core.begin(generation) {
                    standby.memory.keep(generation);
                    let _ = orders.send(Order::Begin(generation));
                    return;
                }
            }
            Ok((code, generation)) => {
                tracing::info!(container = standby.name, ?code, %generation,
                    "the container is not to begin here");
                lock(&standby.status).reason =
                    Some(format!("the other side runs it in generation {generation}, or will"));
            }
            Err(error) => {
                tracing::info!(container = standby.name, %error, "who runs the container?");
                let reason = format!("no backup: {error}");
                lock(&standby.status).reason = Some(reason);
            }
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Tells the other side that the container runs here no longer, though nobody has ended it: its
/// copy there is the container's last chance. Until it has heard, comes as a primary, or does not
/// answer for [`LAST_CHANCE`].
pub(in crate::agent) async fn leave_to_backup(
    standby: Arc<Standby>,
    config: PrimaryConfig,
    why: String,
) {
    let name = &standby.name;
    tracing::error!(container = name, why, "the backup is asked to go on with it");
    let begin = Instant::now();
    let lost = loop {
        if standby.admitted.load(Ordering::Acquire) {
            return;
        }
        match PrimaryLink::inquire(config.clone()).await {
            Ok((RefuseCode::Vacant, _)) => break "its backup has no whole copy".to_owned(),
            Ok(_) => {
                lock(&standby.status).reason = Some(format!("{why}; its backup is to go on"));
                return;
            }
            Err(error) if begin.elapsed() > LAST_CHANCE => {
                break format!("its backup does not answer: {error}");
            }
            Err(_) => tokio::time::sleep(ASK_AGAIN).await,
        }
    };
    tracing::error!(container = name, why, lost, "the container is lost");
    let mut status = lock(&standby.status);
    (status.role, status.phase) = (Role::None, Phase::Failed);
    status.reason = Some(format!("{why}; {lost}"));
}
