//! `nilicon check`: everything that a process tree holds, whether it can be protected, why not,
//! and what to do. What is refused is what capture refuses: the same code looks.

use anyhow::{Context, Result, bail};
use netns_tools::lab::Lab;
use replicator::capture::{Refusal, Survey};
use serde::Serialize;

use super::args::{CheckArgs, Output};
use super::objects;
use super::oneshot::{gentle_capturer, refuse_relatives};
use super::view::LabView;

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    /// What was looked at.
    target: String,
    /// Whether protection can start.
    ready: bool,
    /// For how long the tree stood still; null if it was not stopped.
    stopped_ms: Option<f64>,
    objects: Vec<Row>,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    kind: String,
    /// Pid in the tree, if it belongs to one process.
    pid: Option<i32>,
    object: String,
    protected: bool,
    why: Option<String>,
    remedy: Option<String>,
}

impl Row {
    fn protected(kind: &str, pid: Option<i32>, object: String) -> Self {
        Self { kind: kind.to_owned(), pid, object, protected: true, why: None, remedy: None }
    }

    fn refused(refusal: &Refusal) -> Self {
        let kind = match refusal.object.split(' ').next() {
            Some(word @ ("descriptor" | "mapping")) => word,
            Some("pid") => "process",
            _ => "tree",
        };
        let pid = refusal.object.rsplit_once("pid ").and_then(|(_, pid)| pid.parse().ok());
        Self {
            kind: kind.to_owned(),
            pid,
            object: refusal.object.clone(),
            protected: false,
            why: Some(refusal.why().to_owned()),
            remedy: refusal.remedy().map(str::to_owned),
        }
    }
}

/// `nilicon check`. Gives whether protection can start.
pub(super) fn check(args: &CheckArgs) -> Result<bool> {
    let report = match args.target.parse::<i32>() {
        Ok(pid) => of_process(pid)?,
        Err(_) => of_container(&args.target)?,
    };
    match args.output.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text => print(&report),
    }
    Ok(report.ready)
}

fn of_process(pid: i32) -> Result<Report> {
    refuse_relatives(pid)?;
    let mut capturer = gentle_capturer(pid)?;
    let looked = capturer.survey(true);
    capturer.detach().with_context(|| format!("pid {pid} could not be let go"))?;
    let survey = looked.with_context(|| format!("cannot look at pid {pid}"))?;
    let stopped_ms = Some(survey.stopped.as_secs_f64() * 1e3);
    let ready = survey.refusals.is_empty();
    Ok(Report { target: format!("pid {pid}"), ready, stopped_ms, objects: rows(&survey) })
}

fn rows(survey: &Survey) -> Vec<Row> {
    let mut all: Vec<Row> = survey.refusals.iter().map(Row::refused).collect();
    for note in &survey.notes {
        all.push(Row::protected("note", None, note.clone()));
    }
    for n in &survey.namespaces {
        let whose = if n.own { "its own" } else { "the host's" };
        all.push(Row::protected("namespace", None, format!("{}: {whose}", n.kind.name())));
    }
    for p in &survey.state.processes {
        let name = p.threads.first().map_or("", |t| t.comm.as_str());
        let what = format!("{name}, parent {}, session {}", p.ppid, p.sid);
        all.push(Row::protected("process", Some(p.pid), what));
        let threads = format!("{} threads", p.threads.len());
        all.push(Row::protected("threads", Some(p.pid), threads));
        for object in objects::of_process(&survey.state, p) {
            // A mapping that is refused is in the list already.
            let refused = all.iter().any(|r| {
                !r.protected && r.kind == object.kind && r.pid == Some(p.pid) && {
                    let place = object.what.split(' ').next().unwrap_or("");
                    r.object.split(' ').any(|word| word == place)
                }
            });
            if !refused {
                all.push(Row::protected(object.kind, Some(p.pid), object.what));
            }
        }
        let timers = p.timers.posix.len();
        if timers > 0 {
            all.push(Row::protected("timers", Some(p.pid), format!("{timers} POSIX timers")));
        }
    }
    all
}

/// A container of a lab: its agent traces it and captures it all the time. With the name of its
/// lab in front (LAB:CONTAINER) if several labs have one of that name.
fn of_container(target: &str) -> Result<Report> {
    let (lab, name) = match target.split_once(':') {
        Some((lab, name)) => (Some(lab), name),
        None => (None, target),
    };
    let labs = Lab::list().into_iter().filter(|l| lab.is_none_or(|lab| lab == l));
    let views: Vec<LabView> = labs
        .filter_map(|lab| Lab::open(&lab).ok())
        .map(|lab| LabView::ask(&lab))
        .filter(|view| view.container(name).is_some())
        .collect();
    let view = match views.as_slice() {
        [] => {
            bail!("there is neither a process nor a container of a deployed lab named {target}")
        }
        [view] => view,
        more => {
            let labs: Vec<&str> = more.iter().map(|view| view.name.as_str()).collect();
            bail!(
                "the labs {} have a container {name}: say which, as {}:{name}",
                labs.join(", "),
                labs[0]
            )
        }
    };
    let container = view.container(name).context("it was there a moment ago")?;
    let pid = view.parts(name).find_map(|(host, part)| {
        (Some(host) == container.primary.as_deref()).then_some(part.pid).flatten()
    });
    let mut objects = Vec::new();
    let reasons = container.reason.iter().flat_map(|all| all.split(" | "));
    for reason in reasons.filter(|_| !container.protected) {
        let (object, reason) = reason.split_once(": ").unwrap_or(("the container", reason));
        let (object, reason) = (object.to_owned(), reason.to_owned());
        objects.push(Row::refused(&Refusal { object, reason }));
    }
    let what = match pid {
        Some(pid) => format!("{name}, pid {pid} of the host"),
        None => format!("{name}, which does not run"),
    };
    objects.push(Row::protected("container", None, what));
    let ready = container.protected || (objects.len() == 1 && pid.is_some());
    let target = format!("container {name} of lab {}", view.name);
    Ok(Report { target, ready, stopped_ms: None, objects })
}

fn print(report: &Report) {
    let refused: Vec<&Row> = report.objects.iter().filter(|r| !r.protected).collect();
    let verdict = if report.ready { "can be protected" } else { "CANNOT be protected" };
    println!("{}: {verdict}", report.target);
    if let Some(ms) = report.stopped_ms {
        println!("it stood still for {ms:.2} ms; it runs on, and nothing was written");
    }
    for row in &refused {
        println!();
        println!("  NO   {:<11} {}", row.kind, row.object);
        println!("       {}", row.why.as_deref().unwrap_or_default());
        if let Some(remedy) = &row.remedy {
            println!("       what to do: {remedy}");
        }
    }
    println!();
    for row in report.objects.iter().filter(|r| r.protected) {
        let pid = row.pid.map_or_else(String::new, |pid| pid.to_string());
        println!("  ok   {:<11} {pid:>7}  {}", row.kind, row.object);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_have_their_kind_their_process_and_their_remedy() {
        let refusal = |object: &str, reason: &str| {
            Row::refused(&Refusal { object: object.into(), reason: reason.into() })
        };
        let row = refusal("descriptor 3 of pid 77", "the terminal /dev/pts/0; log to a file");
        assert_eq!((row.kind.as_str(), row.pid), ("descriptor", Some(77)));
        assert_eq!(row.why.as_deref(), Some("the terminal /dev/pts/0"));
        assert_eq!(row.remedy.as_deref(), Some("log to a file"));
        let row = refusal("pid 5", "it runs under a seccomp filter; these are not protected yet");
        assert_eq!((row.kind.as_str(), row.pid, row.remedy), ("process", Some(5), None));
    }
}
