use super::{Again, Shape};
use crate::bpf::btf::Btf;
use crate::capture::glance::{Glance, TcpLayout};
use crate::capture::helpers::Help;
use crate::sys::pagemap::Buffer;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};

/// A program with a connection within itself that does what it is told.
const PROGRAM: &str = "
import socket, sys
listener = socket.create_server(('127.0.0.1', 0))
a = socket.create_connection(listener.getsockname())
b, _ = listener.accept()
more = []
print('ready', a.fileno(), b.fileno(), flush=True)
for line in sys.stdin:
    exec(line)
    print('done', flush=True)
";

struct Subject {
    child: Child,
    input: ChildStdin,
    output: BufReader<std::process::ChildStdout>,
    ends: [i32; 2],
}

impl Subject {
    fn start() -> Self {
        let piped = || Stdio::piped();
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(piped())
            .stdout(piped())
            .spawn()
            .expect("python3 is installed");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut me = Self { child, input, output, ends: [0; 2] };
        let ready = me.line();
        let numbers = ready.split_whitespace().skip(1).map(|n| n.parse().expect("a number"));
        numbers.zip(&mut me.ends).for_each(|(n, end)| *end = n);
        me
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a line");
        line
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.input, "{what}").expect("told");
        assert_eq!(self.line(), "done\n");
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A glance at a program, if this kernel has glances; also of few descriptors later looks need not walk.
fn glance_at(subject: &Subject) -> Option<Glance> {
    let glance = Glance::open(subject.child.id() as i32).map(Glance::always_again);
    if glance.is_none() {
        println!("skipped: no glances");
    }
    glance
}

/// The numbers of the connections that the last look has shown to be others; none: it walked.
fn changed(glance: &Glance) -> Option<Vec<i32>> {
    let rows = glance.changed()?.iter().map(|nth| glance.nth(*nth as usize));
    Some(rows.filter(|row| row.tcp.is_some()).map(|row| row.number()).collect())
}

#[test]
fn later_looks_show_what_has_changed_and_nothing_else() {
    let mut subject = Subject::start();
    let [a, b] = subject.ends;
    let Some(mut glance) = glance_at(&subject) else { return };
    glance.look().expect("a walk");
    assert_eq!(changed(&glance), None);
    glance.learn();
    assert!(glance.time().is_some(), "it has learned");
    for (what, expected) in [
        ("pass", vec![]),
        ("a.send(b'x')", vec![a, b]),
        ("pass", vec![]),
        ("b.recv(1)", vec![b]),
        ("a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)", vec![a]),
        ("b.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 9)", vec![b]),
        ("b.setblocking(False)", vec![b]),
        ("import os; os.set_inheritable(a.fileno(), True)", vec![a]),
        ("pass", vec![]),
    ] {
        subject.tell(what);
        // What is acknowledged late.
        std::thread::sleep(std::time::Duration::from_millis(200));
        glance.look().expect("a look");
        let mut seen = changed(&glance).expect("it need not walk");
        seen.sort_unstable();
        let mut expected = expected;
        expected.sort_unstable();
        assert_eq!(seen, expected, "{what}");
        let again: Vec<_> = glance.rows().map(|row| (row.number(), row.flags())).collect();
        glance.look().expect("a look");
        assert_eq!(changed(&glance), Some(Vec::new()), "{what}");
        let mut walk = Glance::open(subject.child.id() as i32).expect("as before");
        walk.look().expect("a walk");
        let walked: Vec<_> = walk.rows().map(|row| (row.number(), row.flags())).collect();
        assert_eq!(again, walked, "{what}");
    }
    assert!(glance.stands_still().expect("a look"));
    subject.tell("a.send(b'y')");
    assert!(!glance.stands_still().expect("a look"), "it has moved on");
    for what in ["more.append(os.dup(1))", "os.close(more.pop())", "more.append(socket.socket())"] {
        subject.tell(what);
        glance.look().expect("a look");
        assert_eq!(changed(&glance), None, "{what}");
        glance.learn();
    }
    // The same numbers, and another file at one of them.
    subject.tell("os.dup2(1, more[0].fileno())");
    glance.look().expect("a look");
    assert_eq!(changed(&glance), None, "another file");
}

/// How much of a look a helper takes.
#[derive(Clone, Copy, Debug)]
enum Helped {
    All,
    Some,
    Nothing,
}

#[test]
fn a_look_that_a_helper_takes_part_in_shows_the_same() {
    let mut subject = Subject::start();
    let [a, b] = subject.ends;
    let Some(mut glance) = glance_at(&subject) else { return };
    subject.tell("more.extend(socket.socket() for _ in range(300))");
    glance.look().expect("a walk");
    glance.learn();
    if glance.time().is_none() {
        println!("skipped: later looks walk on this kernel");
        return;
    }
    for round in 0..9 {
        let helped = [Helped::All, Helped::Some, Helped::Nothing][round % 3];
        // Of the first entries, of those in the middle, and of the last ones.
        let at = [0, 150, 299][round / 3];
        let what = format!("print(more[{at}].fileno(), flush=True)");
        writeln!(subject.input, "{what}").expect("told");
        let number: i32 = subject.line().trim().parse().expect("a number");
        assert_eq!(subject.line(), "done\n");
        let change = format!(
            "a.send(b'x'); b.recv(1); more[{at}].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, {})",
            (round % 3 + 1) % 2
        );
        subject.tell(&change);
        // What is acknowledged late.
        std::thread::sleep(std::time::Duration::from_millis(200));
        let pieces = glance.begin().expect("much to look at");
        assert!(pieces.is_worth_it());
        let help = || pieces.help(&mut Buffer::default());
        std::thread::scope(|scope| {
            let helper = match helped {
                Helped::All => {
                    help();
                    None
                }
                Helped::Some => Some(scope.spawn(help)),
                Helped::Nothing => None,
            };
            glance.look().expect("a look");
            if let Some(helper) = helper {
                helper.join().expect("no panic");
            }
        });
        let mut seen = changed(&glance).expect("it need not walk");
        seen.sort_unstable();
        let mut expected = vec![a, b, number];
        expected.sort_unstable();
        assert_eq!(seen, expected, "{helped:?}, {change}");
        // Who comes late finds nothing to do.
        help();
        glance.look().expect("a look");
        assert_eq!(changed(&glance), Some(Vec::new()), "{helped:?}");
    }
    // What a look has found that was begun and not followed is not lost.
    subject.tell("a.send(b'y')");
    let pieces = glance.begin().expect("much to look at");
    pieces.help(&mut Buffer::default());
    assert!(glance.begin().is_none());
    glance.look().expect("a walk");
    assert_eq!(changed(&glance), None);
    // Another number, and another file at one of them, seen by whoever looks there.
    glance.learn();
    subject.tell("import os; more.append(os.dup(1))");
    assert!(glance.begin().is_none(), "another table");
    glance.look().expect("a walk");
    assert_eq!(changed(&glance), None, "another table");
    glance.learn();
    subject.tell("os.dup2(1, more[200].fileno())");
    let pieces = glance.begin().expect("the same numbers");
    pieces.help(&mut Buffer::default());
    glance.look().expect("a walk");
    assert_eq!(changed(&glance), None, "another file");
}

#[test]
fn a_look_that_does_not_come_to_the_last_entry_says_so() {
    if Glance::open(std::process::id() as i32).is_none() {
        println!("skipped: no glances");
        return;
    }
    let btf = Btf::of_kernel().expect("there are glances");
    let shape = TcpLayout::new(&btf).and_then(|tcp| Shape::new(&btf, &tcp));
    let Ok(shape) = shape else {
        println!("skipped: later looks walk on this kernel");
        return;
    };
    let mut again = Again::open(&shape, std::process::id() as i32, 1).expect("loaded");
    let room = again.places.capacity;
    assert!(again.has_room(room) && !again.has_room(room + 1));
    // Entries without addresses: all reads as zero.
    let mut run = |to| again.look.run(0, to).expect("a look");
    assert!(run(0) && run(room));
    assert!(!run(room + 1), "the last one was not looked at");
}
