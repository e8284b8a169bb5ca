//! What the end-to-end tests in `tests/tests/` share. They know nilicon as its users do: by its
//! command line, its exit codes, what it prints and what it leaves behind.
//!
//! A test takes a [`Bed`]: a lab of its own name, on a machine that it has for itself meanwhile.
//! When the bed goes, also by a panic, so does the lab; after a test that passed nothing of it may
//! be left. The tests run as root:
//!
//! ```sh
//! cargo build --release && cargo test -p nilicon-tests
//! ```

mod bed;
mod command;
mod leftovers;
mod obedient;
mod relay;
mod sketch;

pub use bed::{Bed, until};
pub use command::{Done, Running, binary, is_installed, nilicon, nilicon_as_nobody};
pub use leftovers::leftovers;
pub use obedient::{OBEDIENT, tell};
pub use relay::Relay;
pub use sketch::{EMBEDDED, MEMCACHED, REDIS, Sketch};
