//! The programs of a bypass, as instructions. Assembled here, so that the build needs no compiler for BPF.
//!
//! ```text
//!  a frame that leaves by the container's device, or by the one towards its clients:
//!    the bypass is closed, no TCP, a fragment, options of IP   on to the gate
//!    SYN, FIN or RST                                           forget the connection, on to the gate
//!    a connection that is known                                count it; into the cable
//!    any other                                                 on to the gate
//!  a frame that comes out of the cable                         has arrived at the device there
//! ```

use crate::bpf::asm::Size::{Byte, Double, Half, Word};
use crate::bpf::asm::{Assembler, FP, If, helper};

/// Bytes of a key: the container's address and the client's (IPv4 in the first four bytes), both ports as on the
/// wire, the family (4 or 6).
pub(super) const KEY: usize = 40;
/// Bytes of a value, which says nothing.
pub(super) const VALUE: usize = 4;

/// Which of the words says whether the bypass is open.
pub(super) const OPEN: usize = 0;
/// Which of the words counts the frames of the container.
pub(super) const OUT: usize = 1;
/// Which of the words counts the frames of the clients.
pub(super) const IN: usize = 2;
/// Number of words.
pub(super) const WORDS: usize = 3;

/// Places in a key.
pub(super) mod key {
    pub(crate) const OURS: usize = 0;
    pub(crate) const THEIRS: usize = 16;
    pub(crate) const OUR_PORT: usize = 32;
    pub(crate) const THEIR_PORT: usize = 34;
    pub(crate) const FAMILY: usize = 36;
}

/// Who has sent what a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Container,
    Clients,
}

// Places on the stack.
const KEY_AT: i16 = -40;
const SMALL_AT: i16 = -48;
const IP4_AT: i16 = -72;
const TCP_AT: i16 = -88;
/// As much of a TCP header as is looked at: up to its flags.
const TCP_LEN: i32 = 14;

const FIN_SYN_RST: i32 = 7;
/// TCX_NEXT: as if this program were not there.
const ON: i32 = -1;
/// BPF_F_INGRESS.
const ARRIVED: i32 = 1;

/// Copies bytes of the packet to the stack.
fn packet(a: &mut Assembler, from: i32, to: i16, len: i32) {
    a.mov(1, 6);
    a.set(2, from);
    a.place(3, to);
    a.set(4, len);
    a.call(helper::LOAD_BYTES);
    a.jump(If::NotEqual, 0, 0, "on");
}

/// The program that decides, with the table of known connections, the words and the cable's end on this side.
///
/// Register 6 is the packet, 7 the offset of its TCP header, 8 the TCP flags.
pub(super) fn deciding(from: From, flows: i32, words: i32, cable: u32) -> Vec<u8> {
    let mut a = Assembler::default();
    a.mov(6, 1);
    a.map_value(1, words);
    a.load(Double, 1, 1, 8 * OPEN as i16);
    a.jump(If::Equal, 1, 0, "on");
    for at in (KEY_AT..0).step_by(8) {
        a.store_value(Double, FP, at, 0);
    }
    addresses(&mut a, from);
    for (offset, label) in [(34, "tcp of v4"), (54, "tcp of v6")] {
        a.label(label);
        packet(&mut a, offset, TCP_AT, TCP_LEN);
        a.jump(If::Always, 0, 0, "tcp");
    }
    a.label("tcp");
    let (source, destination) = match from {
        From::Container => (key::OUR_PORT, key::THEIR_PORT),
        From::Clients => (key::THEIR_PORT, key::OUR_PORT),
    };
    for (there, here) in [(0, source), (2, destination)] {
        a.load(Half, 1, FP, TCP_AT + there);
        a.store(Half, FP, KEY_AT + here as i16, 1);
    }
    a.load(Byte, 8, FP, TCP_AT + 13);
    a.map(1, flows);
    a.place(2, KEY_AT);
    a.jump(If::AnyBit, 8, FIN_SYN_RST, "begins or ends");
    a.call(helper::MAP_LOOKUP);
    a.jump(If::Equal, 0, 0, "on");
    a.map_value(1, words);
    a.set(2, 1);
    let count = if from == From::Container { OUT } else { IN };
    a.fetch_add(1, 8 * count as i16, 2);
    a.set(1, cable as i32);
    a.set(2, 0);
    a.call(helper::REDIRECT);
    a.end();
    a.label("begins or ends");
    a.call(helper::MAP_DELETE);
    a.label("on");
    a.leave(ON);
    a.finish()
}

/// Reads the addresses into the key.
fn addresses(a: &mut Assembler, from: From) {
    const IPV4: i32 = 0x0008;
    const IPV6: i32 = 0xdd86;
    const TCP: i32 = 6;
    /// Of the two bytes with flags and offset, as they lie in memory: all but "do not fragment".
    const FRAGMENT: i32 = 0xffbf;
    let (source, destination) = match from {
        From::Container => (KEY_AT + key::OURS as i16, KEY_AT + key::THEIRS as i16),
        From::Clients => (KEY_AT + key::THEIRS as i16, KEY_AT + key::OURS as i16),
    };
    packet(a, 12, SMALL_AT, 2);
    a.load(Half, 1, FP, SMALL_AT);
    a.jump(If::Equal, 1, IPV4, "v4");
    a.jump(If::NotEqual, 1, IPV6, "on");
    packet(a, 20, SMALL_AT, 1);
    a.load(Byte, 1, FP, SMALL_AT);
    a.jump(If::NotEqual, 1, TCP, "on");
    packet(a, 22, source, 16);
    packet(a, 38, destination, 16);
    a.store_value(Word, FP, KEY_AT + key::FAMILY as i16, 6);
    a.jump(If::Always, 0, 0, "tcp of v6");
    a.label("v4");
    packet(a, 14, IP4_AT, 20);
    a.load(Byte, 1, FP, IP4_AT);
    a.jump(If::NotEqual, 1, 0x45, "on");
    a.load(Half, 1, FP, IP4_AT + 6);
    a.jump(If::AnyBit, 1, FRAGMENT, "on");
    a.load(Byte, 1, FP, IP4_AT + 9);
    a.jump(If::NotEqual, 1, TCP, "on");
    for (there, here) in [(12, source), (16, destination)] {
        a.load(Word, 1, FP, IP4_AT + there);
        a.store(Word, FP, here, 1);
    }
    a.store_value(Word, FP, KEY_AT + key::FAMILY as i16, 4);
}

/// The program at the end of the cable: everything has arrived at this device.
pub(super) fn arriving(device: u32) -> Vec<u8> {
    let mut a = Assembler::default();
    a.set(1, device as i32);
    a.set(2, ARRIVED);
    a.call(helper::REDIRECT);
    a.end();
    a.finish()
}
