//! Writes what the emulator makes of every kernel in `kernels/conformance.cu`, one line of hexadecimal words for each, as a recorded chip
//! stands in `tests/golden/`: `cargo run --release -p ptx-emulator --example conformance > emulated.txt`

use ptx_emulator::{Module, Options, conformance};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let module = Module::parse(conformance::PTX)?;
    for kernel in module.kernels() {
        println!("{}", conformance::to_line(kernel, &conformance::emulated(&module, kernel, Options::default())?));
    }
    Ok(())
}
