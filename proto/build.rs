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
        .compile_protos(&["sidecar/sidecar.proto"], &["."])
}
