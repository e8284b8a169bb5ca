//! A program in a container that a test tells what to do.

use crate::Bed;

/// A server that does what it is told in Python, and answers with what came of it.
pub const OBEDIENT: &str = "\
import os, socket, subprocess
def paths():
    mapped = {line.split()[5] for line in open('/proc/self/maps') if '/' in line}
    return [os.readlink('/proc/self/exe')] + sorted(mapped)
server = socket.create_server(('0.0.0.0', 7000))
while True:
    peer, _ = server.accept()
    told = peer.recv(65536).decode()
    try:
        try:
            answer = eval(told, globals())
        except SyntaxError:
            exec(told, globals())
            answer = 'done'
    except Exception as error:
        answer = repr(error)
    peer.sendall(str(answer).encode())
    peer.close()
";

/// Tells it, from the client of a bed whose container it is; gives its answer.
pub fn tell(bed: &Bed, told: &str) -> String {
    let call = "import socket, sys; s = socket.create_connection(('10.77.0.10', 7000)); \
                s.sendall(sys.argv[1].encode()); print(s.recv(65536).decode())";
    bed.exec("client", &["python3", "-c", call, told]).expect_success().stdout.trim().to_owned()
}
