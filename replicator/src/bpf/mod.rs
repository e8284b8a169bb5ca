//! BPF programs without a compiler: an assembler, and the kernel's own type information.

pub(crate) mod asm;
pub(crate) mod btf;
