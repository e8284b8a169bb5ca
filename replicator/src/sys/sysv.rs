//! System V semaphores, messages and shared memory of the ipc namespace that the calling thread is
//! in.

use super::error::{SysError, SysResult, check};
use std::fs::{File, OpenOptions};

/// MSG_COPY: read a message by its index, and leave it in the queue.
const MSG_COPY: i32 = 0o40000;

/// The values of a set of semaphores.
pub fn semaphore_values(id: i32, count: usize) -> SysResult<Vec<u16>> {
    let mut values = vec![0u16; count];
    // SAFETY: GETALL writes one u16 for each semaphore of the set, whose number the caller has
    // from the kernel; a set never changes its number, and an id that was used again is refused
    // by the caller's own look at the list, in which the container stands still.
    let r = unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) };
    check(r.into(), "semctl(GETALL)", || format!("semaphores {id}"))?;
    Ok(values)
}

/// Makes a set of semaphores with these values, under the id that was asked for before.
pub fn make_semaphores(key: i32, mode: u32, values: &[u16]) -> SysResult<i32> {
    let flags = mode as i32 | libc::IPC_CREAT | libc::IPC_EXCL;
    // SAFETY: no pointers.
    let id = unsafe { libc::semget(key, values.len() as i32, flags) };
    let id = check(id.into(), "semget", || format!("key {key:#x}"))? as i32;
    // SAFETY: SETALL reads one u16 for each semaphore of the set just made.
    let r = unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) };
    check(r.into(), "semctl(SETALL)", || format!("semaphores {id}"))?;
    Ok(id)
}

/// Most bytes that a message queue may hold.
pub fn queue_limit(id: i32) -> SysResult<u64> {
    Ok(queue_status(id)?.msg_qbytes)
}

fn queue_status(id: i32) -> SysResult<libc::msqid_ds> {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut status: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT writes one struct msqid_ds.
    let r = unsafe { libc::msgctl(id, libc::IPC_STAT, &mut status) };
    check(r.into(), "msgctl(IPC_STAT)", || format!("message queue {id}"))?;
    Ok(status)
}

/// Type and text of the message at an index, which stays in the queue; none behind the last.
pub fn peek_message(id: i32, index: usize, longest: usize) -> SysResult<Option<(i64, Vec<u8>)>> {
    let mut buffer = vec![0u8; 8 + longest];
    let flags = MSG_COPY | libc::IPC_NOWAIT | libc::MSG_NOERROR;
    // SAFETY: `buffer` has room for the type and `longest` bytes of text.
    let n = unsafe {
        libc::msgrcv(id, buffer.as_mut_ptr().cast(), longest, index as libc::c_long, flags)
    };
    if n < 0 {
        let error = SysError::last("msgrcv(MSG_COPY)", format!("message queue {id}"));
        return if error.code() == libc::ENOMSG { Ok(None) } else { Err(error) };
    }
    buffer.truncate(8 + n as usize);
    let text = buffer.split_off(8);
    Ok(Some((i64::from_ne_bytes(buffer.try_into().expect("eight bytes")), text)))
}

/// Makes a message queue, under the id that was asked for before, that may hold this many bytes.
pub fn make_queue(key: i32, mode: u32, max_bytes: u64) -> SysResult<i32> {
    // SAFETY: no pointers.
    let id = unsafe { libc::msgget(key, mode as i32 | libc::IPC_CREAT | libc::IPC_EXCL) };
    let id = check(id.into(), "msgget", || format!("key {key:#x}"))? as i32;
    let mut status = queue_status(id)?;
    if status.msg_qbytes != max_bytes {
        status.msg_qbytes = max_bytes;
        // SAFETY: IPC_SET reads one struct msqid_ds.
        let r = unsafe { libc::msgctl(id, libc::IPC_SET, &mut status) };
        check(r.into(), "msgctl(IPC_SET)", || format!("message queue {id}"))?;
    }
    Ok(id)
}

/// Appends a message.
pub fn send_message(id: i32, kind: i64, text: &[u8]) -> SysResult<()> {
    let mut buffer = kind.to_ne_bytes().to_vec();
    buffer.extend_from_slice(text);
    // SAFETY: `buffer` holds the type and `text`.
    let r = unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) };
    check(r.into(), "msgsnd", || format!("message queue {id}")).map(drop)
}

/// Gives a semaphore set, a queue or a segment to a user and group, with these permission bits.
pub fn give(kind: Kind, id: i32, uid: u32, gid: u32, mode: u32) -> SysResult<()> {
    macro_rules! set {
        ($type:ty, $perm:ident, $get:expr, $set:expr) => {{
            // SAFETY: a structure of integers, for which zero is a value.
            let mut status: $type = unsafe { std::mem::zeroed() };
            // SAFETY: IPC_STAT writes one such structure.
            let r = unsafe { $get(&mut status) };
            check(r.into(), "IPC_STAT", || format!("{kind:?} {id}"))?;
            (status.$perm.uid, status.$perm.gid, status.$perm.mode) = (uid, gid, mode as _);
            // SAFETY: IPC_SET reads one such structure.
            let r = unsafe { $set(&mut status) };
            check(r.into(), "IPC_SET", || format!("{kind:?} {id}")).map(drop)
        }};
    }
    match kind {
        Kind::Semaphores => set!(
            libc::semid_ds,
            sem_perm,
            |s: *mut _| libc::semctl(id, 0, libc::IPC_STAT, s),
            |s: *mut _| libc::semctl(id, 0, libc::IPC_SET, s)
        ),
        Kind::Messages => set!(
            libc::msqid_ds,
            msg_perm,
            |s: *mut _| libc::msgctl(id, libc::IPC_STAT, s),
            |s: *mut _| libc::msgctl(id, libc::IPC_SET, s)
        ),
        Kind::Segment => set!(
            libc::shmid_ds,
            shm_perm,
            |s: *mut _| libc::shmctl(id, libc::IPC_STAT, s),
            |s: *mut _| libc::shmctl(id, libc::IPC_SET, s)
        ),
    }
}

/// Kinds of System V objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after what they are")]
pub enum Kind {
    Semaphores,
    Messages,
    Segment,
}

/// Makes a segment of shared memory, under the id that was asked for before.
pub fn make_segment(key: i32, size: u64, mode: u32) -> SysResult<i32> {
    let flags = mode as i32 | libc::IPC_CREAT | libc::IPC_EXCL;
    // SAFETY: no pointers.
    let id = unsafe { libc::shmget(key, size as usize, flags) };
    Ok(check(id.into(), "shmget", || format!("key {key:#x}, {size} bytes"))? as i32)
}

/// Whether there is a segment with this id, key and size.
pub fn has_segment(id: i32, key: i32, size: u64) -> bool {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut status: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT writes one struct shmid_ds.
    let r = unsafe { libc::shmctl(id, libc::IPC_STAT, &mut status) };
    r == 0 && status.shm_perm.__key == key && status.shm_segsz as u64 == size
}

/// Marks a segment to be deleted: it goes when the last process that has it detaches.
pub fn delete_segment(id: i32) -> SysResult<()> {
    // SAFETY: IPC_RMID takes no structure.
    let r = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    check(r.into(), "shmctl(IPC_RMID)", || format!("segment {id}")).map(drop)
}

/// A descriptor of a segment's memory: attached for a moment and opened by way of
/// /proc/self/map_files.
pub fn open_segment(id: i32, size: u64, write: bool) -> SysResult<File> {
    let flags = if write { 0 } else { libc::SHM_RDONLY };
    // SAFETY: attached at an address of the kernel's choice, which nothing refers to.
    let at = unsafe { libc::shmat(id, std::ptr::null(), flags) };
    if at as isize == -1 {
        return Err(SysError::last("shmat", format!("segment {id}")));
    }
    let end = at as u64 + size.next_multiple_of(4096);
    let path = format!("/proc/self/map_files/{:x}-{end:x}", at as u64);
    let file = OpenOptions::new().read(true).write(write).open(&path);
    // SAFETY: exactly what was attached above, which nothing refers to.
    unsafe { libc::shmdt(at) };
    file.map_err(|source| SysError { call: "open", object: path, source })
}
