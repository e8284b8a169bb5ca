//! What `nilicon bench` can be asked for.

use std::path::PathBuf;

use clap::Args;
use netns_tools::topology::{Period, Ratio};

use super::super::args::{OutputArg, TopologyArg};
use super::Load;

/// `bench`.
#[derive(Debug, Args)]
pub(in super::super) struct BenchArgs {
    #[command(flatten)]
    pub(super) topology: TopologyArg,
    /// How often everything is measured; medians are told.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) rounds: u32,
    /// How long each measured load lasts.
    #[arg(long, value_name = "TIME", default_value = "4s")]
    pub(super) load: Period,
    /// Connections of the topology's first client; others stay out.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "1,50")]
    pub(super) connections: Vec<usize>,
    /// Loads besides `closed`, where each connection asks again when it has its answer:
    /// `saturation`, where each has many requests in flight, and parts of what the unprotected
    /// container answers at most in `closed`.
    #[arg(long, value_name = "LOADS", value_delimiter = ',', default_value = "saturation,50%")]
    pub(super) loads: Vec<Load>,
    /// Requests that each connection has in flight for `saturation`.
    #[arg(long, value_name = "NUMBER", default_value_t = 32)]
    pub(super) pipeline: usize,
    /// Parts of the requests that read, one after the other, instead of the client's.
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    pub(super) read_ratio: Vec<Ratio>,
    /// Writes plots (SVG) and all figures (bench.json) into this folder; a failover is measured
    /// for them, too.
    #[arg(long, value_name = "FOLDER")]
    pub(super) plots: Option<PathBuf>,
    /// Measures stops against data, dirty pages, threads, processes, connections and mappings
    /// instead, one at a time, with a program that has that shape.
    #[arg(long, conflicts_with_all = ["rounds", "load", "connections", "loads", "read_ratio"])]
    pub(super) scale: bool,
    /// With --scale: only this property.
    #[arg(long, requires = "scale", value_parser = super::scale::PROPERTIES)]
    pub(super) only: Option<String>,
    /// Measures instead what protection takes while nobody asks for anything.
    #[arg(long, conflicts_with_all = ["scale", "connections", "loads", "read_ratio", "plots"])]
    pub(super) idle: bool,
    /// Compares the stops of this program with those of another build of it instead, in turns, with
    /// the topology's own load and the largest number of connections.
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["scale", "idle", "loads", "plots"])]
    pub(super) against: Option<PathBuf>,
    #[command(flatten)]
    pub(super) output: OutputArg,
}
