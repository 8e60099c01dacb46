//! The API as it is described: the reference is that of the .proto, and nothing that callers go by has changed.
//!
//! `UPDATE=1 cargo test -p tests --test api` writes the reference anew, and the descriptor where what is there still holds.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use proto::Message;

fn place(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/sidecar").join(name)
}

fn current() -> Result<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(proto::sidecar::DESCRIPTOR)?;
    set.file.into_iter().find(|file| file.package() == "steward.sidecar.v1").context("the API is not described")
}

fn must_update() -> bool {
    std::env::var_os("UPDATE").is_some()
}

/// Everything that callers go by, as lines; what each means is in its line.
fn contract(file: &FileDescriptorProto) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    for service in &file.service {
        for method in &service.method {
            let stream = if method.server_streaming() { "stream " } else { "" };
            let what = format!("{} -> {stream}{}", method.input_type(), method.output_type());
            lines.insert(format!("{}/{}", service.name(), method.name()), what);
        }
    }
    for message in &file.message_type {
        for field in &message.field {
            let what = format!("{} {:?} {:?} {}", field.name(), field.label(), field.r#type(), field.type_name());
            lines.insert(format!("{}#{}", message.name(), field.number()), what);
        }
    }
    for values in &file.enum_type {
        for value in &values.value {
            lines.insert(format!("{}#{}", values.name(), value.number()), value.name().to_owned());
        }
    }
    lines
}

/// What the old one has and the new one has not, or otherwise.
fn broken(old: &FileDescriptorProto, new: &FileDescriptorProto) -> Vec<String> {
    let new = contract(new);
    let changed = contract(old).into_iter().filter(|(at, what)| new.get(at) != Some(what));
    changed.map(|(at, what)| format!("{at} was {what:?} and is {:?}", new.get(&at))).collect()
}

#[test]
fn nothing_that_callers_go_by_has_changed() -> Result<()> {
    let mut now = current()?;
    now.source_code_info = None;
    let path = place("descriptor.bin");
    if !path.exists() && must_update() {
        std::fs::write(&path, now.encode_to_vec())?;
    }
    let before = FileDescriptorProto::decode(std::fs::read(&path)?.as_slice())?;
    let broken = broken(&before, &now);
    ensure!(broken.is_empty(), "callers would break:\n{}", broken.join("\n"));
    if must_update() {
        std::fs::write(&path, now.encode_to_vec())?;
    }
    ensure!(
        contract(&FileDescriptorProto::decode(std::fs::read(&path)?.as_slice())?) == contract(&now),
        "what is new is not in proto/sidecar/descriptor.bin: run this test with UPDATE=1"
    );
    Ok(())
}

#[test]
fn what_breaks_callers_is_noticed() -> Result<()> {
    type Change = fn(&mut FileDescriptorProto);
    let file = current()?;
    let changes: [Change; 5] = [
        |file| drop(file.service[0].method.pop()),
        |file| file.service[0].method[0].server_streaming = Some(false),
        |file| file.message_type.retain(|message| message.name() != "Outcome"),
        |file| {
            let snapshot = file.message_type.iter_mut().find(|message| message.name() == "Snapshot");
            if let Some(message) = snapshot {
                message.field[0].number = Some(99);
            }
        },
        |file| drop(file.enum_type[0].value.pop()),
    ];
    for change in changes {
        let mut other = file.clone();
        change(&mut other);
        ensure!(!broken(&file, &other).is_empty());
        ensure!(broken(&file, &file).is_empty());
    }
    Ok(())
}

/// Comments, by the path to what they are about.
struct Comments(BTreeMap<Vec<i32>, String>);

impl Comments {
    fn of(file: &FileDescriptorProto) -> Self {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        let text = |text: &str| text.lines().map(str::trim).collect::<Vec<_>>().join("\n").trim().to_owned();
        Self(locations.map(|location| (location.path.clone(), text(location.leading_comments()))).collect())
    }

    fn at(&self, path: &[i32]) -> &str {
        self.0.get(path).map_or("", String::as_str)
    }

    fn in_line(&self, path: &[i32]) -> String {
        self.at(path).replace('\n', " ")
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    let short = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let name = match field.r#type() {
        Type::Message | Type::Enum => {
            format!("[{0}](#{1})", short(field.type_name()), short(field.type_name()).to_lowercase())
        }
        other => format!("{other:?}").to_lowercase(),
    };
    if field.label() == Label::Repeated { format!("repeated {name}") } else { name }
}

fn reference(file: &FileDescriptorProto) -> Result<String> {
    let comments = Comments::of(file);
    let mut text = String::from(
        "<!-- Written by `UPDATE=1 cargo test -p tests --test api` from the comments in sidecar.proto. -->\n",
    );
    writeln!(text, "# `{}`\n\n{}\n", file.package(), comments.at(&[12]))?;
    for (s, service) in (0..).zip(&file.service) {
        for (m, method) in (0..).zip(&service.method) {
            let short = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
            let (input, output) = (short(method.input_type()), short(method.output_type()));
            let stream = if method.server_streaming() { "a stream of " } else { "" };
            writeln!(text, "## {}\n\n{}\n", method.name(), comments.at(&[6, s, 2, m]))?;
            writeln!(
                text,
                "Takes [{input}](#{}), answers {stream}[{output}](#{}).\n",
                input.to_lowercase(),
                output.to_lowercase()
            )?;
        }
    }
    text.push_str("## Messages\n");
    for (m, message) in (0..).zip(&file.message_type) {
        writeln!(text, "\n### {}\n", message.name())?;
        let what = comments.at(&[4, m]);
        if !what.is_empty() {
            writeln!(text, "{what}\n")?;
        }
        fields(&mut text, &comments, m, message)?;
    }
    for (e, values) in (0..).zip(&file.enum_type) {
        writeln!(text, "\n### {}\n\n| | | |\n|---|---|---|", values.name())?;
        for (v, value) in (0..).zip(&values.value) {
            writeln!(text, "| {} | `{}` | {} |", value.number(), value.name(), comments.in_line(&[5, e, 2, v]))?;
        }
    }
    Ok(text)
}

fn fields(text: &mut String, comments: &Comments, index: i32, message: &DescriptorProto) -> Result<()> {
    if message.field.is_empty() {
        text.push_str("Nothing.\n");
        return Ok(());
    }
    text.push_str("| | | | |\n|---|---|---|---|\n");
    for (f, field) in (0..).zip(&message.field) {
        let what = comments.in_line(&[4, index, 2, f]);
        writeln!(text, "| {} | `{}` | {} | {what} |", field.number(), field.name(), type_of(field))?;
    }
    Ok(())
}

#[test]
fn the_reference_is_that_of_the_proto() -> Result<()> {
    let (path, written) = (place("README.md"), reference(&current()?)?);
    if must_update() {
        std::fs::write(&path, &written)?;
    }
    ensure!(std::fs::read_to_string(&path)? == written, "proto/sidecar/README.md is old: run this test with UPDATE=1");
    ensure!(written.contains("## TakeSnapshot") && written.contains("Takes a snapshot now"), "{written}");
    Ok(())
}
