//! Holds one TCP connection: standard input goes to it, what comes back to standard output. Ends
//! when either side does, and with an error if the connection breaks or is silent for too long
//! while the other side owes an answer.
//!
//! `relay ADDRESS SECONDS`, or `relay --listen ADDRESS` to take a port and keep it, or
//! `relay --give ADDRESS BYTES MILLISECONDS` to write so many bytes to all that connect and close
//! after so long,
//! or `relay --fetch ADDRESS BYTES CONNECTIONS` to connect so often, eight at a time, and get them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--listen", address] => keep(address),
        ["--give", address, bytes, pause] => give(address, bytes, pause),
        ["--fetch", address, bytes, times] => fetch(address, bytes, times),
        [address, seconds] => relay(address, seconds),
        _ => Err("usage: relay ADDRESS SECONDS | relay --listen ADDRESS".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("relay: {error}");
            ExitCode::FAILURE
        }
    }
}

type Result = std::result::Result<(), Box<dyn std::error::Error>>;

/// Takes a port until it is killed; what connects gets an answer that no agent would give.
fn keep(address: &str) -> Result {
    for connection in TcpListener::bind(address)?.incoming() {
        connection?.write_all(b"taken\n")?;
    }
    Ok(())
}

/// Gives everyone the same bytes. As much as the kernel takes waits in its send buffer.
fn give(address: &str, bytes: &str, pause: &str) -> Result {
    let pause = Duration::from_millis(pause.parse()?);
    let all: Vec<u8> = (0..bytes.parse::<usize>()?).map(|i| (i % 251) as u8).collect();
    for connection in TcpListener::bind(address)?.incoming() {
        let mut connection = connection?;
        nix::sys::socket::setsockopt(&connection, nix::sys::socket::sockopt::SndBuf, &(1 << 20))?;
        // Who only looks whether somebody listens wants nothing.
        if connection.write_all(&all).is_ok() {
            std::thread::sleep(pause);
            drop(connection);
            println!("gave all");
        }
    }
    Ok(())
}

/// One connection after the other, in eight threads; each must bring everything and end well.
fn fetch(address: &str, bytes: &str, times: &str) -> Result {
    const THREADS: usize = 8;
    let (bytes, times): (usize, usize) = (bytes.parse()?, times.parse()?);
    let one = || -> std::io::Result<()> {
        let mut got = Vec::new();
        TcpStream::connect(address)?.read_to_end(&mut got)?;
        match got.len() == bytes && got.iter().enumerate().all(|(i, b)| *b == (i % 251) as u8) {
            true => Ok(()),
            false => Err(std::io::Error::other(format!("{} of {bytes} bytes", got.len()))),
        }
    };
    std::thread::scope(|scope| {
        let loops =
            (0..THREADS).map(|_| scope.spawn(|| (0..times / THREADS).try_for_each(|_| one())));
        let loops: Vec<_> = loops.collect();
        loops
            .into_iter()
            .try_for_each(|l| l.join().unwrap_or_else(|_| Err(ErrorKind::Other.into())))
    })?;
    Ok(())
}

fn relay(address: &str, seconds: &str) -> Result {
    let mut from = TcpStream::connect(address)?;
    from.set_read_timeout(Some(Duration::from_secs(seconds.parse()?)))?;
    let mut to = from.try_clone()?;
    let finished = Arc::new(AtomicBool::new(false));
    let told = finished.clone();
    std::thread::spawn(move || {
        let copied = std::io::copy(&mut std::io::stdin(), &mut to);
        told.store(true, Ordering::SeqCst);
        // Where the connection is over, reading tells.
        let _ = copied.and_then(|_| to.shutdown(Shutdown::Write));
    });
    let mut out = std::io::stdout();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                out.write_all(&buffer[..count])?;
                out.flush()?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Nobody waits for an answer any more.
            Err(_) if finished.load(Ordering::SeqCst) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
