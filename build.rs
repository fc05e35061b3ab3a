//! Compiles `kernels/*.cu` for the feature `cuda`: one compressed fatbin a file, embedded in the library, and a second
//! one for compute capability 9.0 of those with products.
//!
//! Without nvcc the library builds all the same, without kernels, and says so at run time. Environment:
//!
//! | variable | meaning |
//! |---|---|
//! | `SAE_KERNELS_NVCC`, `NVCC`, `CUDA_HOME`, `CUDA_PATH` | where nvcc is; then PATH, the usual folders, an active virtualenv's `nvidia/cu13` |
//! | `SAE_KERNELS_CUDA_ARCHS` | which of the architectures to compile for, e.g. `80,90,90a` |
//! | `SAE_KERNELS_REQUIRE_NVCC=1` | no nvcc is an error |
//! | `SAE_KERNELS_PTX=1` | leave PTX with line numbers in OUT_DIR, for tests that interpret it |

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compute capabilities with machine code of their own. All of it but that of [`SM90`] is made of the same PTX, that of the first, which
/// the tests execute and which is kept for GPUs that are newer than all of them.
const ARCHITECTURES: [&str; 7] = ["80", "86", "89", "90", SM90, "100", "120"];

/// Compute capability 9.0 with what no other has (wgmma, setmaxnreg): the products' second mainloop, in images of their own. Without them
/// such a GPU runs the machine code of 90.
const SM90: &str = "90a";

/// ptxas: wgmma serialised, setmaxnreg ignored, and the like. The kernel would run, but not as it was written.
const FATAL_WARNINGS: [&str; 11] =
    ["C7504", "C7508", "C7509", "C7510", "C7511", "C7512", "C7513", "C7514", "C7515", "C7516", "C7517"];

const VARIABLES: [&str; 9] = [
    "SAE_KERNELS_NVCC",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "VIRTUAL_ENV",
    "SAE_KERNELS_CUDA_ARCHS",
    "SAE_KERNELS_REQUIRE_NVCC",
    "SAE_KERNELS_PTX",
    "DOCS_RS",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(sae_kernels_ptx)");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let required = env::var("SAE_KERNELS_REQUIRE_NVCC").is_ok_and(|value| value == "1");
    let images = if env::var_os("DOCS_RS").is_some() {
        Err("the documentation is built without kernels".to_string())
    } else {
        match find_nvcc() {
            Some(nvcc) => Ok(Toolkit::new(nvcc)
                .and_then(|toolkit| compile_all(toolkit, &out))
                .unwrap_or_else(|error| fail(&error))),
            None => Err("nvcc was not found when the crate was built".to_string()),
        }
    };
    if let Err(reason) = &images {
        if required {
            fail(&format!(
                "{reason}; install the CUDA toolkit (scripts/cuda-toolchain.sh does) or set SAE_KERNELS_NVCC"
            ));
        }
        println!("cargo::warning=sae-kernels: {reason}: the Cuda backend will have no kernels");
    }
    fs::write(out.join("images.rs"), images_source(&images)).expect("OUT_DIR can be written");
}

/// Stops the build with a message.
fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    std::process::exit(1);
}

/// Names of the compiled files, and the least CUDA version of a driver that runs them.
struct Images {
    names: Vec<String>,
    toolkit: i32,
}

/// What `src/cuda/image.rs` includes.
fn images_source(images: &Result<Images, String>) -> String {
    let mut source = String::from("pub(super) const IMAGES: &[(&str, &[u8])] = &[\n");
    for name in images.iter().flat_map(|images| &images.names) {
        writeln!(source, "    ({name:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),").unwrap();
    }
    writeln!(source, "];\npub(super) const MISSING: Option<&str> = {:?};", images.as_ref().err()).unwrap();
    writeln!(source, "pub(super) const TOOLKIT: i32 = {};", images.as_ref().map_or(0, |images| images.toolkit))
        .unwrap();
    source
}

fn find_nvcc() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut candidates = Vec::new();
    candidates.extend(["SAE_KERNELS_NVCC", "NVCC"].into_iter().filter_map(variable));
    candidates.extend(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(|home| home.join("bin/nvcc")));
    candidates.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|folder| folder.join("nvcc")));
    candidates.extend(["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc", "/usr/lib/cuda/bin/nvcc"].map(PathBuf::from));
    if let Some(environment) = variable("VIRTUAL_ENV")
        && let Ok(pythons) = fs::read_dir(environment.join("lib"))
    {
        let nvcc = |python: PathBuf| python.join("site-packages/nvidia/cu13/bin/nvcc");
        candidates.extend(pythons.flatten().map(|python| nvcc(python.path())));
    }
    // nvcc finds its parts beside itself, so a link to it does not do.
    candidates.into_iter().find(|path| path.is_file()).and_then(|path| path.canonicalize().ok())
}

/// The architectures to compile for, PTX of the first.
fn architectures() -> Result<Vec<&'static str>, String> {
    let Ok(wanted) = env::var("SAE_KERNELS_CUDA_ARCHS") else { return Ok(ARCHITECTURES.to_vec()) };
    wanted
        .split([',', ';', ' '])
        .filter(|name| !name.is_empty())
        .map(|name| {
            ARCHITECTURES.into_iter().find(|known| *known == name.trim_start_matches("sm_")).ok_or_else(|| {
                format!("SAE_KERNELS_CUDA_ARCHS names {name}, but there are only {}", ARCHITECTURES.join(", "))
            })
        })
        .collect()
}

/// nvcc and what it says of itself.
struct Toolkit {
    nvcc: PathBuf,
    version_text: String,
    /// 1000·major + 10·minor.
    version: i32,
}

impl Toolkit {
    fn new(nvcc: PathBuf) -> Result<Self, String> {
        let output = Command::new(&nvcc).arg("--version").output();
        let output = output.map_err(|error| format!("{} does not run: {error}", nvcc.display()))?;
        let version_text = String::from_utf8_lossy(&output.stdout).into_owned();
        // "Cuda compilation tools, release 13.0, V13.0.88"
        let release = version_text.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
        let mut numbers = release.split('.').map(|number| number.parse::<i32>().unwrap_or(0));
        let version = numbers.next().unwrap_or(0) * 1000 + numbers.next().unwrap_or(0) * 10;
        if version < 12000 {
            return Err(format!("{} is CUDA {release}, but the kernels need 12.0 or newer", nvcc.display()));
        }
        Ok(Self { nvcc, version_text, version })
    }
}

/// Compiles every .cu whose stamp is out of date.
fn compile_all(toolkit: Toolkit, out: &Path) -> Result<Images, String> {
    let (mut sources, mut headers) = (Vec::new(), Vec::new());
    for entry in fs::read_dir("kernels").map_err(|error| format!("kernels/: {error}"))?.flatten() {
        let path = entry.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            // Test kernels of the emulator, which the library never launches.
            Some("cu") if entry.file_name().to_string_lossy().starts_with("conformance") => {}
            Some("cu") => sources.push(path),
            Some("cuh") => headers.push(path),
            _ => {}
        }
    }
    sources.sort();
    headers.sort();
    let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let architectures = architectures()?;
    let ptx = env::var("SAE_KERNELS_PTX").is_ok_and(|value| value == "1");

    let mut common = DefaultHasher::new();
    (&toolkit.version_text, &architectures, fs::read("build.rs").ok()).hash(&mut common);
    for header in &headers {
        read(header)?.hash(&mut common);
    }
    let mut names = Vec::new();
    for source in &sources {
        let name = source.file_stem().and_then(|stem| stem.to_str()).expect("kernels have plain names").to_string();
        let mut hasher = common.clone();
        let text = read(source)?;
        text.hash(&mut hasher);
        let stamp = format!("{:016x}", hasher.finish());
        build_if_stale(&out.join(format!("{name}.fatbin")), &stamp, |target| {
            let mut flags = fatbin_flags(&toolkit);
            let codes = architectures.iter().filter(|architecture| **architecture != SM90);
            let codes: Vec<String> = codes.map(|architecture| format!("sm_{architecture},")).collect();
            flags.extend(["-gencode".into(), format!("arch=compute_80,code=[{}compute_80]", codes.concat())]);
            compile(&toolkit.nvcc, source, target, &flags)
        })?;
        if ptx {
            let flags = ["-ptx", "-lineinfo", "-arch=compute_80"].map(String::from);
            build_if_stale(&out.join(format!("{name}.ptx")), &stamp, |target| {
                compile(&toolkit.nvcc, source, target, &flags)
            })?;
        }
        names.push(name.clone());
        // The same file once more, with the other mainloop under its products.
        let text = String::from_utf8_lossy(&text).into_owned();
        if text.contains("GEMM_KERNEL(") {
            let sm90 = format!("{name}_sm90");
            if architectures.contains(&SM90) {
                build_if_stale(&out.join(format!("{sm90}.fatbin")), &stamp, |target| {
                    let mut flags = fatbin_flags(&toolkit);
                    flags.extend([
                        "-DSAE_KERNELS_SM90".into(),
                        "-gencode".into(),
                        "arch=compute_90a,code=sm_90a".into(),
                    ]);
                    compile(&toolkit.nvcc, source, target, &flags)
                })?;
                names.push(sm90.clone());
            }
            if ptx {
                let flags = ["-ptx", "-lineinfo", "-arch=compute_90a", "-DSAE_KERNELS_SM90"].map(String::from);
                build_if_stale(&out.join(format!("{sm90}.ptx")), &stamp, |target| {
                    compile(&toolkit.nvcc, source, target, &flags)
                })?;
            }
        }
    }
    if ptx {
        println!("cargo::rustc-cfg=sae_kernels_ptx");
        println!("cargo::rustc-env=SAE_KERNELS_PTX_DIR={}", out.display());
    }
    // A driver of the toolkit's major version runs its machine code.
    Ok(Images { names, toolkit: toolkit.version / 1000 * 1000 })
}

fn fatbin_flags(toolkit: &Toolkit) -> Vec<String> {
    let threads = env::var("NUM_JOBS").unwrap_or_else(|_| "1".into());
    let mut flags = ["-fatbin", "--threads", &threads].map(String::from).to_vec();
    if toolkit.version >= 13000 {
        flags.push("--compress-mode=size".into());
    }
    flags
}

/// Makes `target` unless the stamp beside it says that it is up to date.
fn build_if_stale(target: &Path, stamp: &str, build: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
    let mut stamp_path = target.as_os_str().to_owned();
    stamp_path.push(".stamp");
    if target.exists() && fs::read_to_string(&stamp_path).is_ok_and(|found| found == stamp) {
        return Ok(());
    }
    // An interrupted build must not leave a stamp that vouches for half a file.
    let _ = fs::remove_file(&stamp_path);
    build(target)?;
    fs::write(&stamp_path, stamp).map_err(|error| format!("{}: {error}", Path::new(&stamp_path).display()))
}

/// Runs nvcc; anything that would make a kernel slower than it was written is an error.
fn compile(nvcc: &Path, source: &Path, target: &Path, flags: &[String]) -> Result<(), String> {
    let output = Command::new(nvcc)
        .args(["-std=c++17", "-O3", "-Xptxas", "-v"])
        .args(flags)
        .arg("-o")
        .arg(target)
        .arg(source)
        .output()
        .map_err(|error| format!("{} does not run: {error}", nvcc.display()))?;
    let messages = format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    let name = source.display();
    if !output.status.success() {
        return Err(format!("nvcc could not compile {name}:\n{messages}"));
    }
    for line in messages.lines() {
        let spills = line.contains("bytes spill stores")
            && line.trim() != "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
        if spills || FATAL_WARNINGS.iter().any(|code| line.contains(code)) {
            return Err(format!("{name}: {}\n{messages}", line.trim()));
        }
    }
    Ok(())
}
