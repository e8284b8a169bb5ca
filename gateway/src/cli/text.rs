//! Reports as tables, for people.

use std::fmt::Write;

use super::histories;
use super::numbers::{Spread, bytes, grouped, micros, millis};
use super::report::{EpochReport, FailoverReport, RunReport};

/// The report of a run.
pub(super) fn of_run(report: &RunReport) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail; the results say nothing.
    let _ = writeln!(out, "{}: {}", report.topology, verdict(report));
    if !report.output_commit {
        let _ = writeln!(out, "UNSAFE: output did not wait for checkpoints (a control experiment)");
    }
    out.push('\n');
    for fault in &report.faults {
        let killed = match fault.killed {
            0 => String::new(),
            1 => " (1 process killed)".to_owned(),
            more => format!(" ({more} processes killed)"),
        };
        let _ = writeln!(out, "  {:<9} {} at {:.2} s{killed}", "fault", fault.fault, fault.at_s);
    }
    match &report.moves {
        Some(moves) => {
            let [pauses, phases] = moves.lines();
            let _ = writeln!(out, "  {:<9} {pauses}\n  {:<9} {phases}", "moves", "");
        }
        None => report.failovers.iter().for_each(|one| out.push_str(&of_failover(one))),
    }
    out.push_str(&of_clients(report));
    out.push_str(&histories::text(report));
    out.push_str(&of_epochs(&report.epochs));
    for note in report.clients.iter().flat_map(|client| &client.report.notes) {
        let _ = writeln!(out, "  note      {note}");
    }
    out
}

fn verdict(report: &RunReport) -> String {
    match (report.complaint(), report.faults.is_empty()) {
        (None, true) => "nothing lost, nothing wrong".to_owned(),
        (None, false) => "recovered, nothing lost".to_owned(),
        (Some(complaint), _) if report.recovered => format!("RECOVERED WITH LOSS: {complaint}"),
        (Some(complaint), _) => format!("NOT RECOVERED: {complaint}"),
    }
}

fn of_failover(failover: &FailoverReport) -> String {
    let FailoverReport { container, host, .. } = failover;
    let phases = failover.phases;
    let noticed =
        failover.detect_ms.map_or_else(String::new, |ms| format!("noticed after {}, ", millis(ms)));
    let parts = [
        ("fence", phases.fence),
        ("apply", phases.apply),
        ("prepare", phases.prepare),
        ("probe", phases.probe),
        ("connect", phases.connect),
        ("finish", phases.finish),
        ("plug", phases.plug),
        ("run", phases.run),
    ];
    let parts: Vec<String> =
        parts.iter().map(|(name, ms)| format!("{name} {}", millis(*ms))).collect();
    format!(
        "  {:<9} {container} is on {host}: {noticed}running {} later, with {} connections\n  {:<9} {}\n",
        "failover",
        millis(failover.total_ms),
        failover.connections,
        "",
        parts.join(", ")
    )
}

fn of_clients(report: &RunReport) -> String {
    let widest = report.clients.iter().map(|client| client.name.len()).max().unwrap_or(0).max(8);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "\n  {:<widest$} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6} {:>6} {:>6}",
        "client", "requests", "per s", "median", "99 %", "max", "gap", "lost", "wrong", "broken"
    );
    for client in &report.clients {
        let found = &client.report;
        let _ = writeln!(
            out,
            "  {:<widest$} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6} {:>6} {:>6}",
            client.name,
            grouped(found.requests),
            grouped(found.rate_per_s as u64),
            micros(found.latency_us.p50),
            micros(found.latency_us.p99),
            micros(found.latency_us.max),
            millis(found.gap_ms),
            found.lost_writes,
            found.wrong_replies,
            found.broken_connections
        );
    }
    out
}

fn of_epochs(epochs: &EpochReport) -> String {
    let mut out = String::new();
    if epochs.committed == 0 {
        out.push_str("\n  no epoch was committed during the load\n");
        return out;
    }
    let _ = writeln!(
        out,
        "\n  {:<12} {:>9} {:>9} {:>9}   {} committed, {} sent",
        "epochs",
        "median",
        "99 %",
        "max",
        grouped(epochs.committed as u64),
        bytes(epochs.wire_bytes.total)
    );
    let mut row = |name: &str, spread: Spread<u64>, show: fn(u64) -> String| {
        let Spread { p50, p99, max } = spread;
        let _ = writeln!(out, "  {name:<12} {:>9} {:>9} {:>9}", show(p50), show(p99), show(max));
    };
    row("stop", epochs.stop_us, micros);
    row("interval", epochs.interval_us, micros);
    row("commit", epochs.commit_us, micros);
    row("dirty pages", epochs.dirty_pages, grouped);
    row("in the stop", epochs.stop_pages, grouped);
    row("sent", epochs.wire_bytes.spread, bytes);
    let _ = writeln!(out, "  a median stop: {}", epochs.stop_us_by_stage.in_words(" us"));
    let _ = writeln!(out, "  of it by kind: {}", epochs.capture_us_by_kind.in_words());
    out
}

#[cfg(test)]
mod tests {
    use super::super::report::{ClientReport, FaultReport, NamedReport};
    use super::*;

    fn report() -> RunReport {
        let client = ClientReport {
            requests: 482_100,
            rate_per_s: 40_123.4,
            gap_ms: 93.2,
            ..ClientReport::default()
        };
        let epochs = EpochReport { committed: 1203, ..EpochReport::default() };
        RunReport {
            topology: "redis".to_owned(),
            recovered: true,
            why: None,
            output_commit: true,
            linearizable: None,
            duration_s: 12.0,
            clients: vec![NamedReport { name: "client".to_owned(), report: client }],
            epochs,
            failover: None,
            failovers: Vec::new(),
            faults: vec![FaultReport { fault: "kill-host:alpha".to_owned(), at_s: 5.0, killed: 9 }],
            files: None,
            moves: None,
            containers: Vec::new(),
            logs: String::new(),
            records: Vec::new(),
        }
    }

    #[test]
    fn a_table_for_a_run() {
        let text = of_run(&report());
        for part in [
            "redis: recovered, nothing lost\n",
            "kill-host:alpha at 5.00 s (9 processes killed)",
            "482,100    40,123",
            "93.2 ms",
            "1,203 committed",
            "  a median stop: hold 0 us, freeze 0, seal 0, memory 0, threads 0, files 0, thaw 0\n",
            "  of it by kind: memory 0 us, objects 0, threads 0, ",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("UNSAFE"));
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    }

    #[test]
    fn a_loss_cannot_be_overlooked() {
        let mut report = report();
        report.clients[0].report.lost_writes = 2;
        report.clients[0].report.notes.push("key 7 is gone".to_owned());
        report.output_commit = false;
        report.clients[0].report.history = Some(histories::tests::history(Some(false)));
        let text = of_run(&report);
        let loss = "redis: RECOVERED WITH LOSS: 2 acknowledged writes lost; the history of \
                    client-0:shared-1 is not linearizable\nUNSAFE";
        assert!(text.starts_with(loss), "{text}");
        assert!(text.contains("1,200 operations, 1 unanswered: 1 NOT LINEARIZABLE\n"), "{text}");
        assert!(text.contains("  client-0:shared-1\n    get -> 3 (client 1"), "{text}");
        assert!(text.contains("note      key 7 is gone"));
    }
}
