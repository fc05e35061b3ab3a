//! Starting ranks, and waiting for them no longer than is good.

// Each test uses only a part of this.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// No job takes longer, whatever else the machine does.
const LIMIT: Duration = Duration::from_secs(180);

/// What became of a job.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program on `ranks` ranks, however few cores there are, as root if need be.
///
/// # Panics
/// If it does not come to an end.
pub fn mpirun(ranks: usize, program: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
    let mut child = Command::new("mpirun")
        .args(["-n", &ranks.to_string()])
        .arg(program)
        .args(args)
        // Open MPI 4, then 5; others do not mind.
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
        .env("OMPI_MCA_hwloc_base_binding_policy", "none")
        .env("OMPI_MCA_mpi_yield_when_idle", "1")
        .env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
        .env("PRTE_MCA_hwloc_default_binding_policy", "none")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mpirun must be there: apt-get install openmpi-bin");
    let (stdout, stderr) = (reader(child.stdout.take().unwrap()), reader(child.stderr.take().unwrap()));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            let stderr = stderr.join().unwrap();
            panic!("{} on {ranks} ranks does not come to an end: {stderr}", program.display());
        }
        thread::sleep(Duration::from_millis(5));
    };
    Ended { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// What a pipe says, whatever its bytes are.
fn reader(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The example `distributed`, which `cargo test` builds beside the tests.
pub fn distributed() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples/distributed");
    assert!(path.exists(), "{} is built by `cargo test -p sae-kernels-mpi` without --test", path.display());
    path
}

/// ‖found − expected‖/‖expected‖.
pub fn relative(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(f, e)| f - e)) / norm(&mut expected.iter().copied())
}
