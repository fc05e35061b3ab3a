//! What the trainings ran on.

use sae_kernels::Isa;
use std::fs;

/// Processor, instruction set, threads, operating system.
pub fn summary(threads: usize) -> String {
    let processor = processor().unwrap_or_else(|| "unknown processor".to_owned());
    format!("{processor}, {} kernels, {threads} thread(s), {}", Isa::detect().name(), std::env::consts::OS)
}

/// The processor's name, where the system tells it in a file.
fn processor() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
