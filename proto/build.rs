//! Compiles the .proto files. `protoc` comes from `PROTOC`, which `.cargo/config.toml` points at the copy that
//! `cargo tools` lays out.

fn main() -> std::io::Result<()> {
    for path in ["etcd/disk.proto", "backup/backup.proto", "sidecar/sidecar.proto"] {
        println!("cargo:rerun-if-changed={path}");
    }
    prost_build::Config::new()
        .bytes([".steward.backup.v1"])
        .compile_protos(&["etcd/disk.proto", "backup/backup.proto"], &["."])?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("sidecar.bin"))
        // `sidecar ctl` prints answers as JSON, with the names of values that have one.
        .type_attribute(".", "#[derive(serde::Serialize)]\n#[serde(rename_all = \"camelCase\")]")
        .field_attribute("Outcome.action", serialize("Action"))
        .field_attribute("Outcome.cause", serialize("Cause"))
        .field_attribute("StatusResponse.phase", serialize("Phase"))
        .field_attribute("StatusResponse.role", serialize("Role"))
        .field_attribute("Snapshot.kind", serialize("Kind"))
        .field_attribute("TakeSnapshotRequest.kind", serialize("Kind"))
        .field_attribute("VerifyRequest.level", serialize("Level"))
        .compile_protos(&["sidecar/sidecar.proto"], &["."])
}

fn serialize(name: &str) -> String {
    format!("#[serde(serialize_with = \"named::<{name}, _>\")]")
}
