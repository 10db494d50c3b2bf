//! Generates the prost types of `proto/*.proto`, without a `protoc` on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/options.proto", "proto/runtimeoptions.proto"];
    // liblxc is to find them in the program before it looks into libc; see src/backend/lxc/monitor.rs.
    for symbol in ["waitpid", "accept", "accept4", "execvp", "mount"] {
        println!("cargo:rustc-link-arg-bin=containerd-shim-proxmox-lxcri-v1=-Wl,--export-dynamic-symbol={symbol}");
    }
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    prost_build::Config::new()
        .type_attribute(".", "#[allow(missing_docs)]")
        .compile_fds(descriptors)?;
    Ok(())
}
