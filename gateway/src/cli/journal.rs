//! Reading what agents write down: one line an epoch, one record a failover. Both outlive a
//! killed agent, whose last line may be half a line.

use std::fs;
use std::ops::RangeInclusive;

use netns_tools::lab::Lab;

use crate::agent::status::{EpochRecord, FailoverRecord, epochs_file, failover_file};

/// A failover of a lab.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failover {
    /// The container.
    pub(super) container: String,
    /// The host that it went to.
    pub(super) host: String,
    /// What that host's agent wrote.
    pub(super) record: FailoverRecord,
}

/// The epochs of all containers that began in a span of time (CLOCK_MONOTONIC, microseconds).
pub(super) fn epochs(lab: &Lab, during: &RangeInclusive<u64>) -> Vec<EpochRecord> {
    let mut all = Vec::new();
    for (container, host) in places(lab) {
        let text = fs::read_to_string(epochs_file(lab.name(), host, container));
        all.extend(parse_epochs(&text.unwrap_or_default(), during));
    }
    all
}

/// All failovers so far, the earliest first.
pub(super) fn failovers(lab: &Lab) -> Vec<Failover> {
    let mut all: Vec<Failover> = places(lab)
        .flat_map(|(container, host)| {
            let text = fs::read_to_string(failover_file(lab.name(), host, container));
            // Half a record is no record yet: it is read again at the next look.
            let record = |line: &str| serde_json::from_str::<FailoverRecord>(line).ok();
            let records: Vec<_> = text.unwrap_or_default().lines().filter_map(record).collect();
            let (container, host) = (container.to_owned(), host.to_owned());
            records.into_iter().map(move |record| Failover {
                container: container.clone(),
                host: host.clone(),
                record,
            })
        })
        .collect();
    all.sort_by_key(|failover| failover.record.suspected_at_us);
    all
}

/// When the stop began that ended this epoch, if it is written down.
pub(super) fn last_stop(lab: &Lab, container: &str, host: &str, epoch: u64) -> Option<u64> {
    let record = records(lab, container, host).into_iter().rfind(|record| record.epoch == epoch)?;
    Some(record.at_us.saturating_sub(record.stop_us))
}

/// When the first epoch of a generation was committed, if one was.
pub(super) fn first_commit(lab: &Lab, container: &str, host: &str, generation: u64) -> Option<u64> {
    let mut all = records(lab, container, host).into_iter();
    let record = all.find(|record| record.generation == generation)?;
    Some(record.at_us + record.commit_us)
}

fn records(lab: &Lab, container: &str, host: &str) -> Vec<EpochRecord> {
    let text = fs::read_to_string(epochs_file(lab.name(), host, container));
    parse_epochs(&text.unwrap_or_default(), &(0..=u64::MAX)).collect()
}

/// Every host that each container can be at.
fn places(lab: &Lab) -> impl Iterator<Item = (&str, &str)> {
    let topology = lab.topology();
    topology.containers.keys().flat_map(|container| {
        topology.hosts_of(container).into_iter().map(move |host| (container.as_str(), host))
    })
}

fn parse_epochs<'a>(
    text: &'a str,
    during: &'a RangeInclusive<u64>,
) -> impl Iterator<Item = EpochRecord> + 'a {
    let records = text.lines().filter_map(|line| serde_json::from_str::<EpochRecord>(line).ok());
    records.filter(|record| during.contains(&record.at_us))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_in_the_span_count() {
        let line = |epoch, at_us| {
            let record = EpochRecord { epoch, at_us, ..EpochRecord::default() };
            serde_json::to_string(&record).unwrap()
        };
        let text = [line(1, 10), line(2, 20), line(3, 30), line(4, 40)].join("\n");
        let torn = &text[..text.len() - 5];
        let epochs: Vec<u64> = parse_epochs(torn, &(15..=100)).map(|record| record.epoch).collect();
        assert_eq!(epochs, [2, 3]);
    }
}
