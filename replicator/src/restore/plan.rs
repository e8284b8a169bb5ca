//! From one address space to the next: which ranges to unmap, map and protect.
//!
//! Pure: a sweep over the borders of the old mappings and the new. What is alike in both is left
//! alone, so that the cost follows the difference.

use crate::image::{Home, Mapping, Source};

const PROT_WRITE: u8 = libc::PROT_WRITE as u8;

/// One change of an address space. Steps do not overlap and stand in order of address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing is mapped here any more.
    Unmap {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// Map this anew, over whatever is there.
    Map(Mapping),
    /// Only the protection differs.
    Protect {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
        /// PROT_ bits.
        prot: u8,
    },
}

/// The steps that lead from the mappings `old` to `new`, both in order and without overlap. The
/// kernel's own mappings ([`Source::Vdso`]) are left out: they are moved by themselves.
pub fn plan(old: &[Mapping], new: &[Mapping]) -> Vec<Step> {
    let mut steps = Vec::new();
    if old == new && !new.iter().any(|m| m.fresh) {
        return steps;
    }
    let (mut at, mut i, mut j) = (0, 0, 0);
    loop {
        while old.get(i).is_some_and(|m| m.end <= at || is_vdso(m)) {
            i += 1;
        }
        while new.get(j).is_some_and(|m| m.end <= at || is_vdso(m)) {
            j += 1;
        }
        let (before, after) = (old.get(i), new.get(j));
        let border = |m: Option<&Mapping>| {
            m.map_or(u64::MAX, |m| if m.start > at { m.start } else { m.end })
        };
        let next = border(before).min(border(after));
        if next == u64::MAX {
            return steps;
        }
        let covers = |m: &&Mapping| m.start <= at;
        push(&mut steps, at, next, before.filter(covers), after.filter(covers));
        at = next;
    }
}

fn is_vdso(m: &Mapping) -> bool {
    matches!(m.source, Source::Vdso(_))
}

fn push(steps: &mut Vec<Step>, start: u64, end: u64, old: Option<&Mapping>, new: Option<&Mapping>) {
    match (old, new) {
        (None, None) => {}
        (Some(_), None) => match steps.last_mut() {
            Some(Step::Unmap { end: e, .. }) if *e == start => *e = end,
            _ => steps.push(Step::Unmap { start, end }),
        },
        (Some(old), Some(new)) if !new.fresh && alike(old, new) => {
            if old.prot == new.prot {
                return;
            }
            let prot = new.prot;
            match steps.last_mut() {
                Some(Step::Protect { end: e, prot: p, .. }) if *e == start && *p == prot => {
                    *e = end;
                }
                _ => steps.push(Step::Protect { start, end, prot }),
            }
        }
        (_, Some(new)) => {
            let piece = part(new, start, end);
            match steps.last_mut() {
                Some(Step::Map(last)) if last.end == start && start > new.start => last.end = end,
                _ => steps.push(Step::Map(piece)),
            }
        }
    }
}

/// The part of a mapping between two addresses.
fn part(m: &Mapping, start: u64, end: u64) -> Mapping {
    Mapping { start, end, source: m.source.behind(start - m.start), ..m.clone() }
}

/// Whether pages of the one mapping may stay for the other, whose range overlaps.
fn alike(old: &Mapping, new: &Mapping) -> bool {
    let same_source = match (&old.source, &new.source) {
        (
            Source::File { path: a, offset: i, shared: s, home, writable: w },
            Source::File { path: b, offset: j, shared: t, home: new_home, writable: x },
        ) => {
            // A shared file mapped for reading alone was opened so and cannot be made writable.
            let opens = |m: &Mapping| *s && m.prot & PROT_WRITE != 0;
            let (i, j) = (i.wrapping_sub(old.start), j.wrapping_sub(new.start));
            // One that has a number may have got another name.
            let same = home == new_home && w == x && (a == b || *home != Home::Host);
            i == j && s == t && same && (opens(old) || !opens(new))
        }
        (
            Source::Object { id: a, offset: i, shared: s },
            Source::Object { id: b, offset: j, shared: t },
        ) => {
            let (i, j) = (i.wrapping_sub(old.start), j.wrapping_sub(new.start));
            // A segment attached for reading alone cannot be made writable.
            let writes = |m: &Mapping| m.prot & PROT_WRITE != 0;
            a == b && i == j && s == t && (!s || writes(old) || !writes(new))
        }
        (a, b) => a == b,
    };
    same_source && old.grows_down == new.grows_down
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const PAGE: u64 = 4096;

    /// What one page is: protection, source with the page's own offset, growth, and which
    /// checkpoint's contents it can still hold.
    type Page = (u8, Source, bool, u32);

    fn pages(mappings: &[Mapping], born: u32) -> BTreeMap<u64, Page> {
        let mut all = BTreeMap::new();
        for m in mappings {
            for at in (m.start..m.end).step_by(PAGE as usize) {
                let p = part(m, at, at + PAGE);
                all.insert(at, (p.prot, p.source, p.grows_down, born));
            }
        }
        all
    }

    fn source(choice: u8, start: u64) -> Source {
        let file = |path: &str, shared| Source::File {
            path: path.into(),
            offset: start,
            shared,
            home: Home::Host,
            writable: false,
        };
        match choice {
            0 | 1 => Source::Anonymous,
            2 => Source::Object { id: 1, offset: start, shared: true },
            3 => file("/a", false),
            4 => file("/b", false),
            _ => file("/a", true),
        }
    }

    fn space() -> impl Strategy<Value = Vec<Mapping>> {
        let one = (0u64..3, 1u64..5, 0u8..4, 0u8..6, any::<bool>(), 0u8..5);
        prop::collection::vec(one, 0..8).prop_map(|items| {
            let mut at = 16 * PAGE;
            let mut all = Vec::new();
            for (gap, len, prot, choice, grows_down, fresh) in items {
                let start = at + gap * PAGE;
                let end = start + len * PAGE;
                let source = source(choice, start);
                let grows_down = grows_down && source == Source::Anonymous;
                all.push(Mapping { start, end, prot, grows_down, source, fresh: fresh == 0 });
                at = end;
            }
            all
        })
    }

    #[test]
    fn a_file_in_a_volume_may_have_got_another_name() {
        let file = |path: &str, home| Mapping {
            start: 0x1000,
            end: 0x2000,
            prot: 1,
            grows_down: false,
            source: Source::File {
                path: path.into(),
                offset: 0,
                shared: false,
                home,
                writable: false,
            },
            fresh: false,
        };
        let steps = |a: Mapping, b: Mapping| plan(&[a], &[b]).len();
        assert_eq!(steps(file("/a", Home::Volume(7)), file("/b", Home::Volume(7))), 0);
        assert_eq!(steps(file("/a", Home::Volume(7)), file("/a", Home::Volume(8))), 1);
        assert_eq!(steps(file("/a", Home::Root(7)), file("/b", Home::Root(7))), 0);
        assert_eq!(steps(file("/a", Home::Host), file("/b", Home::Host)), 1);
        assert_eq!(steps(file("/a", Home::Host), file("/a", Home::Root(7))), 1);
    }

    proptest! {
        #[test]
        fn the_steps_lead_from_the_old_pages_to_the_new(old in space(), new in space()) {
            let mut have = pages(&old, 0);
            let steps = plan(&old, &new);
            let mut reached = 0;
            for step in &steps {
                let (start, end) = match step {
                    Step::Unmap { start, end } | Step::Protect { start, end, .. } => (*start, *end),
                    Step::Map(m) => (m.start, m.end),
                };
                prop_assert!(reached <= start && start < end, "in order, not empty");
                reached = end;
                for at in (start..end).step_by(PAGE as usize) {
                    match step {
                        Step::Unmap { .. } => {
                            have.remove(&at);
                        }
                        Step::Protect { prot, .. } => {
                            let page = have.get_mut(&at).expect("protects what is mapped");
                            prop_assert_ne!(page.0, *prot, "for a reason");
                            page.0 = *prot;
                        }
                        Step::Map(m) => have.extend(pages(&[part(m, at, at + PAGE)], 1)),
                    }
                }
            }
            let strip = |p: &BTreeMap<u64, Page>| -> Vec<_> {
                p.iter().map(|(at, p)| (*at, p.0, p.1.clone(), p.2)).collect()
            };
            prop_assert_eq!(strip(&have), strip(&pages(&new, 0)));
            // Pages that need not be mapped anew are not, and those that must be are.
            let before = pages(&old, 0);
            for m in &new {
                for at in (m.start..m.end).step_by(PAGE as usize) {
                    let wanted = part(m, at, at + PAGE);
                    let stays = !m.fresh && before.get(&at).is_some_and(|b| {
                        let was_readonly = b.0 & PROT_WRITE == 0 && m.prot & PROT_WRITE != 0;
                        let shared = matches!(
                            &b.1,
                            Source::File { shared: true, .. } | Source::Object { shared: true, .. }
                        );
                        let reopen = shared && was_readonly;
                        b.1 == wanted.source && b.2 == m.grows_down && !reopen
                    });
                    prop_assert_eq!(have[&at].3, u32::from(!stays));
                }
            }
        }

        #[test]
        fn the_same_again_takes_no_steps(mut space in space()) {
            space.iter_mut().for_each(|m| m.fresh = false);
            prop_assert_eq!(plan(&space, &space), vec![]);
        }
    }
}
