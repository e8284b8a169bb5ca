//! Where the backup's connections meet its core.

use crate::protocol::LinkId;
use crate::protocol::backup::{Action, Backup, Input, State};
use crate::protocol::detector::{Marks, Pace};
use crate::volume::{Journals, VolumeError};
use crate::wire::message::{Bye, Heartbeat, Hello, Refuse, RefuseCode, Role, Welcome};
use crate::wire::{Checkpoint, Receipt, seed_of};
use crate::{Epoch, Generation};
use bytes::Bytes;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::link::LinkError;
use super::pulse::{Listener, Session};

/// Something that a backup hears, apart from checkpoints.
#[derive(Debug)]
pub enum Event {
    /// A sign of life; with its contents if it was a heartbeat.
    Heard(Option<(Generation, Epoch, Heartbeat)>),
    /// A record of the input log.
    Input {
        /// Generation of the primary.
        generation: Generation,
        /// The epoch that was open.
        epoch: Epoch,
        /// The record.
        bytes: Bytes,
    },
    /// The primary leaves.
    Bye {
        /// Why.
        bye: Bye,
        /// The last epoch, for a switchover.
        last: Epoch,
    },
    /// The connection is over.
    Lost(LinkError),
}

/// Decides about connections and checkpoints. Called from the connections' tasks; must not
/// block for long.
pub trait Admission: Send + Sync + 'static {
    /// A primary presents itself: welcome, or the reason and the newest generation known.
    fn hello(
        &self,
        link: LinkId,
        generation: Generation,
        hello: &Hello,
    ) -> Result<Welcome, (Refuse, Generation)>;

    /// A checkpoint is complete and checked. To take it, call `deliver`, which hands it to the
    /// applier, and say true, which acknowledges it. Both or none: whoever stops acknowledging
    /// for good must afterwards find in the applier's channel all that was acknowledged.
    fn complete(&self, link: LinkId, receipt: Receipt, deliver: &mut dyn FnMut()) -> bool;

    /// Writes down what a complete checkpoint says of volumes, so that its acknowledgement
    /// promises the files too. Comes before [`Admission::complete`]; may take as long as the disk
    /// does. After an error the connection ends, and the copy here is void.
    fn keep(&self, link: LinkId, checkpoint: &Checkpoint) -> Result<(), LinkError>;

    /// Keeps contents of files that come ahead of the full checkpoint that is sent next, of about this epoch: a
    /// payload whose frame began at `at`. As [`Admission::keep`].
    fn seed(&self, link: LinkId, epoch: Epoch, at: u64, payload: &[u8]) -> Result<(), LinkError>;

    /// What was kept is of a checkpoint that was not acknowledged.
    fn take_back(&self, checkpoint: &Checkpoint);

    /// The pulses of a connection that was admitted; comes once, if the peer has any.
    fn pulses(&self, session: Session);

    /// Anything else on an admitted connection.
    fn event(&self, link: LinkId, event: Event);

    /// A connection failed before it was admitted.
    fn turned_away(&self, peer: SocketAddr, error: LinkError);
}

/// What the owner of a [`SharedBackup`] is told.
#[derive(Debug)]
pub enum Notice {
    /// What the core wants done, acknowledgements and answers to hello excepted.
    Action(Action),
    /// A primary was admitted.
    Admitted(LinkId, Generation, Hello),
    /// The pulses of an admitted connection.
    Pulses(Box<Session>),
    /// Something was heard.
    Event(LinkId, Event),
    /// A connection failed before it was admitted.
    TurnedAway(SocketAddr, LinkError),
    /// The other host, where the container was killed, wants it back from here.
    WantedBack,
}

/// The backup core behind a lock, shared by connections, timers and operators.
pub struct SharedBackup {
    core: Mutex<Backup>,
    origin: Instant,
    container: String,
    host: String,
    depth: u32,
    pulse_port: u16,
    journals: Option<Arc<Journals>>,
    notices: Box<dyn Fn(Notice) + Send + Sync>,
}

impl SharedBackup {
    /// Shares `core`, whose time counts from `origin`. `depth` is the capacity of the applier's
    /// channel. `notices` must not block and must not call back into this; that of an admission
    /// comes before the primary is told, and so before its first checkpoint.
    pub fn new(
        core: Backup,
        origin: Instant,
        container: &str,
        host: &str,
        depth: u32,
        notices: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Self {
        Self {
            core: Mutex::new(core),
            origin,
            container: container.into(),
            host: host.into(),
            depth,
            pulse_port: 0,
            journals: None,
            notices: Box::new(notices),
        }
    }

    /// Tells primaries on which port this side expects their pulses.
    pub fn with_pulses_at(self, pulse_port: u16) -> Self {
        Self { pulse_port, ..self }
    }

    /// Keeps what checkpoints say of volumes here before they are acknowledged. Without, a
    /// checkpoint that says something is an error.
    pub fn with_journals(self, journals: Option<Arc<Journals>>) -> Self {
        Self { journals, ..self }
    }

    /// Time on the core's clock.
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Gives the core an input; its actions go out as notices.
    pub fn handle(&self, input: Input) {
        let actions = self.with(|core, now| core.handle(now, input));
        self.tell(actions);
    }

    /// Where the core stands.
    pub fn state(&self) -> State {
        self.with(|core, _| core.state())
    }

    /// The newest generation that the core knows.
    pub fn newest(&self) -> Generation {
        self.with(|core, _| core.newest())
    }

    /// The connection in use.
    pub fn link(&self) -> Option<LinkId> {
        self.with(|core, _| core.link())
    }

    /// Begins a new life of the container here, if nobody else is known to run it.
    pub fn begin(&self, generation: Generation) -> bool {
        self.with(|core, now| {
            core.handle(now, Input::Begin(generation));
            core.state() == State::Promoted { generation }
        })
    }

    /// How this side's pulses come now.
    pub fn pace(&self) -> Pace {
        self.with(|core, _| core.pace())
    }

    /// How long the primary has been silent.
    pub fn silence(&self) -> Duration {
        self.with(|core, now| core.silence(now))
    }

    /// When to give the core a tick, on its clock.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.with(|core, _| core.next_deadline())
    }

    fn with<T>(&self, f: impl FnOnce(&mut Backup, Duration) -> T) -> T {
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        f(&mut core, self.origin.elapsed())
    }

    fn tell(&self, actions: Vec<Action>) {
        for action in actions {
            (self.notices)(Notice::Action(action));
        }
    }

    /// Writes something of files down.
    fn write_files(
        &self,
        epoch: Epoch,
        write: impl FnOnce(&Journals) -> Result<(), VolumeError>,
    ) -> Result<(), LinkError> {
        let written = match &self.journals {
            Some(journals) => write(journals).map_err(|e| e.to_string()),
            None => Err("it has replicated volumes, and this side's topology has none".into()),
        };
        written.map_err(|reason| LinkError::Files { epoch, reason })
    }
}

impl Admission for SharedBackup {
    fn hello(
        &self,
        link: LinkId,
        generation: Generation,
        hello: &Hello,
    ) -> Result<Welcome, (Refuse, Generation)> {
        if hello.container != self.container {
            let text = format!("this is the backup of '{}'", self.container);
            let newest = self.with(|core, _| core.newest()).min(generation);
            return Err((Refuse { code: RefuseCode::WrongContainer, text }, newest));
        }
        let input = match hello.role {
            Role::Primary => Input::Hello { link, generation },
            Role::Backup | Role::Bereft => Input::Inquiry(link),
        };
        let actions = self.with(|core, now| core.handle(now, input));
        let mut answer = None;
        let (mine, others): (Vec<_>, Vec<_>) = actions.into_iter().partition(
            |a| matches!(a, Action::Welcome(l) | Action::Refuse { link: l, .. } if *l == link),
        );
        for action in mine {
            answer = Some(match action {
                Action::Refuse { code, newest, .. } => {
                    let name = &self.container;
                    let text = match code {
                        RefuseCode::Vacant => format!("nobody is known to run '{name}'"),
                        RefuseCode::Promoted => {
                            format!("'{name}' runs here in generation {newest}, or soon will")
                        }
                        _ => format!(
                            "generation {generation} of '{name}' is not taken; generation {newest} \
                             is known"
                        ),
                    };
                    Err((Refuse { code, text }, newest))
                }
                _ => Ok(Welcome {
                    host: self.host.clone(),
                    depth: self.depth,
                    pulse_port: self.pulse_port,
                }),
            });
        }
        self.tell(others);
        let answer = answer.unwrap_or_else(|| {
            let text = "the backup gave no answer".into();
            Err((Refuse { code: RefuseCode::Protocol, text }, generation))
        });
        if answer.is_ok() {
            (self.notices)(Notice::Admitted(link, generation, hello.clone()));
        }
        let goes_on = |(refusal, _): &(Refuse, _)| refusal.code == RefuseCode::Promoted;
        if hello.role == Role::Bereft && answer.as_ref().is_err_and(goes_on) {
            (self.notices)(Notice::WantedBack);
        }
        answer
    }

    fn complete(&self, link: LinkId, receipt: Receipt, deliver: &mut dyn FnMut()) -> bool {
        let mut acknowledge = false;
        let others: Vec<Action> = self.with(|core, now| {
            let mut others = core.handle(now, Input::Complete { link, receipt });
            others.retain(|action| match action {
                Action::Apply(_) => {
                    // Under the lock: a promotion that comes next finds it delivered.
                    deliver();
                    false
                }
                Action::Ack { .. } => {
                    acknowledge = true;
                    false
                }
                _ => true,
            });
            others
        });
        self.tell(others);
        acknowledge
    }

    fn keep(&self, link: LinkId, checkpoint: &Checkpoint) -> Result<(), LinkError> {
        let Checkpoint { generation, epoch, files, .. } = checkpoint;
        if files.is_empty() {
            return Ok(());
        }
        let keep = |journals: &Journals| journals.keep(*generation, *epoch, files);
        self.write_files(*epoch, keep).inspect_err(|_| {
            // The copy here is not to be promoted from: its files are behind.
            self.handle(Input::Bye { link, bye: Bye::Demoted, last: *epoch });
        })
    }

    fn seed(&self, link: LinkId, epoch: Epoch, at: u64, payload: &[u8]) -> Result<(), LinkError> {
        let piece = seed_of(at, payload)?;
        // A copy that is here already stays what it was.
        self.write_files(epoch, |journals: &Journals| journals.seed(link.0, &piece))
    }

    fn take_back(&self, checkpoint: &Checkpoint) {
        let Some(journals) = self.journals.as_ref().filter(|_| !checkpoint.files.is_empty()) else {
            return;
        };
        if let Err(error) = journals.take_back(checkpoint.generation, checkpoint.epoch) {
            tracing::error!(%error, epoch = %checkpoint.epoch,
                "files of an epoch that does not count would be completed by the next start");
        }
    }

    fn pulses(&self, session: Session) {
        (self.notices)(Notice::Pulses(Box::new(session)));
    }

    fn event(&self, link: LinkId, event: Event) {
        let input = match &event {
            Event::Heard(_) | Event::Input { .. } => Input::Heard(link),
            Event::Bye { bye, last } => Input::Bye { link, bye: *bye, last: *last },
            Event::Lost(_) => Input::Lost(link),
        };
        self.handle(input);
        if !matches!(event, Event::Heard(None)) {
            (self.notices)(Notice::Event(link, event));
        }
    }

    fn turned_away(&self, peer: SocketAddr, error: LinkError) {
        (self.notices)(Notice::TurnedAway(peer, error));
    }
}

impl Listener for SharedBackup {
    fn pulse(&self, link: LinkId, marks: Marks) {
        self.handle(Input::Pulse { link, marks });
    }

    fn tick(&self) {
        self.handle(Input::Tick);
    }

    fn pace(&self) -> Pace {
        self.with(|core, _| core.pace_of_pulses())
    }
}
