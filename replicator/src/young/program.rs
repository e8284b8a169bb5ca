//! The program at the ingress of the container's device, as instructions.
//!
//! ```text
//!  a TCP segment of a connection in the map:
//!    SYN, the one of the handshake   drop: answered anew it would reset an established client
//!    ACK without RST, and the kernel finds for it
//!      a listener  the handshake's last segment: make the connection; another: drop
//!      a socket    the connection is there: forget the entry, pass
//!  anything else   pass
//! ```
//! It is assembled here so that the build needs no compiler for BPF.

use crate::bpf::asm::Size::{Byte, Double, Half, Word};
use crate::bpf::asm::{Assembler, FP, If, helper};

/// Bytes of a key: both addresses, both ports as on the wire, the family (4 or 6).
pub(super) const KEY: usize = 40;
/// Bytes of a value: next sequence number of the client, of the server, struct bpf_tcp_req_attrs.
pub(super) const VALUE: usize = 28;

// Places on the stack.
const KEY_AT: i16 = -40;
const TUPLE4_AT: i16 = -56;
const SMALL_AT: i16 = -64;
const IP4_AT: i16 = -88;
const TCP_AT: i16 = -112;
const ATTRS_AT: i16 = -136;
const TCP_FLAGS_AT: i16 = TCP_AT + 13;
const RST: i32 = 4;
const SYN: i32 = 2;
const ACK: i32 = 16;
const TCP_LISTEN: i32 = 10;
/// Offset of `state` in struct bpf_sock.
const SOCK_STATE: i16 = 72;
/// Bytes of struct bpf_tcp_req_attrs.
const ATTRS: i32 = 20;

impl Assembler {
    /// Copies bytes of the packet to the stack; offset in register 7 if `from` is none.
    fn packet(&mut self, from: Option<i32>, to: i16, len: i32) {
        self.mov(1, 6);
        match from {
            Some(offset) => self.set(2, offset),
            None => self.mov(2, 7),
        }
        self.place(3, to);
        self.set(4, len);
        self.call(helper::LOAD_BYTES);
        self.jump(If::NotEqual, 0, 0, "pass");
    }

    fn release(&mut self) {
        self.mov(1, 8);
        self.call(helper::RELEASE);
    }
}

/// The program for a map, with the number of the kernel's `bpf_sk_assign_tcp_reqsk`.
///
/// Register 6 is the packet, 7 the offset of the TCP header and then the map's value, 8 the TCP
/// flags and then the socket, 9 what is remembered over calls.
pub(super) fn assemble(map: i32, assign: u32) -> Vec<u8> {
    let mut a = Assembler::default();
    a.mov(6, 1);
    for at in (KEY_AT..0).step_by(8) {
        a.store_value(Double, FP, at, 0);
    }
    addresses(&mut a);
    a.label("tcp");
    a.packet(None, TCP_AT, 20);
    a.load(Word, 1, FP, TCP_AT);
    a.store(Word, FP, KEY_AT + 32, 1);
    a.store(Word, FP, TUPLE4_AT + 8, 1);
    a.load(Byte, 8, FP, TCP_FLAGS_AT);
    a.jump(If::AnyBit, 8, RST, "pass");
    a.map(1, map);
    a.place(2, KEY_AT);
    a.call(helper::MAP_LOOKUP);
    a.jump(If::Equal, 0, 0, "pass");
    a.mov(7, 0);
    a.load(Word, 9, FP, TCP_AT + 4);
    a.swap(9);
    a.load(Word, 1, 7, 0);
    a.jump(If::AnyBit, 8, SYN, "syn");
    a.jump(If::AnyBit, 8, ACK, "ack");
    a.jump(If::Always, 0, 0, "pass");
    a.label("syn");
    a.jump(If::AnyBit, 8, ACK, "pass");
    a.push(0x04, 1, 0, 0, -1);
    a.jump_reg(If::Equal, 1, 9, "drop");
    a.jump(If::Always, 0, 0, "pass");
    a.label("ack");
    // Is it the one that ends the handshake? The kernel believes every other as well.
    a.set(2, 0);
    a.jump_reg(If::NotEqual, 1, 9, "known");
    a.load(Word, 1, FP, TCP_AT + 8);
    a.swap(1);
    a.load(Word, 3, 7, 4);
    a.jump_reg(If::NotEqual, 1, 3, "known");
    a.set(2, 1);
    a.label("known");
    a.mov(9, 2);
    connection(&mut a, map, assign);
    a.label("pass");
    a.leave(0);
    a.label("release and drop");
    a.release();
    a.label("drop");
    a.leave(2);
    a.finish()
}

/// Reads the addresses into the key; register 7 becomes the offset of the TCP header.
fn addresses(a: &mut Assembler) {
    const IPV4: i32 = 0x0008;
    const IPV6: i32 = 0xdd86;
    const TCP: i32 = 6;
    a.packet(Some(12), SMALL_AT, 2);
    a.load(Half, 1, FP, SMALL_AT);
    a.jump(If::Equal, 1, IPV4, "v4");
    a.jump(If::NotEqual, 1, IPV6, "pass");
    a.packet(Some(20), SMALL_AT, 1);
    a.load(Byte, 1, FP, SMALL_AT);
    a.jump(If::NotEqual, 1, TCP, "pass");
    a.packet(Some(22), KEY_AT, 32);
    a.store_value(Word, FP, KEY_AT + 36, 6);
    a.set(7, 54);
    a.jump(If::Always, 0, 0, "tcp");
    a.label("v4");
    a.packet(Some(14), IP4_AT, 20);
    a.load(Byte, 1, FP, IP4_AT);
    a.jump(If::NotEqual, 1, 0x45, "pass");
    a.load(Byte, 1, FP, IP4_AT + 9);
    a.jump(If::NotEqual, 1, TCP, "pass");
    a.load(Word, 1, FP, IP4_AT + 12);
    a.store(Word, FP, KEY_AT, 1);
    a.store(Word, FP, TUPLE4_AT, 1);
    a.load(Word, 1, FP, IP4_AT + 16);
    a.store(Word, FP, KEY_AT + 16, 1);
    a.store(Word, FP, TUPLE4_AT + 4, 1);
    a.store_value(Word, FP, KEY_AT + 36, 4);
    a.set(7, 34);
}

/// Looks for the socket, and makes the connection if it is a listener.
fn connection(a: &mut Assembler, map: i32, assign: u32) {
    a.mov(1, 6);
    a.place(2, TUPLE4_AT);
    a.set(3, 12);
    a.load(Word, 4, FP, KEY_AT + 36);
    a.jump(If::Equal, 4, 4, "look up");
    a.place(2, KEY_AT);
    a.set(3, 36);
    a.label("look up");
    a.set(4, -1); // BPF_F_CURRENT_NETNS
    a.set(5, 0);
    a.call(helper::LOOKUP_TCP);
    a.jump(If::Equal, 0, 0, "pass");
    a.mov(8, 0);
    a.load(Word, 1, 8, SOCK_STATE);
    a.jump(If::Equal, 1, TCP_LISTEN, "listener");
    a.release();
    a.map(1, map);
    a.place(2, KEY_AT);
    a.call(helper::MAP_DELETE);
    a.jump(If::Always, 0, 0, "pass");
    a.label("listener");
    a.jump(If::Equal, 9, 0, "release and drop");
    a.mov(1, 8);
    a.call(helper::TO_TCP_SOCK);
    a.jump(If::Equal, 0, 0, "release and drop");
    a.mov(9, 0);
    for (size, at) in [(Double, 0), (Double, 8), (Word, 16)] {
        a.load(size, 1, 7, 8 + at);
        a.store(size, FP, ATTRS_AT + at, 1);
    }
    a.mov(1, 6);
    a.mov(2, 9);
    a.place(3, ATTRS_AT);
    a.set(4, ATTRS);
    a.kernel_function(assign);
    a.mov(9, 0);
    a.release();
    a.jump(If::NotEqual, 9, 0, "drop");
}
