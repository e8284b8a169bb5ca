//! BPF programs and maps: bpf(2). Just what a small program at the ingress of a device needs.

use super::error::{SysError, SysResult, check};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_CREATE: i32 = 0;
const MAP_UPDATE: i32 = 2;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const MAP_TYPE_HASH: u32 = 1;
const PROG_TYPE_SCHED_CLS: u32 = 3;
/// BPF_TCX_INGRESS.
const TCX_INGRESS: u32 = 46;
/// As much of union bpf_attr as is used here.
const ATTR: usize = 144;
/// Bytes of the verifier's log that an error shows.
const LOG: usize = 64 << 10;

/// The fields of a request, one after the other.
struct Attr([u8; ATTR], usize);

impl Attr {
    fn new() -> Self {
        Self([0; ATTR], 0)
    }

    fn word(mut self, value: u32) -> Self {
        self.0[self.1..self.1 + 4].copy_from_slice(&value.to_ne_bytes());
        self.1 += 4;
        self
    }

    fn pointer(self, bytes: &[u8]) -> Self {
        self.address(bytes.as_ptr() as u64)
    }

    fn address(mut self, address: u64) -> Self {
        self.0[self.1..self.1 + 8].copy_from_slice(&address.to_ne_bytes());
        self.1 += 8;
        self
    }

    fn call(&self, command: i32) -> i64 {
        // SAFETY: the kernel reads the request; the buffers that it points to are borrowed by the
        // callers until this returns, and the only one that is written (the log) is theirs alone.
        unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_ptr(), ATTR) }
    }

    fn open(&self, command: i32, name: &'static str, what: &str) -> SysResult<OwnedFd> {
        let fd = check(self.call(command), name, || what.to_owned())?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

/// A hash table with keys and values of these sizes.
pub fn hash_map(key: usize, value: usize, entries: u32) -> SysResult<OwnedFd> {
    let attr = Attr::new().word(MAP_TYPE_HASH).word(key as u32).word(value as u32).word(entries);
    attr.open(MAP_CREATE, "BPF_MAP_CREATE", "a hash table")
}

/// Sets an entry. The sizes must be those of the map.
pub fn set(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> SysResult<()> {
    let attr = Attr::new().word(map.as_raw_fd() as u32).word(0).pointer(key).pointer(value);
    check(attr.call(MAP_UPDATE), "BPF_MAP_UPDATE_ELEM", || "a hash table".into()).map(drop)
}

/// Loads a program for packets that arrive at a device, under the GPL as its kernel functions
/// demand.
pub fn load(instructions: &[u8]) -> SysResult<OwnedFd> {
    const LICENSE: &[u8] = b"GPL\0";
    let request = |level: u32, log: (u64, usize)| {
        Attr::new()
            .word(PROG_TYPE_SCHED_CLS)
            .word((instructions.len() / 8) as u32)
            .pointer(instructions)
            .pointer(LICENSE)
            .word(level)
            .word(log.1 as u32)
            .address(log.0)
    };
    match request(0, (0, 0)).open(PROG_LOAD, "BPF_PROG_LOAD", "a program for packets") {
        Ok(fd) => Ok(fd),
        Err(error) => {
            let mut log = vec![0u8; LOG];
            let again = request(1, (log.as_mut_ptr() as u64, LOG));
            // It fails again, and says why.
            let _ = again.open(PROG_LOAD, "BPF_PROG_LOAD", "a program for packets");
            let end = log.iter().position(|b| *b == 0).unwrap_or(LOG);
            let text = String::from_utf8_lossy(&log[..end]);
            let last = text.lines().rev().find(|l| !l.starts_with("processed")).unwrap_or("");
            let object = format!("a program for packets ({last})");
            Err(SysError { call: "BPF_PROG_LOAD", object, source: error.source })
        }
    }
}

/// Runs a program on what arrives at the device with this index of the calling thread's network
/// namespace, until the descriptor is closed.
pub fn at_ingress(program: BorrowedFd<'_>, device: u32) -> SysResult<OwnedFd> {
    let attr = Attr::new().word(program.as_raw_fd() as u32).word(device).word(TCX_INGRESS);
    attr.open(LINK_CREATE, "BPF_LINK_CREATE", "the ingress of the container's device")
}
