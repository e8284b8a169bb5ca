//! `docs/coverage.md` is made of `tests/coverage.txt`, the verdicts by kind, and `tests/results.txt`,
//! what a run of all tests printed. `NILICON_BLESS=1` writes the page anew; with
//! `NILICON_RESULTS=FILE` it first takes over the results in the output of such a run.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Kinds that must have a row: those that a user would ask for by name.
const WANTED: &str = "parents orphans sessions zombies threads names users capabilities securebits \
    no_new_privs limits nice policy affinity umask working chroot personality parent-death \
    subreaper dumpable oom_score_adj seccomp anonymous private memfd huge stacks mlock madvise \
    PROT_NONE vdso AVX directories O_PATH deleted pipes eventfd epoll timerfd signalfd inotify \
    pidfd null namespaces descriptions CLOEXEC owners flock POSIX leases stream seqpacket pending \
    SCM_RIGHTS credentials abstract UDP ICMP netlink TCP masks alternate interval waits clocks \
    semaphores messages uts tmpfs pty queues mount nested user robust restartable membarrier io_uring AIO";

struct Row {
    kind: String,
    verdicts: [String; 2],
    notes: String,
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Groups of rows, by the headings in the table.
fn groups() -> Vec<(String, Vec<Row>)> {
    let text = read("tests/coverage.txt");
    let mut all: Vec<(String, Vec<Row>)> = Vec::new();
    for paragraph in text.split("\n\n").skip(1) {
        let (heading, rows) = paragraph.split_once('\n').expect("a heading and rows");
        let row = |line: &str| {
            let mut cells = line.split(" | ").map(|cell| cell.trim().to_owned());
            let mut cell = || cells.next().unwrap_or_default();
            Row { kind: cell(), verdicts: [cell(), cell()], notes: cell() }
        };
        let heading = heading.strip_prefix("# ").expect("a heading");
        all.push((heading.to_owned(), rows.trim_end().lines().map(row).collect()));
    }
    all
}

fn is_none(verdict: &str) -> bool {
    verdict.starts_with("refused") || verdict.starts_with("not ")
}

/// What passed, by the lines of `tests/results.txt`.
fn results() -> BTreeSet<String> {
    read("tests/results.txt").lines().map(str::to_owned).collect()
}

/// Names in the output of tests: `kind NAME ok`, and `test NAME ... ok` of cargo.
fn passed(output: &str) -> BTreeSet<String> {
    let kind = |line: &str| Some(line.strip_prefix("kind ")?.rsplit_once(" ok")?.0.to_owned());
    let test = |line: &str| Some(line.strip_prefix("test ")?.split_once(" ... ")?.0.to_owned());
    let ok = |line: &&str| line.ends_with(" ok") || line.contains(" ok (");
    output.lines().map(str::trim).filter(ok).filter_map(|l| kind(l).or_else(|| test(l))).collect()
}

fn page(groups: &[(String, Vec<Row>)]) -> String {
    let rows = || groups.iter().flat_map(|(_, rows)| rows);
    let both = rows().filter(|r| r.verdicts.iter().all(|v| !is_none(v))).count();
    let mut text = format!(
        "# What is protected\n\nMade from the results of the tests by `tests/tests/coverage.rs`; the table \
         behind it is [`tests/coverage.txt`](../tests/coverage.txt). {both} of {} kinds are \
         protected in one-shot images and continuously. What is refused, and what to do then, is \
         in [limitations](limitations.md#what-a-container-may-hold).\n",
        rows().count()
    );
    for (heading, rows) in groups {
        let _ = write!(
            text,
            "\n## {heading}\n\n| kind | one-shot | continuous | notes |\n|---|---|---|---|\n"
        );
        for Row { kind, verdicts, notes } in rows {
            let [one, two] = verdicts.each_ref().map(|verdict| match is_none(verdict) {
                true => verdict.clone(),
                false => format!("yes: {}", verdict.replace("; ", ", ")),
            });
            let _ = writeln!(text, "| {kind} | {one} | {two} | {notes} |");
        }
    }
    text
}

#[test]
fn the_page_of_coverage_is_what_the_tests_say() {
    let (page, path) = (page(&groups()), workspace().join("docs/coverage.md"));
    if std::env::var_os("NILICON_BLESS").is_some() {
        if let Some(file) = std::env::var_os("NILICON_RESULTS") {
            let output = fs::read_to_string(file).expect("the output of a run");
            let all: BTreeSet<String> = passed(&output);
            let lines: Vec<&str> = all.iter().map(String::as_str).collect();
            fs::write(workspace().join("tests/results.txt"), lines.join("\n") + "\n").expect("w");
        }
        fs::write(&path, &page).expect("written");
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert!(there == page, "docs/coverage.md is out of date: NILICON_BLESS=1 writes it anew");
}

#[test]
fn every_verdict_stands_on_a_test_that_passed() {
    let results = results();
    let groups = groups();
    let mut missing = Vec::new();
    for row in groups.iter().flat_map(|(_, rows)| rows) {
        for verdict in &row.verdicts {
            let names = match verdict.strip_prefix("refused: ") {
                Some(names) => names,
                None if is_none(verdict) => continue,
                None => verdict,
            };
            let names = names.split("; ");
            missing.extend(names.filter(|n| !results.contains(*n)).map(|n| (&row.kind, n)));
        }
    }
    assert!(missing.is_empty(), "no result for {missing:#?}");
}

#[test]
fn every_kind_has_a_verdict() {
    let groups = groups();
    let rows: Vec<&Row> = groups.iter().flat_map(|(_, rows)| rows).collect();
    for kind in WANTED.split_whitespace() {
        assert!(rows.iter().any(|row| row.kind.contains(kind)), "no row for {kind}");
    }
    for row in &rows {
        assert!(row.verdicts.iter().all(|v| !v.is_empty()), "{} has no verdict", row.kind);
    }
    // A program that no row names would be a kind without a verdict.
    let named: Vec<&str> = rows.iter().flat_map(|row| row.verdicts[0].split("; ")).collect();
    let list = |dir| fs::read_dir(workspace().join(dir)).expect("programs").flatten();
    for entry in list("tests/oneshot").chain(list("tests/oneshot/alone")) {
        let path = entry.path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        if path.extension().is_some_and(|e| e == "c") {
            assert!(named.contains(&name.as_str()), "no row of tests/coverage.txt names {name}");
        }
    }
}

#[test]
fn results_are_read_from_what_tests_print() {
    let output = "test a_thing_works ... ok\nkind UDP with its queue ok\nkind mapped ok (0.30 s)\n\
                  kind broken FAILED: no\ntest bad ... FAILED\n";
    let found: Vec<String> = passed(output).into_iter().collect();
    assert_eq!(found, ["UDP with its queue", "a_thing_works", "mapped"]);
}
