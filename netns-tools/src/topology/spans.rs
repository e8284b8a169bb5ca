//! Where each value of a YAML text stands, so that a complaint about the model can point into the
//! file while the model itself holds plain values.
//!
//! The text is read a second time into a tree of places. A place is asked for by its path, such
//! as `links/0/endpoints/1`; what is not there has the place of its nearest ancestor.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, Spanned};

/// A place in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Byte offset.
    pub(super) offset: usize,
    /// Length in bytes.
    pub(super) len: usize,
}

impl Place {
    /// The place of `location` in `text`; the text's beginning where it is unknown.
    pub(super) fn of(location: Location, text: &str) -> Self {
        let span = location.span();
        let offset = span.byte_offset().map_or(0, |offset| offset as usize).min(text.len());
        let rest = &text[offset..];
        // The span of a mapping or a list may run over many lines: its first line is enough.
        let line = rest.lines().next().map_or(0, |line| line.trim_end().len());
        let len = span.byte_len().map_or(0, |len| len as usize);
        Self { offset, len: len.min(line) }
    }
}

/// The tree of places of one text.
#[derive(Debug)]
pub(super) struct Spans {
    text: String,
    root: Option<Spanned<Tree>>,
}

#[derive(Debug)]
enum Tree {
    Leaf,
    List(Vec<Spanned<Tree>>),
    Map(BTreeMap<String, (Location, Spanned<Tree>)>),
}

impl Spans {
    /// Reads the places of `text`. A text that is not YAML has none.
    pub(super) fn of(text: &str) -> Self {
        Self { text: text.to_owned(), root: serde_saphyr::from_str(text).ok() }
    }

    /// The place of the value at `path`.
    pub(super) fn value(&self, path: &str) -> Place {
        self.find(path, |_, value| value)
    }

    /// The place of the key at the end of `path`, or of the item where that is in a list.
    pub(super) fn key(&self, path: &str) -> Place {
        self.find(path, |key, _| key)
    }

    fn find(&self, path: &str, choose: fn(Location, Location) -> Location) -> Place {
        let Some(mut node) = self.root.as_ref() else { return Place { offset: 0, len: 0 } };
        let mut found = node.referenced;
        for step in path.split('/').filter(|step| !step.is_empty()) {
            let (key, value) = match &node.value {
                Tree::Map(map) => match map.get(step) {
                    Some((key, value)) => (*key, value),
                    None => break,
                },
                Tree::List(list) => match step.parse().ok().and_then(|i: usize| list.get(i)) {
                    Some(value) => (value.referenced, value),
                    None => break,
                },
                Tree::Leaf => break,
            };
            found = choose(key, value.referenced);
            node = value;
        }
        Place::of(found, &self.text)
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_none<E: de::Error>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
        Tree::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element()? {
            list.push(item);
        }
        Ok(Tree::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Tree, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let value = access.next_value()?;
            map.insert(key.value, (key.referenced, value));
        }
        Ok(Tree::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_values_and_keys() {
        let text = "name: a\nlinks:\n  - endpoints: [x:y, \"z:w\"]\n    mtu: 9000\n";
        let spans = Spans::of(text);
        let at = |place: Place| &text[place.offset..place.offset + place.len];
        assert_eq!(at(spans.value("name")), "a");
        assert_eq!(at(spans.key("name")), "name");
        assert_eq!(at(spans.value("links/0/endpoints/0")), "x:y");
        assert_eq!(at(spans.value("links/0/endpoints/1")), "\"z:w\"");
        assert_eq!(at(spans.key("links/0/mtu")), "mtu");
        let nearest = spans.value("links/0/mtu/none/such");
        assert_eq!(nearest, spans.value("links/0/mtu"));
        assert_eq!(Spans::of("a: [").value("a"), Place { offset: 0, len: 0 });
    }
}
