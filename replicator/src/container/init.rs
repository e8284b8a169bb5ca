//! Pid 1 of a new container, before it becomes the command: the other half of
//! [`launch`](super::launch), in a process of its own with a single thread.

use super::{GO, Order, Report, Role, SHM, receive, send};
use crate::sys::{descriptors, loopback};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{sethostname, setsid};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Where its pseudo terminals are.
const PTS: &str = "/dev/pts";

/// The argument that makes our binary a container's init.
pub const INIT_COMMAND: &str = "__container-init";

/// What could not be done, in words.
struct Failure(String);

fn failed<E: std::fmt::Display>(doing: impl std::fmt::Display) -> impl FnOnce(E) -> Failure {
    move |e| Failure(format!("cannot {doing}: {e}"))
}

/// Runs the hidden subcommand [`INIT_COMMAND`]: standard input is the socket to the launcher.
/// Call it before any thread is started.
pub fn init_main() -> ! {
    let code = match control() {
        Ok(mut control) => match run(&mut control) {
            Ok(()) => 0,
            Err(Failure(reason)) => {
                // If the launcher is gone too, nobody is left to tell.
                let _ = send(&mut control, &Report::Failed(reason));
                1
            }
        },
        Err(e) => {
            eprintln!("{INIT_COMMAND} is for internal use: no socket on standard input: {e}");
            2
        }
    };
    std::process::exit(code)
}

fn control() -> io::Result<UnixStream> {
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    control.peer_addr()?;
    Ok(control)
}

fn run(control: &mut UnixStream) -> Result<(), Failure> {
    let order = receive::<Order>(control).map_err(failed("read the launcher's order"))?;
    let Some(Order { spec, role }) = order else { return Ok(()) };
    descriptors::close_on_exec_from(3).map_err(failed("close inherited descriptors"))?;
    enter_namespaces(&spec.hostname)?;
    spec.tmpfs.iter().try_for_each(|at| mount_tmpfs(at))?;
    spec.read_only.iter().try_for_each(|at| mount_read_only(at))?;
    let console = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&spec.console)
        .map_err(failed(format_args!("open the console {}", spec.console.display())))?;
    send(control, &Report::Ready).map_err(failed("report"))?;
    let mut byte = [0];
    // The end of the stream means that the launcher is gone, and with it the container.
    if control.read(&mut byte).map_err(failed("wait"))? == 0 || byte[0] != GO {
        return Ok(());
    }
    match role {
        Role::Start => Err(execute(&spec, console)),
        Role::Spare => Err(Failure("a spare runs no command".into())),
    }
}

fn enter_namespaces(hostname: &str) -> Result<(), Failure> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    unshare(flags).map_err(failed("make mount, net, uts and ipc namespaces (needs root)"))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(failed("make mounts private"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none).map_err(failed("mount /proc"))?;
    if std::path::Path::new(SHM).is_dir() {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), SHM, Some("tmpfs"), flags, Some("mode=1777"))
            .map_err(failed(format_args!("mount a tmpfs at {SHM}")))?;
    }
    if std::path::Path::new(PTS).is_dir() {
        // Of its own, so that terminals have the same numbers wherever it runs.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let options = Some("newinstance,ptmxmode=0666,mode=0620,gid=5");
        mount(Some("devpts"), PTS, Some("devpts"), flags, options)
            .map_err(failed(format_args!("mount a devpts at {PTS}")))?;
        let (from, to) = ("/dev/pts/ptmx", "/dev/ptmx");
        let is_link = std::fs::symlink_metadata(to).is_ok_and(|m| m.is_symlink());
        if std::path::Path::new(to).exists() && !is_link {
            mount(Some(from), to, none, MsFlags::MS_BIND, none)
                .map_err(failed(format_args!("bind {from} to {to}")))?;
        }
    }
    sethostname(hostname).map_err(failed(format_args!("set the host name {hostname:?}")))?;
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(failed("make a socket"))?;
    loopback::up(any.as_fd()).map_err(failed("bring lo up"))?;
    // A session of its own: with a number inside the namespace, a spare can be given the same.
    setsid().map_err(failed("start a session"))?;
    Ok(())
}

/// A tmpfs of the container's own.
fn mount_tmpfs(at: &std::path::Path) -> Result<(), Failure> {
    std::fs::create_dir_all(at)
        .map_err(failed(format_args!("make the directory {}", at.display())))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some("mode=0755"))
        .map_err(failed(format_args!("mount a tmpfs at {}", at.display())))
}

/// The host's directory, at the same place, without the right to write.
fn mount_read_only(at: &std::path::Path) -> Result<(), Failure> {
    let none: Option<&str> = None;
    mount(Some(at), at, none, MsFlags::MS_BIND, none)
        .map_err(failed(format_args!("mount the read-only volume {}", at.display())))?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, at, none, flags, none)
        .map_err(failed(format_args!("make the volume {} read-only", at.display())))
}

/// Becomes the command; gives the reason if that fails.
fn execute(spec: &super::ContainerSpec, console: File) -> Failure {
    let Some((program, arguments)) = spec.command.split_first() else {
        return Failure("the command is empty; name a program to run".into());
    };
    let stdout = match console.try_clone() {
        Ok(copy) => copy,
        Err(e) => return failed("duplicate the console")(e),
    };
    let error = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(spec.env.iter().map(|(k, v)| (k, v)))
        .current_dir(&spec.workdir)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(console)
        .exec();
    let workdir = spec.workdir.display();
    let hint = match error.kind() {
        io::ErrorKind::NotFound if !spec.workdir.is_dir() => {
            format!(" (the working directory {workdir} is not there)")
        }
        io::ErrorKind::NotFound => " (no such program; give its full path or set PATH)".into(),
        _ => String::new(),
    };
    Failure(format!("cannot run {program}: {error}{hint}"))
}
