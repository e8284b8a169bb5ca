//! A bench as people read it.

use std::fmt::Write;

use super::super::numbers::{Spread, bytes, grouped, micros};
use super::figures::{BenchReport, EpochFigures, Load, ModeFigures, PointFigures, Timeline};

/// The report as text.
pub(super) fn of(report: &BenchReport) -> String {
    let mut text = String::new();
    let setting = &report.setting;
    let cores = match &setting.cores {
        Some(cores) => format!("the container on core {}, the rest on others", cores.container),
        None => "one core for all".to_owned(),
    };
    let _ = writeln!(
        text,
        "{}: {} rounds of {:.0} s a load, kernel {}, {cores}",
        report.topology, setting.rounds, setting.load_s, setting.kernel
    );
    let has = |load| report.points.iter().any(|figures| figures.point.load == load);
    if has(Load::Closed) {
        text += "closed: each connection asks again when it has its answer\n";
    }
    if has(Load::Saturation) {
        let _ = writeln!(text, "saturation: {} requests in flight on each", setting.pipeline);
    }
    for point in &report.points {
        text += &of_point(point);
    }
    if let Some(failover) = &report.failover {
        text += &of_failover(failover);
    }
    if report.repeated > 0 {
        let repeated = report.repeated;
        let _ = writeln!(
            text,
            "\nmeasured again, as protection did not last (is the machine busy?): {repeated}"
        );
    }
    for complaint in &report.complaints {
        let _ = writeln!(text, "\nNOT AS IT SHOULD BE: {complaint}");
    }
    text
}

fn of_point(figures: &PointFigures) -> String {
    let mut text = format!("\n{}\n", figures.point);
    let _ = writeln!(
        text,
        "  {:<14}{:>12}{:>7}{:>12}{:>10}{:>12}{:>10}{:>11}{:>9}{:>8}",
        "",
        "requests/s",
        "ratio",
        "latency p50",
        "p99",
        "added p50",
        "p99",
        "container",
        "primary",
        "backup"
    );
    for mode in &figures.modes {
        text += &of_mode(mode);
    }
    for epochs in figures.modes.iter().filter_map(|mode| mode.epochs.as_ref()) {
        text += &of_epochs(epochs);
    }
    text
}

fn of_mode(mode: &ModeFigures) -> String {
    format!(
        "  {:<14}{:>12}{:>7.2}{:>12}{:>10}{:>12}{:>10}{:>11.2}{:>9.2}{:>8.2}\n",
        mode.mode.to_string(),
        grouped(mode.rate_per_s.median as u64),
        mode.rate_ratio.median,
        micros(mode.latency_p50_us.median as u64),
        micros(mode.latency_p99_us.median as u64),
        signed(mode.added_p50_us.median),
        signed(mode.added_p99_us.median),
        mode.cpu.container,
        mode.cpu.primary,
        mode.cpu.backup,
    )
}

fn signed(us: f64) -> String {
    let sign = if us < 0.0 { "-" } else { "+" };
    format!("{sign}{}", micros(us.abs() as u64))
}

pub(super) fn of_epochs(epochs: &EpochFigures) -> String {
    let time = |spread: Spread<u64>| {
        format!("{}, 99 % {}, max {}", micros(spread.p50), micros(spread.p99), micros(spread.max))
    };
    let mut text = String::new();
    let _ = writeln!(
        text,
        "  epochs   {} ({:.0}/s), every {}",
        grouped(epochs.count as u64),
        epochs.per_s,
        time(epochs.interval_us)
    );
    let _ = writeln!(
        text,
        "  stop     {}; {:.1} % of the time",
        time(epochs.stop_us),
        epochs.stopped_share * 100.0
    );
    let _ = writeln!(text, "  by stage {} us", epochs.stop_us_by_stage.p50.in_words(""));
    let _ = writeln!(text, "  99 %     {} us", epochs.stop_us_by_stage.p99.in_words(""));
    let _ = writeln!(text, "  commit   {}", time(epochs.commit_us));
    let _ = writeln!(
        text,
        "  pages    {} written, {} of them copied in the stop; {} an epoch on the wire, {}/s",
        epochs.dirty_pages.p50,
        epochs.stop_pages.p50,
        bytes(epochs.wire_bytes.p50),
        bytes(epochs.wire_bytes_per_s as u64)
    );
    text
}

fn of_failover(failover: &Timeline) -> String {
    let phases = failover.phases_ms.iter().map(|(phase, ms)| format!("{phase} {ms:.1}"));
    format!(
        "\nloss of the host: {:.0} ms until it ran again, clients waited {:.0} ms\n  {} ms\n",
        failover.outage_ms,
        failover.gap_ms,
        phases.collect::<Vec<_>>().join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::report;

    #[test]
    fn it_has_every_mode_and_what_it_costs() {
        let text = super::of(&report());
        let line = |word: &str| text.lines().find(|l| l.trim_start().starts_with(word)).unwrap();
        assert!(line("unprotected").contains("10,000   1.00"));
        assert!(line("gateway only").contains("0.90"));
        assert!(line("protected").contains("0.50") && line("protected").contains("+700 us"));
        assert!(line("stop").contains("404 us, 99 % 409 us"));
        assert!(line("loss of the host").contains("35 ms until"));
        assert!(text.lines().all(|line| line.len() < 110), "{text}");
    }
}
