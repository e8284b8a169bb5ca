//! Frames: from a container's network device to the clients and back.
//!
//! ```text
//!  container's namespace          gate                               host's namespace
//!  ┌────────────────┐   push   ┌──────────────────┐ release(proof) ┌────────────────┐
//!  │ inner TAP      │ ───────► │ commit core      │ ─────────────► │ outer TAP      │──► clients
//!  │ (MAC, IP)      │ ◄─────── │ hold, input log  │ ◄───────────── │ (bridge port)  │◄──
//!  └────────────────┘  write   └──────────────────┘                └────────────────┘
//! ```
//!
//! What the container sends is kept by epoch in [`commit`] and leaves with a proof that the backup
//! holds that epoch's checkpoint. What it receives goes in at once, except during a stop, and a
//! copy goes to the backup's [`input_log`]. [`gate`] is the shell with descriptors and threads;
//! [`young`] knows the connections that the container has not accepted yet, [`parting`] those that
//! it has closed; [`announce`] and [`resume`] build what a takeover says to the neighbours and the peers.
//!
//! A frame, everywhere in this module, is what a TAP with offloads gives: a virtio_net_hdr of
//! [`HEADER`] bytes, then the Ethernet frame, up to [`MAX_FRAME`] bytes in all. The header stays
//! with the frame when it is kept or sent to the backup, because a frame with an unfinished
//! checksum is worthless without it.

pub mod announce;
pub mod commit;
pub mod gate;
pub mod input_log;
pub mod parting;
pub mod resume;
mod urgent;
mod wire;
pub mod young;

/// Bytes of the virtio_net_hdr in front of the Ethernet frame.
pub const HEADER: usize = replicator::sys::tap::VNET_HDR;

/// Most bytes that one frame has, header included: a full segmentation offload of 64 KiB.
pub const MAX_FRAME: usize = 65_536 + 256;

/// An Ethernet hardware address.
pub use smoltcp::wire::EthernetAddress as Mac;
