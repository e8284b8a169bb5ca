//! `bench`: the three modes side by side.

use nilicon_tests::{Bed, EMBEDDED, Sketch};
use serde_json::Value;

/// The part of a core that agents may take on a busy machine while nothing happens.
const MOST_IDLE: f64 = 0.25;

/// All modes answer, only the protected one has epochs, and the pictures are there.
#[test]
fn a_bench_compares_three_modes() {
    let bed = Bed::new("bench", &Sketch::of(EMBEDDED).loaded());
    let plots = std::env::temp_dir().join(format!("{}-plots", bed.name));
    let folder = plots.to_str().expect("a path of plain text");
    let line = ["--rounds", "1", "--load", "1s", "--connections", "2", "--plots", folder];
    let bench = bed.run("bench", &[&line[..], &["-o", "json"]].concat()).expect_success().json();
    let points = bench["points"].as_array().expect("points");
    let loads: Vec<&Value> = points.iter().map(|point| &point["load"]).collect();
    assert_eq!(loads, ["closed", "saturation", "50%"], "{bench:#}");
    for mode in points.iter().flat_map(|point| point["modes"].as_array().expect("modes")) {
        assert!(mode["rate_per_s"]["median"].as_f64().is_some_and(|rate| rate > 0.0), "{mode:#}");
        assert!(mode["cpu"]["container"].as_f64().is_some_and(|cpu| cpu > 0.0), "{mode:#}");
        let epochs = mode["epochs"]["count"].as_u64();
        assert_eq!(epochs.is_some_and(|count| count > 0), mode["mode"] == "protected", "{mode:#}");
    }
    // With more requests in flight more is answered, also where each answer waits for its epoch.
    let protected = |point: &Value| point["modes"][2]["rate_per_s"]["median"].as_f64();
    assert!(protected(&points[1]) > protected(&points[0]), "{bench:#}");
    // The unprotected container is what the others are measured against.
    for point in points {
        let veth = &point["modes"][0];
        assert_eq!((&veth["mode"], &veth["rate_ratio"]["median"]), (&"veth".into(), &1.0.into()));
    }
    let written = std::fs::read_to_string(plots.join("bench.json")).expect("the figures");
    let written: Value = serde_json::from_str(&written).expect("JSON");
    assert_eq!(written, bench);
    for picture in ["stops.svg", "latency.svg", "epochs.svg", "failover.svg"] {
        let text = std::fs::read_to_string(plots.join(picture)).expect(picture);
        assert!(text.contains("</svg>"), "{picture}");
    }
    std::fs::remove_dir_all(&plots).expect("the folder");
    bed.expect_gone();
}

/// A container with a volume is measured as well, and again with the files of the run before, which are of
/// its generation.
#[test]
fn a_bench_measures_a_container_with_a_volume() {
    let body = format!(
        "{EMBEDDED}\n    volume-directory: @/kept\n    volumes:\n      \
         - {{ path: @/seen, kind: replicated }}"
    );
    let bed = Bed::new("bvol", &Sketch::of(&body).loaded());
    bed.write(&bed.text().replace('@', &bed.directory().display().to_string()));
    let line =
        ["--rounds", "1", "--load", "1s", "--connections", "2", "--loads", "closed", "-o", "json"];
    for _ in 0..2 {
        let bench = bed.run("bench", &line).expect_success().json();
        let modes = bench["points"][0]["modes"].as_array().expect("modes");
        let rate = |mode: &Value| mode["rate_per_s"]["median"].as_f64();
        assert!(modes.len() == 3 && modes.iter().all(|m| rate(m) > Some(0.0)), "{bench:#}");
    }
    bed.expect_gone();
}

/// Without nilicon it would write over the files of the host: nothing is begun.
#[test]
fn a_container_whose_root_is_a_volume_is_not_measured() {
    let body = format!(
        "{EMBEDDED}\n    volume-directory: @/kept\n    volumes:\n      - {{ path: /, kind: replicated }}"
    );
    let bed = Bed::new("broot", &Sketch::of(&body).loaded());
    bed.write(&bed.text().replace('@', &bed.directory().display().to_string()));
    let refused = bed.run("bench", &["--rounds", "1", "--load", "1s"]);
    refused.expect_complaint(&["whose root is a volume", "instead of `/`"]);
    bed.expect_gone();
}

/// Nobody asks: there are no epochs, and agents and gateway do next to nothing. How little is a
/// figure of the bench; here a busy machine must pass as well.
#[test]
fn an_idle_container_has_no_epochs() {
    let bed = Bed::new("idle", &Sketch::of(EMBEDDED));
    let line = ["--idle", "--rounds", "1", "--load", "4s", "-o", "json"];
    let rows = bed.run("bench", &line).expect_success().json();
    let rows = rows.as_array().expect("rows");
    let modes: Vec<&Value> = rows.iter().map(|row| &row["mode"]).collect();
    assert_eq!(modes, ["gateway", "protected"]);
    for row in rows {
        assert_eq!(row["epochs_per_s"]["max"], 0.0, "{row:#}");
        assert!(row["agents"]["max"].as_f64().is_some_and(|part| part < MOST_IDLE), "{row:#}");
    }
    // It was measured at all.
    assert!(rows[1]["agents"]["max"].as_f64() > Some(0.0), "{rows:#?}");
    bed.expect_gone();
}

/// A program without clients is measured by its work.
#[test]
fn a_bench_counts_the_work_of_a_program_without_clients() {
    let store = "command: [nilicon, __compute, options, --threads, \"2\", --listen, \
                 \"0.0.0.0:7000\"]\n    ready: { tcp: 7000 }";
    let mut sketch = Sketch::of(store);
    sketch.protection = "epoch: { min: 30ms, max: 30ms }".to_owned();
    let bed = Bed::new("work", &sketch);
    let line = ["--rounds", "1", "--load", "2s", "-o", "json"];
    let bench = bed.run("bench", &line).expect_success().json();
    let modes = bench["modes"].as_array().expect("modes");
    assert_eq!(modes.len(), 3, "{bench:#}");
    for mode in modes {
        assert!(mode["steps_per_s"]["median"].as_f64() > Some(0.0), "{mode:#}");
        let epochs = mode["epochs"]["count"].as_u64();
        assert_eq!(epochs.is_some_and(|count| count > 2), mode["mode"] == "protected", "{mode:#}");
    }
    // No epoch is shorter than it is told.
    assert!(modes[2]["epochs"]["interval_us"]["p50"].as_u64() >= Some(30_000), "{bench:#}");
    bed.expect_gone();
}

/// Two builds, here one and the same, in turns.
#[test]
fn a_bench_compares_two_builds() {
    let bed = Bed::new("against", &Sketch::of(EMBEDDED).loaded());
    let program = nilicon_tests::binary();
    let program = program.to_str().expect("a path of plain text");
    let line = ["--against", program, "--rounds", "2", "--load", "1s", "--connections", "2"];
    let bench = bed.run("bench", &[&line[..], &["-o", "json"]].concat()).expect_success().json();
    let figures = bench["figures"].as_array().expect("figures");
    for name in ["stop p50", "requests/s"] {
        let figure = figures.iter().find(|figure| figure["name"] == name).expect(name);
        for side in ["own", "other", "ratio"] {
            assert!(figure[side]["median"].as_f64() > Some(0.0), "{name}, {side}: {figure:#}");
        }
    }
    bed.expect_gone();
}
