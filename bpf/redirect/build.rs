//! Compiles `bpf/src/*.bpf.c` with clang into `OUT_DIR`, one object per source.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Stops the build with one line, which cargo prints.
fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    eprintln!("{message}");
    exit(1)
}

fn out_dir() -> PathBuf {
    env::var_os("OUT_DIR").map_or_else(|| fail("OUT_DIR is not set by cargo"), PathBuf::from)
}

/// The directory with libbpf's `bpf/bpf_helpers.h`; clang's target has no default for it.
fn header_dirs() -> Vec<PathBuf> {
    let triple = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("aarch64") => "aarch64-linux-gnu",
        Ok("riscv64") => "riscv64-linux-gnu",
        _ => "x86_64-linux-gnu",
    };
    let candidates = ["/usr/include".to_owned(), format!("/usr/include/{triple}")];
    let dirs: Vec<_> = candidates
        .iter()
        .map(PathBuf::from)
        .filter(|d| d.is_dir())
        .collect();
    if !dirs.iter().any(|d| d.join("bpf/bpf_helpers.h").is_file()) {
        fail("bpf/bpf_helpers.h not found under /usr/include: install the package libbpf-dev");
    }
    if !dirs.iter().any(|d| d.join("asm/types.h").is_file()) {
        fail("asm/types.h not found under /usr/include: install the package linux-libc-dev");
    }
    dirs
}

fn compile(clang: &str, source: &Path, object: &Path, headers: &[PathBuf]) {
    let mut command = Command::new(clang);
    command
        .args([
            "-g", "-O2", "-Wall", "-Wextra", "-Werror", "-target", "bpfel", "-mcpu=v3",
        ])
        .arg("-fdebug-compilation-dir=.");
    for dir in headers {
        command.arg("-idirafter").arg(dir);
    }
    let output = command.arg("-c").arg(source).arg("-o").arg(object).output();
    match output {
        Err(error) => fail(&format!(
            "{clang}: {error}: install the package clang or set CLANG"
        )),
        Ok(output) if !output.status.success() => {
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
            fail(&format!(
                "{clang} failed on {}, see its messages",
                source.display()
            ));
        }
        Ok(_) => {}
    }
}

fn main() {
    println!("cargo::rerun-if-env-changed=CLANG");
    println!("cargo::rerun-if-changed=../src");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let headers = header_dirs();
    let sources = std::fs::read_dir("../src")
        .unwrap_or_else(|error| fail(&format!("bpf/src: {error}: incomplete checkout?")));
    for entry in sources {
        let path = entry
            .unwrap_or_else(|error| fail(&format!("bpf/src: {error}")))
            .path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        println!("cargo::rerun-if-changed={}", path.display());
        if let Some(stem) = name.strip_suffix(".bpf.c") {
            compile(
                &clang,
                &path,
                &out_dir().join(format!("{stem}.bpf.o")),
                &headers,
            );
        }
    }
}
