//! The command line: what can be asked for, in the words of the help texts.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use netns_tools::topology::{Event, Period, Topology};
use replicator::protocol::simulation::STEPS;
use replicator::restore::Place;

use super::bench::BenchArgs;
use super::compute::ComputeArgs;
use super::drill_faults::DrillFault;
use super::faults;
use super::shape::ShapeArgs;
use super::sim::Mutation;

/// Keeps a Linux container alive through the loss of its host.
///
/// nilicon takes a checkpoint of the container every few milliseconds, ships it to a second host,
/// and lets the container's packets out only then. When the host dies, the second one goes on:
/// same address, same connections.
#[derive(Debug, Parser)]
#[command(name = "nilicon", version, arg_required_else_help = true)]
pub(super) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Verb,
}

/// The commands, the one for a first look first.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Shows it: a lab, a protected server under load, the death of its host, and what the
    /// clients noticed. Takes less than half a minute.
    Demo,
    /// Deploys a topology, puts load on it, injects its faults, reports and destroys it.
    Run(RunArgs),
    /// Repeats a run with its fault at a random moment each time.
    Drill(DrillArgs),
    /// Measures what protection costs: the same load on the container with a plain veth, with the
    /// gateway, and protected, in turns.
    Bench(BenchArgs),
    /// Simulates two hosts, their links and the arbiter through loss, cuts, stalls, crashes and
    /// restarts, by a seed, and checks at every step that no promise is broken.
    Sim(SimArgs),
    /// Makes the lab of a topology, starts its containers and leaves it standing.
    Deploy(DeployArgs),
    /// Removes whatever there is of a lab.
    Destroy(LabArg),
    /// Shows what there is of a lab, or of all labs.
    Inspect(InspectArgs),
    /// Runs a command in the network of a node or a container of a lab.
    Exec(ExecArgs),
    /// Injects a fault into a deployed lab.
    Fault(FaultArgs),
    /// Moves a protected container to its other host, on purpose and with nothing lost.
    Switchover(SwitchoverArgs),
    /// Lets a host act alone for a container whose arbiter is the operator. Make sure that the
    /// other host does not run it any more.
    Allow(AllowArgs),
    /// Runs the witness of a topology (in a lab, `deploy` starts it).
    Witness(WitnessArgs),
    /// Runs the agent of one host (in a lab, `deploy` starts it).
    Agent(AgentArgs),
    /// Tells whether a process tree can be protected, and what of it cannot.
    Check(CheckArgs),
    /// Writes a process tree into a file, as it stands, and ends it.
    Checkpoint(CheckpointArgs),
    /// Brings a process tree back from a file, with the same pids.
    Restore(RestoreArgs),
    /// Shows, compares and verifies images.
    #[command(subcommand)]
    Image(ImageVerb),
    /// Looks at the files of replicated volumes.
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Makes the keys and certificates by which hosts know each other.
    #[command(subcommand)]
    Pki(PkiVerb),
    /// Prints the JSON schema of topology files.
    Schema,
    /// Checks a topology file.
    Validate(FileArg),
    /// Tells what this machine has and lacks for the job.
    Doctor(OutputArg),
    /// Carries the frames of an impaired link.
    #[command(name = "__link", hide = true)]
    Link(LinkArgs),
    /// Makes load; the load is described on standard input.
    #[command(name = "__client", hide = true)]
    Client,
    /// The built-in key-value server.
    #[command(name = "__server", hide = true)]
    Server(ServerArgs),
    /// A program of any shape, for `bench --scale`.
    #[command(name = "__shape", hide = true)]
    Shape(ShapeArgs),
    /// A program that computes.
    #[command(name = "__compute", hide = true)]
    Compute(ComputeArgs),
}

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// `-o`.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct OutputArg {
    /// How to print the result.
    #[arg(short, long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub(super) output: Output,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// `--output-commit`.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct OutputCommitArg {
    /// Whether output waits for its checkpoint. `off` is UNSAFE and a control experiment: a
    /// failover then loses what was acknowledged.
    #[arg(long, value_enum, default_value = "on", value_name = "SWITCH")]
    output_commit: Switch,
}

impl OutputCommitArg {
    pub(super) fn is_on(self) -> bool {
        self.output_commit == Switch::On
    }
}

/// A topology file to make a lab of.
#[derive(Debug, Args)]
pub(super) struct TopologyArg {
    /// Topology file.
    #[arg(value_name = "TOPOLOGY")]
    pub(super) path: PathBuf,
    /// Name of the lab, instead of the one in the file: two labs of one file can stand at once.
    #[arg(long)]
    name: Option<String>,
}

impl TopologyArg {
    /// Reads the file.
    ///
    /// # Errors
    /// The file, or the name, cannot be used.
    pub(super) fn load(&self) -> anyhow::Result<Topology> {
        let mut topology = Topology::load(&self.path)?;
        if let Some(name) = &self.name {
            anyhow::ensure!(
                is_lab_name(name),
                "`{name}` cannot name a lab: 1 to 20 lower-case letters, digits and dashes, not \
                 beginning with a dash"
            );
            topology.name.clone_from(name);
        }
        Ok(topology)
    }
}

/// Whether a text can be the name of a lab.
pub(super) fn is_lab_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=20).contains(&text.len()) && !text.starts_with('-') && text.chars().all(allowed)
}

/// A topology file.
#[derive(Debug, Args)]
pub(super) struct FileArg {
    /// Topology file.
    pub(super) topology: PathBuf,
}

/// A lab.
#[derive(Debug, Args)]
pub(super) struct LabArg {
    /// Topology file, or the name of a deployed lab.
    #[arg(value_name = "TOPOLOGY|NAME")]
    pub(super) lab: String,
}

/// `run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub(super) topology: TopologyArg,
    /// How long the measured load lasts; by default what the file says, or 20s.
    #[arg(long, value_name = "TIME")]
    pub(super) duration: Option<Period>,
    /// A fault besides those of the file, at a time from the start of the load:
    /// kill-host:alpha@5s, kill-agent:alpha@5s, cut-link:alpha@5s (all its links),
    /// cut-link:alpha:repl@5s, slow-link:alpha:repl@5s, heal-link:alpha:repl@8s,
    /// restart-agent:alpha@8s, revive-host:alpha@8s (its links and its agent); see
    /// docs/commands.md for all.
    #[arg(long = "fault", value_name = "WHAT:NODE[:IFACE]@TIME", value_parser = faults::parse_timed)]
    pub(super) faults: Vec<Event>,
    #[command(flatten)]
    pub(super) output: OutputArg,
    #[command(flatten)]
    pub(super) output_commit: OutputCommitArg,
    /// Moves every protected container to its other host and back, so many moves in all, instead of
    /// the faults of the file. The load lasts as long as that takes.
    #[arg(long, value_name = "N", conflicts_with_all = ["duration", "faults"])]
    pub(super) switchovers: Option<u32>,
    /// Leaves the lab standing afterwards.
    #[arg(long)]
    pub(super) keep: bool,
    /// Seed of the requests that the clients send.
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
}

/// `drill`.
#[derive(Debug, Args)]
pub(super) struct DrillArgs {
    #[command(flatten)]
    pub(super) topology: TopologyArg,
    /// How many runs.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) runs: u32,
    /// Seed of the first run; the next run has the next seed. By default a random one.
    #[arg(long)]
    pub(super) seed: Option<u64>,
    /// The fault instead of those of the file; without any in the file, `any`.
    #[arg(long, value_enum)]
    pub(super) fault: Option<DrillFault>,
    /// How long the load of one run lasts.
    #[arg(long, value_name = "TIME", default_value = "6s")]
    pub(super) duration: Period,
    #[command(flatten)]
    pub(super) output: OutputArg,
    #[command(flatten)]
    pub(super) output_commit: OutputCommitArg,
}

/// `sim`.
#[derive(Debug, Args)]
pub(super) struct SimArgs {
    /// The first seed; each is one run, and repeats it exactly.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// How many seeds. With one, all that happens is printed.
    #[arg(long, value_name = "COUNT", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) seeds: u64,
    /// Steps of a run, of a millisecond each; then its weather turns fair.
    #[arg(long, value_name = "N", default_value_t = STEPS)]
    pub(super) steps: u32,
    /// A mistake to be made, which must be found; the code is 1 if it is.
    #[arg(long, value_enum)]
    pub(super) mutation: Option<Mutation>,
    #[command(flatten)]
    pub(super) output: OutputArg,
}

/// `deploy`.
#[derive(Debug, Args)]
pub(super) struct DeployArgs {
    #[command(flatten)]
    pub(super) topology: TopologyArg,
    #[command(flatten)]
    pub(super) output_commit: OutputCommitArg,
}

/// `inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Topology file, or the name of a deployed lab; by default all labs.
    #[arg(value_name = "TOPOLOGY|NAME")]
    pub(super) lab: Option<String>,
    #[command(flatten)]
    pub(super) output: OutputArg,
}

/// `exec`.
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    #[command(flatten)]
    pub(super) lab: LabArg,
    /// Node or container whose network the command gets.
    pub(super) node: String,
    /// The command and its arguments, after `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
}

/// `fault`.
#[derive(Debug, Args)]
pub(super) struct FaultArgs {
    #[command(flatten)]
    pub(super) lab: LabArg,
    /// kill-host:alpha, kill-agent:alpha, cut-link:alpha (all its links), cut-link:alpha:repl,
    /// heal-link:alpha:repl, restart-agent:alpha, revive-host:alpha (its links and its agent).
    #[arg(value_name = "WHAT:NODE[:IFACE]", value_parser = faults::parse)]
    pub(super) fault: Event,
}

/// `switchover`.
#[derive(Debug, Args)]
pub(super) struct SwitchoverArgs {
    #[command(flatten)]
    pub(super) lab: LabArg,
    /// The container; by default the only one that is protected.
    pub(super) container: Option<String>,
    /// How often, there and back in turns.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) times: u32,
    #[command(flatten)]
    pub(super) output: OutputArg,
}

/// `allow`.
#[derive(Debug, Args)]
pub(super) struct AllowArgs {
    #[command(flatten)]
    pub(super) lab: LabArg,
    /// The container.
    pub(super) container: String,
    /// The host that may go on.
    pub(super) host: String,
}

/// `witness`.
#[derive(Debug, Args)]
pub(super) struct WitnessArgs {
    /// Topology file.
    pub(super) topology: PathBuf,
    /// Directory with the witness's key and certificate; by default that of the lab.
    #[arg(long, value_name = "DIR")]
    pub(super) pki: Option<PathBuf>,
    /// File that remembers what was granted; by default in the lab's directory.
    #[arg(long, value_name = "FILE")]
    pub(super) state: Option<PathBuf>,
}

/// `agent`.
#[derive(Debug, Args)]
pub(super) struct AgentArgs {
    /// Topology file.
    pub(super) topology: PathBuf,
    /// The host whose agent this is.
    #[arg(long, value_name = "NAME")]
    pub(super) host: String,
    /// Directory with the host's key and certificate; by default that of the lab.
    #[arg(long, value_name = "DIR")]
    pub(super) pki: Option<PathBuf>,
    #[command(flatten)]
    pub(super) output_commit: OutputCommitArg,
}

/// `check`.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Pid of the root of a tree, or the name of a container of a deployed lab (LAB:CONTAINER if
    /// several have one of that name).
    #[arg(value_name = "PID|CONTAINER")]
    pub(super) target: String,
    #[command(flatten)]
    pub(super) output: OutputArg,
}

/// `checkpoint`.
#[derive(Debug, Args)]
pub(super) struct CheckpointArgs {
    /// Root of the tree: this process and all its descendants.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub(super) pid: i32,
    /// The file; it appears when it is complete, and replaces what was there.
    #[arg(long, value_name = "FILE")]
    pub(super) to: PathBuf,
    /// Lets the tree run on afterwards instead of ending it.
    #[arg(long)]
    pub(super) leave_running: bool,
}

/// `restore`.
#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The image.
    pub(super) file: PathBuf,
    /// Ends once the tree runs and prints its pid, instead of waiting for it.
    #[arg(long)]
    pub(super) detach: bool,
    /// Which namespaces it comes back in.
    #[arg(long, value_enum, default_value = "image", value_name = "WHICH")]
    pub(super) namespaces: Namespaces,
}

/// `--namespaces`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Namespaces {
    /// New ones where the tree had its own, the caller's where it had those of the host.
    Image,
    /// The caller's.
    Host,
    /// New pid, net, mount, uts, ipc and time namespaces.
    New,
}

impl From<Namespaces> for Place {
    fn from(namespaces: Namespaces) -> Self {
        match namespaces {
            Namespaces::Image => Place::AsTaken,
            Namespaces::Host => Place::Here,
            Namespaces::New => Place::New,
        }
    }
}

/// `volume`.
#[derive(Debug, Subcommand)]
pub(super) enum VolumeVerb {
    /// Compares the files of both hosts of each container of a lab, and names the first difference;
    /// code 1 if there is one. What is written meanwhile is a difference.
    Verify {
        #[command(flatten)]
        topology: TopologyArg,
    },
    /// Prints a digest of each volume on a host of this machine: to compare with the other host's.
    Digest {
        #[command(flatten)]
        topology: TopologyArg,
        /// The host.
        #[arg(long)]
        host: String,
    },
}

/// `image`.
#[derive(Debug, Subcommand)]
pub(super) enum ImageVerb {
    /// Prints what is in an image.
    Show {
        /// The image.
        file: PathBuf,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Prints in what two images differ; code 1 if they do.
    Diff {
        /// An image.
        one: PathBuf,
        /// Another.
        other: PathBuf,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Reads all of an image and checks it; code 1 if it is not whole.
    Verify {
        /// The image.
        file: PathBuf,
        #[command(flatten)]
        output: OutputArg,
    },
}

/// `pki`.
#[derive(Debug, Subcommand)]
pub(super) enum PkiVerb {
    /// Makes the authority that all hosts trust.
    Init {
        /// Directory for it; made if it is not there.
        dir: PathBuf,
    },
    /// Makes a key and a certificate, signed by the authority.
    Issue {
        /// Directory of the authority.
        dir: PathBuf,
        /// Name of the host or witness.
        name: String,
        /// What its holder may do.
        #[arg(long, value_enum, default_value = "host")]
        role: KeyRole,
    },
}

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum KeyRole {
    /// Runs containers.
    Host,
    /// Decides who may act alone.
    Witness,
}

/// `__link`.
#[derive(Debug, Args)]
pub(super) struct LinkArgs {
    pub(super) lab: String,
    pub(super) index: usize,
}

/// `__server`.
#[derive(Debug, Args)]
pub(super) struct ServerArgs {
    #[arg(long, default_value_t = 1)]
    pub(super) threads: usize,
    #[arg(long, default_value = "0.0.0.0:6379")]
    pub(super) listen: std::net::SocketAddr,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use netns_tools::topology::Fault;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn faults_and_times_read_as_documented() {
        let line = "nilicon run a.yml --duration 8s --fault kill-host:alpha@3s \
                    --fault cut-link:alpha:repl@500ms --output-commit off -o json";
        let Verb::Run(run) = Arguments::parse_from(line.split_whitespace()).command else {
            panic!("not a run")
        };
        assert_eq!(run.duration, Some(Period::ms(8000)));
        assert_eq!(run.faults[0].fault, Fault::KillHost);
        assert_eq!(run.faults[1].at, Period::ms(500));
        assert!(!run.output_commit.is_on());
        assert_eq!(run.output.output, Output::Json);
    }

    #[test]
    fn only_names_are_taken_for_names() {
        assert!(is_lab_name("redis-2"));
        for bad in ["", "-x", "a/b", "..", "redis.topo.yml", "Redis", "a-name-that-is-too-long"] {
            assert!(!is_lab_name(bad), "{bad}");
        }
    }

    #[test]
    fn bad_usage_is_code_2_and_no_argument_prints_help() {
        let code = |line: &str| Arguments::try_parse_from(line.split(' ')).unwrap_err().exit_code();
        assert_eq!(code("nilicon run a.yml --fault kill-host:alpha"), 2);
        assert_eq!(code("nilicon drill a.yml --runs 0"), 2);
        let help = Arguments::try_parse_from(["nilicon"]).unwrap_err().to_string();
        assert!(help.contains("Usage: nilicon <COMMAND>"), "{help}");
        assert!(!help.contains("__client"));
    }
}
