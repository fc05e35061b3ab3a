//! Writes what the emulator makes of every kernel in `kernels/conformance.cu` and `conformance_sm90.cu`, one line of hexadecimal words for each, as a recorded chip
//! stands in `tests/golden/`: `cargo run --release -p ptx-emulator --example conformance > emulated.txt`

use ptx_emulator::{Options, conformance};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for suite in conformance::SUITES {
        let module = suite.module()?;
        for kernel in module.kernels() {
            println!("{}", conformance::to_line(kernel, &suite.emulated(&module, kernel, Options::default())?));
        }
    }
    Ok(())
}
