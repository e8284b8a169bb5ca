//! The control socket: one JSON request a line, one JSON answer a line.

use super::status::{AgentStatus, Request, control_socket};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// Requests are short; a longer line is not one.
const MAX_LINE: u64 = 4096;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks the agent of a host of a lab.
///
/// # Errors
/// No agent listens there (it was not started, or is gone), or it does not answer.
pub fn request(lab: &str, host: &str, request: &Request) -> Result<AgentStatus> {
    let path = control_socket(lab, host);
    let mut stream = UnixStream::connect(&path)
        .with_context(|| format!("no agent of host {host} answers at {}", path.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    serde_json::from_str(&answer)
        .with_context(|| format!("the agent of host {host} answered {:?}", answer.trim_end()))
}

/// Claims the control socket of a host: whoever has it is the host's agent. A socket file that a
/// killed agent left behind is replaced; one that answers is an error.
pub(super) fn claim(lab: &str, host: &str) -> Result<UnixListener> {
    let path = control_socket(lab, host);
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    if UnixStream::connect(&path).is_ok() {
        bail!("another agent of host {host} listens at {}; stop it first", path.display());
    }
    let _ = std::fs::remove_file(&path);
    UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))
}

/// Serves the control socket from a thread of its own.
pub(super) fn serve(
    listener: UnixListener,
    handle: impl Fn(Request) -> AgentStatus + Send + 'static,
) -> Result<()> {
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = answer(stream, &handle) {
                tracing::debug!(%error, "control connection");
            }
        }
    })?;
    Ok(())
}

fn answer(stream: UnixStream, handle: &impl Fn(Request) -> AgentStatus) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(std::io::Read::take(&stream, MAX_LINE)).read_line(&mut line)?;
    let request = serde_json::from_str(&line)?;
    let status = handle(request);
    let mut text = serde_json::to_string(&status)?;
    text.push('\n');
    (&stream).write_all(text.as_bytes())?;
    Ok(())
}
