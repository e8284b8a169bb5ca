//! The types that an image is made of are pinned: postcard writes fields in their order and variants by
//! their number, so a field that comes, goes or moves makes another format without a sign of it.
//!
//! `format.txt` lists every type, its fields in order, and its variants with their numbers.
//! `NILICON_BLESS=1` writes it anew; [`super::file::FORMAT`] then grows with the first release.

use super::files::LockKind;
use super::info::{Info, NamespaceKind};
use super::net::TcpState;
use super::object::ObjectKind;
use super::task::TimeUnit;
use super::terminal::OtherEnd;
use super::tree::EntryKind;
use super::unix::UnixLink;
use super::{Home, Kind, Source, State, VdsoPart};
use serde_reflection::{ContainerFormat, Error, Registry, Samples, Tracer, TracerConfig};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

fn types() -> Result<Registry, Error> {
    let mut tracer = Tracer::new(TracerConfig::default());
    let samples = Samples::new();
    tracer.trace_type::<State>(&samples)?;
    tracer.trace_type::<Info>(&samples)?;
    // Of an enum inside of another type but one variant is seen.
    tracer.trace_type::<IpAddr>(&samples)?;
    tracer.trace_type::<SocketAddr>(&samples)?;
    tracer.trace_type::<OtherEnd>(&samples)?;
    tracer.trace_type::<VdsoPart>(&samples)?;
    tracer.trace_type::<TimeUnit>(&samples)?;
    tracer.trace_type::<LockKind>(&samples)?;
    tracer.trace_type::<NamespaceKind>(&samples)?;
    tracer.trace_type::<TcpState>(&samples)?;
    tracer.trace_type::<EntryKind>(&samples)?;
    tracer.trace_type::<UnixLink>(&samples)?;
    tracer.trace_type::<ObjectKind>(&samples)?;
    tracer.trace_type::<Home>(&samples)?;
    tracer.trace_type::<Source>(&samples)?;
    tracer.trace_type::<Kind>(&samples)?;
    tracer.registry()
}

fn listing(types: &Registry) -> String {
    let mut text = String::new();
    for (name, format) in types {
        let _ = writeln!(text, "{name}");
        match format {
            ContainerFormat::Struct(fields) => {
                for field in fields {
                    let _ = writeln!(text, "    {}: {:?}", field.name, field.value);
                }
            }
            ContainerFormat::Enum(variants) => {
                for (number, variant) in variants {
                    let _ = writeln!(text, "    {number} {}: {:?}", variant.name, variant.value);
                }
            }
            other => {
                let _ = writeln!(text, "    {other:?}");
            }
        }
    }
    text
}

#[test]
fn the_types_of_an_image_are_pinned() {
    let text = listing(&types().expect("traced"));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/image/format.txt");
    if std::env::var_os("NILICON_BLESS").is_some() {
        std::fs::write(path, &text).expect("written");
    }
    let golden = std::fs::read_to_string(path).expect("format.txt");
    let changed: Vec<&str> = text.lines().filter(|l| !golden.lines().any(|g| g == *l)).collect();
    assert!(text == golden, "the format of images has changed; new lines: {changed:#?}");
}
