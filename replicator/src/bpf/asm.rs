//! An assembler for BPF: programs are put together here, so that the build needs no compiler for
//! them.

use std::collections::HashMap;

/// Frame pointer.
pub(crate) const FP: u8 = 10;

/// Helper functions by their numbers (bpf-helpers(7)).
pub(crate) mod helper {
    pub(crate) const MAP_LOOKUP: i32 = 1;
    pub(crate) const MAP_DELETE: i32 = 3;
    pub(crate) const KTIME: i32 = 5;
    pub(crate) const CURRENT_IDS: i32 = 14;
    pub(crate) const REDIRECT: i32 = 23;
    pub(crate) const LOAD_BYTES: i32 = 26;
    pub(crate) const RELEASE: i32 = 86;
    pub(crate) const LOOKUP_TCP: i32 = 99;
    pub(crate) const PROBE_READ: i32 = 113;
    pub(crate) const SEQ_WRITE: i32 = 127;
    pub(crate) const TO_TCP_SOCK: i32 = 137;
    pub(crate) const CURRENT_TASK: i32 = 158;
    pub(crate) const SOCK_FROM_FILE: i32 = 162;
}

/// Sizes of loads and stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

/// Jumps.
#[derive(Clone, Copy, Debug)]
pub(crate) enum If {
    Always = 0x05,
    Equal = 0x15,
    NotEqual = 0x55,
    AnyBit = 0x45,
    /// As numbers without sign.
    AtLeast = 0x35,
    Above = 0x25,
    /// As numbers with a sign.
    Less = 0xc5,
}

type Label = &'static str;

/// A program that is being written.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    code: Vec<[u8; 8]>,
    labels: HashMap<Label, usize>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    pub(crate) fn push(&mut self, code: u8, dst: u8, src: u8, off: i16, imm: i32) {
        let [o0, o1] = off.to_le_bytes();
        let [a, b, c, d] = imm.to_le_bytes();
        self.code.push([code, dst | src << 4, o0, o1, a, b, c, d]);
    }

    pub(crate) fn label(&mut self, name: Label) {
        self.labels.insert(name, self.code.len());
    }

    pub(crate) fn mov(&mut self, dst: u8, src: u8) {
        self.push(0xbf, dst, src, 0, 0);
    }

    pub(crate) fn set(&mut self, dst: u8, value: i32) {
        self.push(0xb7, dst, 0, 0, value);
    }

    pub(crate) fn add(&mut self, dst: u8, value: i32) {
        self.push(0x07, dst, 0, 0, value);
    }

    pub(crate) fn add_reg(&mut self, dst: u8, src: u8) {
        self.push(0x0f, dst, src, 0, 0);
    }

    pub(crate) fn multiply(&mut self, dst: u8, value: i32) {
        self.push(0x27, dst, 0, 0, value);
    }

    pub(crate) fn or_reg(&mut self, dst: u8, src: u8) {
        self.push(0x4f, dst, src, 0, 0);
    }

    pub(crate) fn xor_reg(&mut self, dst: u8, src: u8) {
        self.push(0xaf, dst, src, 0, 0);
    }

    /// Keeps only these bits.
    pub(crate) fn mask(&mut self, dst: u8, bits: i32) {
        self.push(0x57, dst, 0, 0, bits);
    }

    pub(crate) fn shift_left(&mut self, dst: u8, bits: i32) {
        self.push(0x67, dst, 0, 0, bits);
    }

    pub(crate) fn shift_right(&mut self, dst: u8, bits: i32) {
        self.push(0x77, dst, 0, 0, bits);
    }

    /// By as many bits as another register says.
    pub(crate) fn shift_right_reg(&mut self, dst: u8, src: u8) {
        self.push(0x7f, dst, src, 0, 0);
    }

    /// The address of a place on the stack.
    pub(crate) fn place(&mut self, dst: u8, at: i16) {
        self.mov(dst, FP);
        self.add(dst, i32::from(at));
    }

    pub(crate) fn load(&mut self, size: Size, dst: u8, base: u8, at: i16) {
        self.push(0x61 | size as u8, dst, base, at, 0);
    }

    pub(crate) fn store(&mut self, size: Size, base: u8, at: i16, src: u8) {
        self.push(0x63 | size as u8, base, src, at, 0);
    }

    pub(crate) fn store_value(&mut self, size: Size, base: u8, at: i16, value: i32) {
        self.push(0x62 | size as u8, base, 0, at, value);
    }

    /// Adds a register to a word of eight bytes in memory, which is left in the register as it was
    /// before.
    pub(crate) fn fetch_add(&mut self, base: u8, at: i16, reg: u8) {
        self.push(0xdb, base, reg, at, 0x01);
    }

    /// From the network's order of bytes.
    pub(crate) fn swap(&mut self, reg: u8) {
        self.push(0xdc, reg, 0, 0, 32);
    }

    pub(crate) fn jump(&mut self, when: If, reg: u8, value: i32, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(when as u8, reg, 0, 0, value);
    }

    /// Compares two registers.
    pub(crate) fn jump_reg(&mut self, when: If, reg: u8, other: u8, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(when as u8 | 0x08, reg, other, 0, 0);
    }

    /// The head of a loop without a bound that the verifier knows: the kernel counts, and jumps when it
    /// has had enough (eight million times).
    pub(crate) fn patience(&mut self, or: Label) {
        self.jumps.push((self.code.len(), or));
        self.push(0xe5, 0, 0, 0, 0);
    }

    pub(crate) fn call(&mut self, helper: i32) {
        self.push(0x85, 0, 0, 0, helper);
    }

    pub(crate) fn kernel_function(&mut self, id: u32) {
        self.push(0x85, 0, 2, 0, id as i32);
    }

    pub(crate) fn map(&mut self, dst: u8, fd: i32) {
        self.push(0x18, dst, 1, 0, fd);
        self.push(0, 0, 0, 0, 0);
    }

    /// The address of the only value of a map.
    pub(crate) fn map_value(&mut self, dst: u8, fd: i32) {
        self.push(0x18, dst, 2, 0, fd);
        self.push(0, 0, 0, 0, 0);
    }

    /// Ends the program with this result.
    pub(crate) fn leave(&mut self, verdict: i32) {
        self.set(0, verdict);
        self.end();
    }

    /// Ends the program with what register 0 says.
    pub(crate) fn end(&mut self) {
        self.push(0x95, 0, 0, 0, 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        for (at, label) in &self.jumps {
            let distance = self.labels[label] as i16 - *at as i16 - 1;
            self.code[*at][2..4].copy_from_slice(&distance.to_le_bytes());
        }
        self.code.concat()
    }
}
