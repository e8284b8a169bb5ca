//! `bench`: the three modes side by side.

use nilicon_tests::{Bed, EMBEDDED, Sketch};
use serde_json::Value;

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
    assert_eq!(loads, ["max", "50%"], "{bench:#}");
    for mode in points.iter().flat_map(|point| point["modes"].as_array().expect("modes")) {
        assert!(mode["rate_per_s"]["median"].as_f64().is_some_and(|rate| rate > 0.0), "{mode:#}");
        assert!(mode["cpu"]["container"].as_f64().is_some_and(|cpu| cpu > 0.0), "{mode:#}");
        let epochs = mode["epochs"]["count"].as_u64();
        assert_eq!(epochs.is_some_and(|count| count > 0), mode["mode"] == "protected", "{mode:#}");
    }
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
