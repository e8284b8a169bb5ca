//! The kernel, one facility a file. This is the only module of the project with `unsafe` code;
//! each block says why it is sound, and each function wraps one system call or request.
#![allow(unsafe_code)]

pub mod alarm;
pub mod birth;
pub mod bpf;
pub mod descriptors;
pub mod error;
pub mod file_range;
pub(crate) mod grace;
pub mod inet_diag;
pub mod inotify;
pub mod limits;
pub mod local_time;
pub mod locks;
pub mod loopback;
pub mod memory;
pub mod messages;
pub mod mount;
pub mod namespace;
pub mod packet;
pub mod pagemap;
pub mod pidfd;
pub mod probe;
pub mod procmap;
pub mod ptrace;
pub mod pty;
pub mod remote;
pub mod route;
pub mod sched;
pub mod shmem;
pub mod sockopt;
pub mod sysv;
pub mod tap;
pub mod uffd;
pub mod unix_diag;
pub mod xattr;

pub use error::{SysError, SysResult};
