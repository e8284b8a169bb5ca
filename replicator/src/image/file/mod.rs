//! Images in files: a process tree at rest.
//!
//! ```text
//!  header   "NILIMAGE"  format u32  check u32
//!  section  Info        once            who, when, which namespaces
//!  section  Objects     once            State without its processes
//!  section  Process     as many as Info says, in the order of the tree
//!  section  Pages       any number      pages of one process, at most 4 MiB of them
//!  section  End         once, last      counts, and a digest over every byte before it
//! ```
//! Each section is framed and checked by itself ([`section`]). A section that is unknown,
//! missing, doubled, out of place or left over is an error that names it and its offset: an image
//! is whole or it is nothing. Readers hold one section at a time, so that memory follows the
//! largest section and not the image.

mod reader;
pub mod section;
mod writer;

#[cfg(test)]
mod tests;

pub use reader::{Reader, Summary};
pub use section::{FileError, Kind};
pub use writer::{Draft, Writer};

use serde::{Deserialize, Serialize};

/// First bytes of an image.
pub const MAGIC: [u8; 8] = *b"NILIMAGE";
/// Version of the framing.
pub const FORMAT: u32 = 1;
/// Most bytes of page contents in one section.
pub const PAGES_IN_SECTION: usize = 4 << 20;

/// The last section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct End {
    sections: u32,
    pages: u64,
    digest: u128,
}
